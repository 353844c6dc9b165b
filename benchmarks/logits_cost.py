"""What the IADA logits cost, against a plain Linear and cross-entropy, and against the form that ISDA published.

    python benchmarks/logits_cost.py --json benchmarks/results/logits_cost_cpu.json
    python benchmarks/logits_cost.py --device cuda --json benchmarks/results/logits_cost_gpu.json

Forward and backward pass of the last layer alone, for N samples, C classes and H features, with epsilon in nats of margin
and the prior. "published" builds w_j - w_y for every sample, [N, C, H], as the code of ISDA and MetaSAug does; it is left
out where that passes --limit GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from meter import PeakMemory, environment, interleaved, keep_freed_memory, ratio, table, write
from torch import Tensor

from iada_plugin.functional import iada_logits
from iada_plugin.functional.covariance import LowRank

SIZES = [(128, 100, 64), (128, 100, 640), (64, 1000, 2048), (64, 8142, 2048)]


def published_logits(h: Tensor, w: Tensor, b: Tensor, y: Tensor, covariance: Tensor, alpha: float) -> Tensor:
    """The variance term over all pairs of sample and class: ``[N, C, H]`` (and ``[N, H, H]`` for full covariances)."""
    difference = w[None] - w[y][:, None]  # [N, C, H]
    if covariance.dim() == 3:
        rho = ((difference @ covariance[y]) * difference).sum(2)
    else:
        rho = (difference.square() * covariance[y][:, None]).sum(2)
    return F.linear(h, w, b) + 0.5 * alpha * rho


def problem(n: int, c: int, hidden: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    return {
        "h": draw(n, hidden).relu_().requires_grad_(),
        "w": (draw(c, hidden) / hidden**0.5).requires_grad_(),
        "b": draw(c).requires_grad_(),
        "y": torch.randint(0, c, (n,), generator=generator).to(device),
        "epsilon": draw(n).tanh_(),
        "log_prior": draw(c).log_softmax(0),
    }


def forms(p: dict[str, Tensor], rank: int, limit: float) -> dict[str, Any]:
    """Name to a function that takes one forward and backward pass."""
    (n, hidden), c = p["h"].shape, p["w"].shape[0]
    device = p["h"].device
    diagonal = torch.rand(c, hidden, device=device)
    leaves = [p["h"], p["w"], p["b"]]

    def step(logits: Any) -> Any:
        return lambda: torch.autograd.grad(F.cross_entropy(logits(), p["y"]), leaves)

    def iada(covariance: Any) -> Any:
        return step(lambda: iada_logits(*leaves, p["y"], p["epsilon"], covariance, p["log_prior"],
                                        fixed_shift=True, in_margin=True))  # fmt: skip

    found = {
        "Linear + CE": step(lambda: F.linear(*leaves)),
        "IADA, no covariance": iada(None),
        "IADA, diagonal": iada(diagonal),
    }
    found[f"IADA, low rank {rank}"] = iada(LowRank(diagonal, torch.randn(c, hidden, rank, device=device) / hidden**0.5))
    fits = 4 * c * hidden**2 <= 256 * 2**20
    if fits:
        full = torch.eye(hidden, device=device).expand(c, -1, -1) + 0.1
        found["IADA, full"] = iada(full.contiguous())
        if 4 * n * (hidden**2 + 2 * c * hidden) <= limit * 2**30:
            found["published, full"] = step(lambda: published_logits(*leaves, p["y"], full, 0.5))
    if 3 * 4 * n * c * hidden <= limit * 2**30:
        found["published, diagonal"] = step(lambda: published_logits(*leaves, p["y"], diagonal, 0.5))
    return found


def render(result: dict[str, Any]) -> str:
    """Markdown."""
    return table(result["rows"], {"N": "N", "C": "C", "H": "H", "form": "form", "milliseconds": "ms", "time_ratio": "time",
                                  "megabytes": "MB", "memory_ratio": "memory"})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=8, help="of the low-rank covariances")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--limit", type=float, default=8.0, help="GB that the published form may take")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    for n, c, hidden in SIZES:
        p = problem(n, c, hidden, args.device)
        runs = forms(p, args.rank, args.limit)
        times = interleaved(runs, args.repetitions, args.device, warm=True)
        peaks = {}
        for name, run in runs.items():
            with PeakMemory(args.device) as memory:
                memory.reset()
                run()
                peaks[name] = memory.peak
        reference = times["Linear + CE"]
        for name in runs:
            middle, low, high = ratio(times[name], reference)
            rows.append({"N": n, "C": c, "H": hidden, "form": name, "milliseconds": round(1e3 * sorted(times[name])[len(times[name]) // 2], 2),
                         "time_ratio": middle, "time_quartiles": [low, high], "megabytes": round(peaks[name] / 1e6, 2),
                         "memory_ratio": round(peaks[name] / peaks["Linear + CE"], 2)})  # fmt: skip
    result = {**environment(args.device), "rows": rows}
    write(args.json, result)
    print(render(result))


if __name__ == "__main__":
    main()
