"""Runs that are killed and taken up again end where the uninterrupted one does, bit for bit (on a CPU)."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import killable
import pytest
import torch
from killable import EVERY, FINAL, STEPS, images
from models import ConvNet
from processes import started
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.runtime.batches import meta_dataloader

SCRIPT = Path(__file__).resolve().parents[1] / "killable.py"


def moment(dice, first, last, in_write):
    """A line of the run's output, and how long after it the run is killed, in steps or writes of a checkpoint."""
    steps = [k for k in range(first, last + 1) if not in_write or k % EVERY == 0]
    return f"{'saving' if in_write else 'step'} {dice.choice(steps)}", dice.random() * (1.2 if in_write else 1)


def run(kind, folder, line=None, delay=0.0):
    """Start the run or take it up; kill it at a :func:`moment`, or let it come to its end.

    Returns:
        The step it went on from, that of its last whole checkpoint, and that of the last one it began to write.
    """
    folder.mkdir(exist_ok=True)
    said, problem = {}, ""
    process, receiver = started(killable.heard, kind, str(folder))
    with contextlib.suppress(EOFError):
        while True:
            word, number = receiver.recv()
            if word == "error":
                problem = number
                continue
            now = time.perf_counter()
            if f"{word} {number}" == line:
                if word == "step":
                    span = now - said.get(("step", number - 1), now)
                else:
                    span = said.get(("saved", number - EVERY), 0.0) - said.get(("saving", number - EVERY), 0.0)
                time.sleep(delay * (span or 0.01))
                process.kill()
            said[word, number] = now
    process.join()
    assert process.exitcode == (-signal.SIGKILL if line else 0), f"{list(said)[-2:]}: {problem[-3000:]}"
    began, saved, saving = (
        max((n for w, n in said if w in words), default=0)
        for words in (["resumes"], ["resumes", "saved"], ["resumes", "saving"])
    )
    return began, saved, saving


def run_killed(kind, folder, *moments):
    """Kill and take up again, then let it come to its end.

    Returns:
        For each kill, whether a checkpoint was being written.
    """
    inside, saved, saving = [], 0, 0
    for line, delay in (*moments, (None, 0.0)):
        low, high = saved, saving
        began, saved, saving = run(kind, folder, line, delay)
        assert low <= began <= high, f"took up step {began}; checkpoint {low} was whole, {high} was begun"
        inside.append(saving > saved)
    return inside[:-1]


def differences(a, b):
    """Names of what differs between two runs' ends: parameters, buffers, optimizer moments, Meta-IADA state."""
    a, b = a / FINAL, b / FINAL
    if a.read_bytes() == b.read_bytes():
        return []
    one, two = load_file(a), load_file(b)
    names = sorted(one.keys() | two.keys())
    return ["file", *(k for k in names if k not in one or k not in two or not one[k].equal(two[k]))]


@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_killed_twice(kind, tmp_path):
    """Once at any moment, once in a checkpoint."""
    dice = random.Random(kind)
    moments = moment(dice, 1, STEPS // 2, False), moment(dice, STEPS // 2 + 1, STEPS, True)
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(run, kind, tmp_path / "whole")
        run_killed(kind, tmp_path / "killed", *moments)
        whole.result()
    assert not differences(tmp_path / "whole", tmp_path / "killed"), moments


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "loop", "loop-online"])
def test_killed_twenty_times(kind, tmp_path, capsys):
    dice = random.Random(kind)
    moments = [moment(dice, 1, STEPS if k % 3 == 2 else STEPS - 1, k % 3 == 2) for k in range(20)]
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(run, kind, tmp_path / "whole")
        killed = [pool.submit(run_killed, kind, tmp_path / f"killed-{k}", m) for k, m in enumerate(moments)]
    whole.result()
    problems = []
    for k, (m, future) in enumerate(zip(moments, killed, strict=True)):
        found = future.exception() or differences(tmp_path / "whole", tmp_path / f"killed-{k}")
        if found:
            problems.append(f"killed at {m}: {found}")
    inside = sum(future.result()[0] for future in killed if not future.exception())
    with capsys.disabled():
        print(f"\n{kind}: {20 - len(problems)} of 20 bit-identical; {inside} were killed in a checkpoint")
    assert not problems, "\n".join(problems)


# ------------------------------------------------------------------------------------------------------- Accelerate


def accelerated(kind, seed):
    """A model in Accelerate's hands, and its step ``k``."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer's, from another test
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(seed)
    model = ConvNet(dropout=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    meta = images(12, seed=2)
    loader = DataLoader(meta, batch_size=5, shuffle=True) if kind == "ordinary" else meta_dataloader(meta, 5, 0)
    config = IADAConfig(warmup_epochs=1)
    iada = MetaIADA(model, optimizer, meta_loader=loader, steps_per_epoch=4, epochs=3, config=config)
    accelerator.register_for_checkpointing(iada)
    batches = list(DataLoader(images(32, seed=1), batch_size=8))
    model.train()

    def train(first, last):
        for k in range(first, last):
            inputs, labels = batches[k % 4]
            optimizer.zero_grad()
            accelerator.backward(iada(model(inputs), labels))
            optimizer.step()
            scheduler.step()

    return accelerator, train, lambda: (model.state_dict(), optimizer.state_dict(), iada.state_dict())


@pytest.mark.parametrize("at", [2, 7])
@pytest.mark.parametrize("kind", ["ordinary", "meta_dataloader"])
def test_accelerate_saves_and_loads_it(tmp_path, kind, at):
    """In the warm-up and after it."""
    accelerator, train, state = accelerated(kind, seed=0)
    train(0, at)
    accelerator.save_state(tmp_path)
    train(at, 12)
    expected = torch.utils._pytree.tree_flatten(state())[0]
    accelerator, train, state = accelerated(kind, seed=1)
    train(0, 9)  # what it did before does not matter
    accelerator.load_state(tmp_path)
    train(at, 12)
    found = torch.utils._pytree.tree_flatten(state())[0]
    assert len(found) == len(expected)
    assert all(a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(found, expected, strict=True))
    saved = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    assert saved["progress.step"] == at


@pytest.mark.slow
def test_the_soak_benchmark(tmp_path):
    """Its smallest size: killed, resumed, compared."""
    root = SCRIPT.parents[1]
    command = [sys.executable, str(root / "benchmarks" / "soak.py"), "--size", "tiny", "--compare"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "soak.json")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bit-identical to the undisturbed run: True" in done.stdout
    assert (tmp_path / "soak.json").stat().st_size > 0
