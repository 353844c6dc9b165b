"""What happens when a meta step fails. All of the policy is here:

=============================  ==================================================================================
retried                        what raises in a training step: the step is thrown away (`iada_plugin.step.Step`), and
                               the next call begins it anew with the same meta batch
left out, and counted          with ``on_failure="skip"``: a meta step in which something is not finite; in a single process,
                               from the second one on, also one that runs out of memory or whose ``meta_loader`` raises
raised                         everything with ``on_failure="stop"``; whatever fails in the first meta step, behind which
                               there is rather a mistake; among several processes, which would wait for each other;
                               the hundredth in a row that is left out
=============================  ==================================================================================
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .processes import world_size

#: A run whose meta steps are left out so many times in a row is stopped.
PATIENCE = 100


class MetaLoaderError(RuntimeError):
    """The user's ``meta_loader`` raised."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    signs = ("out of memory", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in signs))


class Failures:
    """Counts the meta steps that are left out, and decides which ones may be.

    Args:
        on_failure: "skip" or "stop".
        device: of the counts, which stay there until somebody asks.
    """

    def __init__(self, on_failure: str, device: torch.device) -> None:
        self.on_failure = on_failure
        self._counts = torch.zeros(2, dtype=torch.long, device=device)  # in all, and since the last one that was made
        self._reported = 0
        self._succeeded = False

    @property
    def skipped(self) -> int:
        """Meta steps left out so far."""
        return int(self._counts[0])

    def state_dict(self) -> dict[str, Tensor]:
        """``skipped``, ``[]``."""
        return {"skipped": self._counts[0]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on counting from there; what was counted then is not warned of again."""
        count = state["skipped"].to(self._counts)
        self._counts = torch.stack([count, torch.zeros_like(count)])
        self._reported = int(count)

    @contextmanager
    def survived(self, undo: Callable[[], None]) -> Iterator[None]:
        """Around a meta step: an error from outside costs this one only, where the policy says so.

        Args:
            undo: takes back what the block had changed.
        """
        try:
            yield
            return
        except Exception as error:
            outside = isinstance(error, MetaLoaderError) or is_out_of_memory(error)
            if not outside or not self._succeeded or self.on_failure == "stop" or world_size() > 1:
                raise
            undo()
            warnings.warn(f"a meta step failed and is left out: {type(error).__name__}: {error}")
            traceback.clear_frames(error.__traceback__)  # they hold what there was no memory for
        if self._counts.device.type == "cuda":
            torch.cuda.empty_cache()
        self._count(torch.zeros((), dtype=torch.bool, device=self._counts.device))
        self.check(warned=True)

    def made(self, fine: Tensor) -> None:
        """A meta step went through; it is left out unless ``fine`` ``[]``. Nobody has to wait for that."""
        self._succeeded = True
        self._count(fine)

    def _count(self, fine: Tensor) -> None:
        total, row = self._counts + ~fine
        self._counts = torch.stack([total, torch.where(fine, 0, row)])

    def check(self, warned: bool = False) -> int:
        """:attr:`skipped`; warns of the first one, unless somebody has ``warned``.

        Raises:
            RuntimeError: there is a new one and ``on_failure="stop"``, or there were too many in a row.
        """
        (count, row), before = self._counts.tolist(), self._reported
        if count > before:
            what = "something in the meta step is not finite (the meta loss, its gradient, or the training batch)"
            hint = "Look for NaN in the inputs of the training and meta set, or lower virtual_lr"
            if self.on_failure == "stop":
                raise RuntimeError(
                    f"{what}, and on_failure='stop'. {hint}; on_failure='skip' would go on without this meta step."
                )
            if row >= PATIENCE:
                raise RuntimeError(
                    f"{row} meta steps in a row were left out, so that this run learns nothing: {what}. {hint}."
                )
            if before == 0 and not warned:
                warnings.warn(f"{what}: this meta step is left out, and counted as iada/skipped_steps. {hint}.")
        self._reported = count
        return int(count)

    def snapshot(self) -> Callable[[], None]:
        """What puts the counts back as they are now."""
        kept: tuple[Any, ...] = (self._counts, self._reported, self._succeeded)

        def undo() -> None:
            self._counts, self._reported, self._succeeded = kept

        return undo
