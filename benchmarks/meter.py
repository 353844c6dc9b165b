"""Measuring time and memory: interleaved repetitions, and the peak of what is allocated."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class PeakMemory(TorchDispatchMode):
    """Peak of the bytes in tensors that were made inside the block: the allocator's figure on a GPU; on a CPU the sum over
    the storages alive, followed operation by operation (what a kernel allocates for itself is not seen)."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.cuda = device.startswith("cuda")
        self.now = self.highest = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if id(storage) not in self._known:
                    size = storage.nbytes()
                    self._known[id(storage)] = weakref.finalize(storage, self._freed, id(storage), size)
                    self.now += size
        self.highest = max(self.highest, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size

    def __enter__(self) -> PeakMemory:
        if not self.cuda:
            return super().__enter__()
        gc.collect()
        torch.cuda.empty_cache()
        self.base = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.cuda:
            super().__exit__(*error)

    def reset(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        self.highest = self.now
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> int:
        """Bytes, since the last reset."""
        return torch.cuda.max_memory_allocated() - self.base if self.cuda else self.highest


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, as a GPU's allocator does. Otherwise the C library hands large tensors back to the
    system and faults their pages in again, which is a fifth of a step's time on a CPU and comes and goes with the sizes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim, top_pad, mmap_threshold = -1, -2, -3
    return all([mallopt(mmap_threshold, 2**30), mallopt(trim, -1), mallopt(top_pad, 2**28)])


def seconds(run: Callable[[], Any], device: str) -> float:
    """How long a call takes, with the work it leaves on the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    runs: dict[str, Callable[[], Any]], repetitions: int, device: str, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of every call, taken in turns, so that a busy moment of the machine meets all of them; one round is
    thrown away. ``warm``: each call is made once more just before, so that it does not pay for what the one before it left
    in the caches."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repetitions + 1):
        for name, run in runs.items():
            if warm:
                run()
            taken = seconds(run, device)
            if round_:
                found[name].append(taken)
        print(f"\r  round {round_}/{repetitions}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def ratio(times: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Median, and quartiles, of the ratios to the reference of the same round."""
    ratios = np.array(times) / np.array(reference)
    return tuple(round(float(np.quantile(ratios, q)), 3) for q in (0.5, 0.25, 0.75))  # type: ignore[return-value]


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    cuda = device.startswith("cuda")
    return {
        # Folders of this machine mean nothing elsewhere.
        "command": " ".join(["python", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv)]),
        "machine": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(path: Path | None, result: dict[str, Any]) -> None:
    """As JSON, one row a line."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
        head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)[:-2]
        path.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n')


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row.get(name) for name in columns]
        lines.append(
            "| " + " | ".join("" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )
    return "\n".join(lines)
