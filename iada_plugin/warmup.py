"""How long a run trains without perturbation."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .config import IADAConfig
from .runtime.checks import is_number

#: A warm-up whose end is not known yet.
OPEN = 2**62


class WarmUp:
    """The plan of a run. Without a length in the settings the warm-up is open, until :meth:`end_after` sets its end.

    Args:
        config: settings.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: length of the run, or ``None``.

    Attributes:
        steps: the first optimizer step with augmentation.
        statistics_start: the first one whose samples enter the class statistics, one epoch earlier: features of the first epochs
            are stale.

    Raises:
        ValueError: a length that is no positive number, or no step with augmentation is left.
    """

    def __init__(self, config: IADAConfig, steps_per_epoch: int, epochs: float | None) -> None:
        if not is_number(steps_per_epoch) or steps_per_epoch < 1 or steps_per_epoch % 1:
            raise ValueError(
                f"steps_per_epoch={steps_per_epoch!r} must be a whole number >= 1: the optimizer steps in an epoch."
            )
        if epochs is not None and (not is_number(epochs) or epochs <= 0):
            raise ValueError(f"epochs={epochs!r} must be a positive number, the length of the run, or None.")
        self.total = total = None if epochs is None else round(epochs * steps_per_epoch)
        if config.warmup_epochs is None and config.warmup_ratio is None:
            self.steps = self.statistics_start = OPEN
            self.steps_per_epoch = int(steps_per_epoch)
            return
        if config.warmup_epochs is not None:
            self.steps = round(config.warmup_epochs * steps_per_epoch)
        elif total is not None:
            self.steps = round(config.warmup_ratio * total)  # type: ignore[operator]
        else:
            self.steps = int(steps_per_epoch)
            warnings.warn(
                "MetaIADA does not know how long the run is: the warm-up is one epoch, instead of warmup_ratio of the run. Pass"
                " epochs=..., or IADAConfig(warmup_epochs=...), to choose it."
            )
        self.steps_per_epoch = int(steps_per_epoch)
        epochs_set = config.warmup_epochs is not None
        setting = f"warmup_epochs (={config.warmup_epochs})" if epochs_set else f"warmup_ratio (={config.warmup_ratio})"
        if total is not None and self.steps >= total:
            streamed = epochs_set and self.steps_per_epoch >= total
            way_out = (
                "set warmup_ratio instead, such as 0.5: an epoch is the whole run here (as that of streamed data of unknown length is taken"
                " to be)"
                if streamed
                else f"lower {setting}, or train longer"
            )
            raise ValueError(
                f"the warm-up of {self.steps} steps leaves no meta step in a run of {total} steps: {way_out}."
            )
        self.statistics_start = max(0, self.steps - int(steps_per_epoch))

    @property
    def open(self) -> bool:
        """Whether the end is not known yet."""
        return self.steps == OPEN

    def phase(self, step: int, learns: bool) -> str:
        """What ``step`` trains with and waits for, in words, where perturbations are learned or not."""
        if not learns:
            return "no perturbations in this run"
        if step >= self.steps:
            return f"perturbations, since step {self.steps}"
        if step >= self.statistics_start:
            return f"class statistics are collected, perturbations from step {self.steps} on"
        if self.open:
            return "no perturbations before the learning rate has fallen to a quarter and the kept rows are fitted"
        return f"warm-up, perturbations from step {self.steps} on"

    def end_after(self, step: int) -> None:
        """Collect statistics for one epoch from ``step`` on; then the warm-up is over."""
        self.statistics_start, self.steps = step, step + self.steps_per_epoch

    def postpone(self, step: int) -> None:
        """Collect statistics from ``step`` on, in a run that had none before.

        Raises:
            ValueError: no step with augmentation is left.
        """
        if self.open:
            return
        span = self.steps - self.statistics_start
        start = max(self.statistics_start, step)
        steps = max(self.steps, start + span)
        if self.total is not None and steps >= self.total:
            raise ValueError(
                f"starting afresh at step {step} of {self.total}: collecting class statistics takes {span} steps, after which no"
                " meta step is left. Train longer."
            )
        self.statistics_start, self.steps = start, steps

    def state_dict(self) -> dict[str, Tensor]:
        """A longer run goes on with the warm-up it began with."""
        return {"plan": torch.tensor([self.steps, self.statistics_start])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.steps, self.statistics_start = state["plan"].tolist()
