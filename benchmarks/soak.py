"""A long run with checkpoints that is killed once: what grows, what slows down, and whether it ends as it should.

    python benchmarks/soak.py --size gpu --json benchmarks/results/soak_gpu.json
    python benchmarks/soak.py --size cpu --compare --json benchmarks/results/soak_cpu.json

A DistilBERT in the Hugging Face Trainer on synthetic comments, bfloat16 autocast on a GPU. The run is killed with SIGKILL
after a random share of its steps and started again from ``last_complete_checkpoint``. Every so many steps memory in use,
the process's own memory, tensors alive, hooks and the time of a step are noted. With --compare an undisturbed run comes
first, and the parameters at the end are compared bit for bit (on a CPU; GPU kernels do not add in a fixed order).
"""

from __future__ import annotations

import argparse
import gc
import json
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

SIZES = {
    "cpu": {"steps": 600, "batch": 8, "length": 32, "rows": 1000, "save": 100,
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

    from iada_plugin import IADAConfig, MetaIADACallback, last_complete_checkpoint

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

    train_set, meta_set = rows(size["rows"], 0.3), rows(64, 0.0)

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
    callback = MetaIADACallback(meta_set, IADAConfig(warmup_epochs=0.3 * epochs))
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
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--work", type=Path, help="folder of the runs, which stay there (default: a temporary one)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.folder is not None:
        return train(size, args.folder)

    with tempfile.TemporaryDirectory() as temporary:
        folder, start = args.work or Path(temporary), time.perf_counter()
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
        result: dict[str, Any] = {
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
