"""What trusted rows cost: the gate in each step, a recorder of margins in a plain one, and the histories and the gate's refresh by
the number of training rows.

    python benchmarks/trusted_cost.py --size cpu --json benchmarks/results/trusted_cost_cpu.json

The models of benchmarks/step_cost.py, in turns with a plain cross-entropy step; ratios are medians over rounds. No meta step: what
perturbations cost after the warm-up is measured there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from meter import environment, interleaved, keep_freed_memory, ratio, seconds, table, write
from step_cost import WORKLOADS, Options, Setting, Workload, make_step
from torch import Tensor
from torch.utils.data import Dataset

from iada_plugin import IADAConfig, MarginRecorder, MetaIADA
from iada_plugin.perturbation.reference import TrustedReference

#: Rows of the training set whose histories are followed.
ROWS = [100_000, 1_000_000, 10_000_000]
TRUSTED = 500


class Repeated(Dataset):
    """So many rows, of one batch's samples over and over."""

    def __init__(self, batch: tuple[Tensor, Tensor], rows: int) -> None:
        self.x, self.targets = batch[0], batch[1][torch.arange(rows) % len(batch[1])]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row % len(self.x)], self.targets[row]


def gated_step(work: Workload, device: str, rows: int = 50_000) -> Callable[[], None]:
    """A training step with the gate at work."""
    torch.manual_seed(0)
    model = work.network(0.1).to(device).train()
    optimizer = work.optimizer(model)
    x, y = work.batch(work.batch_size, 0, device)
    train_set = Repeated((x.cpu(), y.cpu()), rows)
    iada = MetaIADA(
        model, optimizer, train_set=train_set, trusted_rows=range(TRUSTED), steps_per_epoch=rows // len(y), epochs=100,
        config=IADAConfig(alpha=0, meta_lr=0, covariance_lr=0),
    )  # fmt: skip
    reference = iada.reference
    assert reference is not None
    reference.start = 0  # as after the first epochs
    generator = torch.Generator().manual_seed(0)

    def step() -> None:  # rows of these samples: a trusted row must come with its own label
        ids = (torch.randint(rows // len(y), (len(y),), generator=generator) * len(y) + torch.arange(len(y))).to(device)
        loss = iada(model(x), y, ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def audited_step(work: Workload, device: str, rows: int = 50_000) -> Callable[[], None]:
    """A plain training step, of which the margins are recorded."""
    torch.manual_seed(0)
    model = work.network(0.1).to(device).train()
    optimizer = work.optimizer(model)
    x, y = work.batch(work.batch_size, 0, device)
    recorder, generator = MarginRecorder(rows, device=device), torch.Generator().manual_seed(0)

    def step() -> None:
        ids = torch.randint(rows, (len(y),), generator=generator).to(device)
        output = model(x)
        recorder(output, y, ids)
        loss = F.cross_entropy(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class _Step:
    number = 0


def history_cost(
    rows: int, device: str, batch_size: int = 256, num_classes: int = 1000, num_features: int = 512
) -> dict[str, Any]:
    """Bytes a row, microseconds a step and seconds a refresh for a training set of that size."""
    reference = TrustedReference(
        torch.arange(TRUSTED), rows, gate="auto", level=0.2, steps_per_epoch=2**40, epochs=None, device=torch.device(device),
        num_classes=num_classes, num_features=num_features,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    features, logits, prior = draw(batch_size, num_features), draw(batch_size, num_classes), draw(num_classes)
    labels = torch.randint(num_classes, (batch_size,), generator=generator).to(device)

    def step() -> None:
        ids = torch.randint(rows, (batch_size,), generator=generator).to(device)
        reference.weights(ids)
        reference.commit(_Step(), {**reference.observe(features, logits, prior, labels, ids), "labels": labels})

    times = [seconds(step, device) for _ in range(60)][10:]
    histories = reference.histories
    histories.visits.fill_(5)
    histories.label.copy_(torch.randint(10, (rows,), generator=generator))
    histories.margin.copy_(torch.randn(rows, generator=generator))
    histories.nearness.copy_(torch.randn(rows, generator=generator))  # type: ignore[union-attr]
    reference.prototypes.weight.fill_(1)  # type: ignore[union-attr]

    def refresh() -> None:
        reference.gate.refresh(histories, reference.rows, reference.prototypes.known(histories.label))  # type: ignore[union-attr]

    refreshes = [seconds(refresh, device) for _ in range(3)]
    own = [t for t in reference.state_dict().values() if len(t.shape) and t.shape[0] == rows]
    size = sum(t.nbytes for t in [*own, reference.prototypes._fold])  # type: ignore[union-attr]
    return {
        "rows": rows, "bytes_a_row": size / rows, "microseconds_a_step": round(1e6 * statistics.median(times)),
        "seconds_a_refresh": round(min(refreshes), 3),
    }  # fmt: skip


def measure(size: str, device: str, repetitions: int, steps: int) -> list[dict[str, Any]]:
    """Ratios of the gate's step, then the histories."""
    found: list[dict[str, Any]] = []
    for title, work in WORKLOADS[size].items():
        torch.manual_seed(0)
        plain = make_step(work, Setting(other="plain"), Options(device), work.network(0.1).to(device))
        runs = {"plain": plain, "gate": gated_step(work, device), "audit": audited_step(work, device)}
        for step in runs.values():
            step()
        times = interleaved({k: lambda r=r: [r() for _ in range(steps)] for k, r in runs.items()}, repetitions, device)  # type: ignore[misc]
        middle, low, high = ratio(times["gate"], times["plain"])
        audit = "{:.3f} ({:.3f} to {:.3f})".format(*ratio(times["audit"], times["plain"]))
        found.append({"model": title, "time_ratio": middle, "quartiles": f"{low:.3f} to {high:.3f}", "audit": audit,
                      "plain_milliseconds": round(1e3 * statistics.median(times["plain"]) / steps, 1)})  # fmt: skip
    return found + [history_cost(rows, device) for rows in ROWS]


def render(result: dict[str, Any]) -> str:
    """Two tables."""
    models = [r for r in result["rows"] if "model" in r]
    histories = [r for r in result["rows"] if "rows" in r]
    return "\n\n".join([
        table(models, {"model": "model", "time_ratio": "step with the gate / plain step", "quartiles": "quartiles", "audit": "with a MarginRecorder instead / plain step (quartiles)", "plain_milliseconds": "plain step, ms"}),
        table(histories, {"rows": "training rows", "bytes_a_row": "bytes a row", "microseconds_a_step": "microseconds a step", "seconds_a_refresh": "seconds a refresh, once an epoch"}),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(WORKLOADS), default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="of each model in a round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kept = keep_freed_memory()
    rows = measure(args.size, args.device, args.repetitions, args.steps)
    result = {**environment(args.device), "malloc_keeps_memory": kept, "trusted": TRUSTED, "rows": rows}
    write(args.json, result)
    print(render(result))


if __name__ == "__main__":
    main()
