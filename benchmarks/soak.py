"""A long run with checkpoints that is killed: what grows, what slows down, and whether it ends as it should.

    python benchmarks/soak.py --size gpu --json benchmarks/results/soak_gpu.json
    python benchmarks/soak.py --size cpu --compare --json benchmarks/results/soak_cpu.json
    python benchmarks/soak.py --size tiny --kills 100 --json benchmarks/results/soak_kills.json

A DistilBERT in the Hugging Face Trainer on synthetic comments of which some are trusted rows, bfloat16 autocast on a GPU. The run is
killed with SIGKILL after a random share of its steps and started again from ``last_complete_checkpoint``. Every so many steps memory
in use, the process's own memory, tensors alive, hooks and the time of a step are noted. With --compare an undisturbed run comes
first, and the parameters at the end are compared bit for bit (on a CPU; GPU kernels do not add in a fixed order).

With --kills short runs are killed at random moments, be it while a checkpoint is written, a few times each until so many kills have been
made; parameters and everything in the state file (histories, weights of rows, Omega, statistics) are compared with an undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from meter import environment, table, write
from safetensors.torch import load_file
from tqdm import tqdm

from iada_plugin.integrations.checkpoint import STATE_FILE

SIZES = {
    "cpu": {"steps": 5000, "batch": 8, "length": 32, "rows": 1000, "save": 500,
            "model": {"vocab_size": 500, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}},
    "gpu": {"steps": 3000, "batch": 32, "length": 128, "rows": 8000, "save": 500, "model": {"n_layers": 6}},
    "tiny": {"steps": 60, "batch": 4, "length": 8, "rows": 60, "save": 10,
             "model": {"vocab_size": 500, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}},
}  # fmt: skip


def train(size: dict[str, Any], folder: Path) -> None:
    """The run, from its last complete checkpoint on."""
    from datasets import Dataset
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from iada_plugin import IADAConfig, MetaIADACallback, last_complete_checkpoint, with_trusted

    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(DistilBertConfig(num_labels=2, **size["model"]))

    def rows(n: int, wrong: float) -> Dataset:
        y = torch.randint(0, 2, (n,), generator=generator)
        ids = torch.randint(100, model.config.vocab_size, (n, size["length"]), generator=generator)
        marks = torch.randint(0, 50, ids.shape, generator=generator) + 50 * y[:, None]
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, marks, ids)
        y = torch.where(torch.rand(n, generator=generator) < wrong, 1 - y, y)
        return Dataset.from_dict({"input_ids": ids.tolist(), "labels": y.tolist()}).with_format("torch")

    train_set, clean = rows(size["rows"], 0.3), rows(64, 0.0)

    class Watch(TrainerCallback):
        """Notes what is in use; prints the steps for who watches."""

        since = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print("step", state.global_step, flush=True)
            every = max(1, size["steps"] // 30)
            if state.global_step % every == 0:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = (time.perf_counter() - self.since) / every
                gc.collect()
                tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
                memory = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
                hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in kwargs["model"].modules())
                note = {"step": state.global_step, "seconds": seconds, "process MB": memory / 2**20,
                        "tensors": len(tensors), "hooks": hooks,
                        "device MB": torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0}  # fmt: skip
                with open(folder / "trace.jsonl", "a") as file:
                    file.write(json.dumps(note) + "\n")
                self.since = time.perf_counter()

    gpu = torch.cuda.is_available()
    options = {} if gpu else {"use_cpu": True}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=size["batch"], max_steps=size["steps"], save_steps=size["save"],
        save_total_limit=2, logging_steps=max(1, size["steps"] // 30), report_to=[], learning_rate=5e-5 if gpu else 1e-3,
        bf16=gpu, disable_tqdm=True, **options,
    )  # fmt: skip
    epochs = size["steps"] * size["batch"] / size["rows"]
    train_set, trusted = with_trusted(train_set, clean)
    callback = MetaIADACallback(trusted_rows=trusted, config=IADAConfig(warmup_epochs=0.3 * epochs))
    trainer = Trainer(model=model, args=arguments, train_dataset=train_set, callbacks=[callback, Watch()])
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    torch.save({k: v.cpu() for k, v in model.state_dict().items()}, folder / "final.pt")
    logs = [log for log in trainer.state.log_history if "iada/meta_loss" in log]
    (folder / "logs.json").write_text(json.dumps(logs))


def watched(arguments: list[str], folder: Path, kill_at: int | None) -> int:
    """Run in a process of its own; killed when it has said that it is there. Returns its last step."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *arguments, "--folder", str(folder)]
    last = 0
    with (
        open(folder / "errors.log", "a") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        for line in process.stdout or []:
            if line.startswith("step "):
                last = int(line.split()[1])
                if last == kill_at:
                    process.send_signal(signal.SIGKILL)
    if kill_at is None and process.returncode:
        raise RuntimeError(f"the run failed: {(folder / 'errors.log').read_text()[-3000:]}")
    return last


def kills(size: dict[str, Any], folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Runs that are killed at random moments, ``number`` times in all, against an undisturbed one."""
    context = multiprocessing.get_context("forkserver")  # a process begins with everything imported
    context.set_forkserver_preload(
        ["torch", "transformers", "datasets", "iada_plugin", "iada_plugin.integrations.trainer"]
    )

    def run(name: str, seconds: float | None) -> bool:
        """Whether the run came to its end within so many seconds."""
        (folder / name).mkdir(parents=True, exist_ok=True)
        process = context.Process(target=_quietly, args=(size, folder / name))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return False
        if process.exitcode:
            raise RuntimeError(f"the run failed: {(folder / name / 'errors.log').read_text()[-3000:]}")
        return True

    run("first", None)  # starts the server
    begun = time.perf_counter()
    run("whole", None)
    whole, wanted = time.perf_counter() - begun, _end(folder / "whole", size)
    moments = random.Random(seed)
    made, rows = 0, []
    with tqdm(total=number, unit="kill") as bar:
        while made < number:
            name, before = f"run {len(rows)}", made
            while made < number and made - before < 5 and not run(name, moments.uniform(0.02, 0.9) * whole):
                made += 1
                bar.update()
            run(name, None)
            found = _end(folder / name, size)
            same = found.keys() == wanted.keys() and all(torch.equal(found[k], v) for k, v in wanted.items())
            rows.append({"run": len(rows), "kills": made - before, "bit_identical": same})
    return {"kills": made, "tensors": len(wanted), "seconds_of_a_run": whole, "rows": rows}


def _quietly(size: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    with (
        open(folder / "errors.log", "a") as errors,
        contextlib.redirect_stdout(errors),
        contextlib.redirect_stderr(errors),
    ):
        train(size, folder)


def _end(folder: Path, size: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters and state at the end of a run."""
    state = load_file(folder / f"checkpoint-{size['steps']}" / STATE_FILE)
    return {**torch.load(folder / "final.pt", weights_only=True), **{f"state: {k}": v for k, v in state.items()}}


def growth(notes: list[dict[str, float]], key: str, steps: int) -> tuple[float, float]:
    """Median in the first and the last third of the time after the warm-up."""
    late = [n for n in notes if n["step"] > 0.4 * steps]
    first, last = late[: max(1, len(late) // 3)], late[-max(1, len(late) // 3) :]
    return statistics.median(n[key] for n in first), statistics.median(n[key] for n in last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the moment of the kill")
    parser.add_argument("--compare", action="store_true", help="against an undisturbed run")
    parser.add_argument("--kills", type=int, metavar="N", help="kill short runs N times in all, at random moments")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--work", type=Path, help="folder of the runs, which stay there (default: a temporary one)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.folder is not None:
        return train(size, args.folder)

    with tempfile.TemporaryDirectory() as temporary:
        result: dict[str, Any]
        folder, start = args.work or Path(temporary), time.perf_counter()
        if args.kills:
            result = {
                "environment": environment("cpu"),
                "seed": args.seed,
                "size": size,
                **kills(size, folder, args.kills, args.seed),
            }
            same = sum(row["bit_identical"] for row in result["rows"])
            print(f"{result['kills']} kills in {len(result['rows'])} runs; as the undisturbed one, bit for bit: {same}")
            return write(args.json, result)
        own = ["--size", args.size]
        if args.compare:
            watched(own, folder / "whole", None)
        steps = size["steps"]
        kill_at = random.Random(args.seed).randrange(steps // 2, steps)
        print(f"to be killed after step {kill_at} of {steps}")
        watched(own, folder / "killed", kill_at)
        begun = time.perf_counter()
        watched(own, folder / "killed", None)
        notes = [json.loads(line) for line in (folder / "killed" / "trace.jsonl").read_text().splitlines()]
        # What was trained before the kill and not saved is there twice; a process's first note holds its start.
        resumed = next((k for k in range(1, len(notes)) if notes[k]["step"] <= notes[k - 1]["step"]), len(notes) - 1)
        before = notes[1:resumed]
        logs = json.loads((folder / "killed" / "logs.json").read_text())
        import transformers

        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = {
            "environment": {**environment(device), "transformers": transformers.__version__},
            "seed": args.seed,
            "size": size,
            "killed_after": kill_at,
            "meta_loss": [log["iada/meta_loss"] for log in logs],
            "skipped": max(log.get("iada/skipped_steps", 0.0) for log in logs),
            "seconds": time.perf_counter() - start,
            "seconds_resumed": time.perf_counter() - begun,
            "rows": notes,
        }
        keys = ("seconds", "process MB", "device MB", "tensors", "hooks")
        result["growth"] = {k: growth(before, k, steps) for k in keys}
        if args.compare:
            one, two = (torch.load(folder / name / "final.pt", weights_only=True) for name in ("whole", "killed"))
            result["bit_identical"] = all(torch.equal(one[k], two[k]) for k in one)
    rows = [{"what": k, "first": a, "last": b} for k, (a, b) in result["growth"].items()]
    names = {"what": "median after the warm-up", "first": "first third", "last": "last third before the kill"}
    print(table(rows, names))
    first, last = result["meta_loss"][0], result["meta_loss"][-1]
    print(f"meta loss {first:.3f} -> {last:.3f}; meta steps left out: {result['skipped']:.0f}", end="")
    print(f"; bit-identical to the undisturbed run: {result['bit_identical']}" if args.compare else "")
    write(args.json, result)


if __name__ == "__main__":
    main()
