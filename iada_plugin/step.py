"""`Step`: everything that is true of one optimizer step, and nothing that outlives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from .meta.tangents import Probe
from .runtime.capture import Forward
from .runtime.processes import gather_rows

#: What is known of the samples of a micro-batch, one row each: ``labels`` always; from the time on that statistics are
#: collected ``features`` [N, H], ``f`` [N, K], ``loss``, ``margin``, and in the end which of them are ``good``, finite (1 or 0); after
#: the warm-up ``epsilon``; with trusted rows, from the first step on, ``row`` and ``row_margin``.
Columns = dict[str, Tensor]


class Part(Protocol):
    """What has a state that outlives a step, and learns from each step when it is over."""

    def commit(self, step: Step, samples: Columns) -> None:
        """Learn from ``step``, whose micro-batches, of all processes, are ``samples``."""


class Step:
    """One optimizer step, from its first forward pass to ``optimizer.step()``.

    It ends in one of two ways: :meth:`commit`, when the optimizer has made its step, hands what was seen to the parts that
    keep it; :meth:`abandon`, when something raised, puts back the little that had to change before (perturbation network,
    covariances). Either way it is thrown away then.

    Args:
        number: optimizer steps before it.

    Attributes:
        forward: the training pass of which no loss was taken yet.
        batches: micro-batches so far.
        seen: each observer with what it saw of a micro-batch, on this process.
        probe: what an online schedule found out before the training pass.
        meta: meta loss ``[]`` and whether all was finite ``[]``, once the meta step was made.
        average, gradient_fine: the running average of the meta gradient with this step's in it, one tensor a parameter, and
            whether this step's was finite ``[]``.
        left_out: the meta step failed and is not tried again.
        augmented: the IADA loss was taken.
        half: the pass ran under float16 autocast.
        backward: a backward pass went through its loss.
        inner: calls of ``step()`` so far, where one optimizer step takes several (DeepSpeed's groups).
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.forward: Forward | None = None
        self.batches: list[Columns] = []
        self.seen: list[list[tuple[Any, Any]]] = []
        self.probe: Probe | None = None
        self.meta: tuple[Tensor, Tensor] | None = None
        self.average: list[Tensor] | None = None
        self.gradient_fine: Tensor | None = None
        self.left_out = self.augmented = self.half = self.backward = False
        self.inner = 0
        self._undo: list[Callable[[], None]] = []

    @property
    def begun(self) -> bool:
        """Whether a micro-batch was seen."""
        return bool(self.batches)

    @property
    def meta_done(self) -> bool:
        """Whether the meta step was made, or left out."""
        return self.meta is not None or self.left_out

    def on_abandon(self, undo: Callable[[], None]) -> None:
        """``undo`` puts back what is about to be changed."""
        self._undo.append(undo)

    def add(self, samples: Columns, seen: list[tuple[Any, Any]] | None = None) -> None:
        """A micro-batch; of no ``samples`` there is nothing to learn."""
        if samples:
            self.batches.append(samples)
            self.seen.append(seen or [])

    def leave_meta_out(self) -> None:
        """Take the meta step back, and do not try it again."""
        self.abandon()
        self.probe = self.average = self.meta = None
        self.left_out = True

    def abandon(self) -> None:
        """Leave everything as it was before the step."""
        while self._undo:
            self._undo.pop()()

    def commit(self, parts: Iterable[Part]) -> None:
        """Hand what was seen to the parts, in their order."""
        self._undo.clear()
        samples = self._of_all_processes()
        for part in parts:
            part.commit(self, samples)

    def _of_all_processes(self) -> Columns:
        if not self.batches:
            return {}
        names = list(self.batches[0])
        columns = [torch.cat([batch[name] for batch in self.batches]) for name in names]
        found = dict(zip(names, gather_rows(*columns), strict=True))
        if "f" in found:
            # A NaN or Inf must not stay in a running average. (Weights, because picking rows would wait for the device.)
            values = [found[name].reshape(len(found["f"]), -1) for name in ("features", "f", "loss", "margin")]
            found["good"] = torch.isfinite(torch.cat(values, dim=1)).all(dim=1).to(found["f"].dtype)
        return found
