"""Running means of loss and margin, per class and over all."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMeans:
    """Exponential moving averages of loss and margin, per class and over all, updated once per optimizer step.

    A class's average moves by ``1 - decay^k`` for k samples and starts as a plain mean, so that early values are not
    drawn toward zero.

    Attributes:
        class_loss: ``[C]``.
        class_margin: ``[C]``.
        seen: ``[C]`` samples so far.
        mean_loss: ``[]``.
    """

    def __init__(self, num_classes: int, *, decay: float = 0.99, device: torch.device, dtype: torch.dtype) -> None:
        self.decay = decay
        self.class_loss = torch.zeros(num_classes, device=device, dtype=dtype)
        self.class_margin = torch.zeros_like(self.class_loss)
        self.seen = torch.zeros_like(self.class_loss)
        self.mean_loss = torch.zeros((), device=device, dtype=dtype)

    @torch.no_grad()
    def update(self, loss: Tensor, margin: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Take in the samples of one optimizer step: loss, margin, labels and which of them count (0 or 1), ``[N]`` each."""
        weight = torch.ones_like(loss) if weight is None else weight
        loss, margin = (torch.where(weight > 0, x, 0) for x in (loss, margin))
        new = torch.zeros_like(self.seen).index_add_(0, labels, weight)
        divisor = new.clamp_min(1)
        rate = torch.maximum(1 - self.decay**new, new / (self.seen + divisor))  # 0 for a class without samples
        for average, values in ((self.class_loss, loss), (self.class_margin, margin)):
            mean = torch.zeros_like(average).index_add_(0, labels, values) / divisor
            average += rate * (mean - average)
        total = weight.sum()
        rate = torch.maximum(1 - self.decay**total, total / (self.seen.sum() + total).clamp_min(1))
        self.mean_loss += rate * (loss.sum() / total.clamp_min(1) - self.mean_loss)
        self.seen += new

    def state_dict(self) -> dict[str, Tensor]:
        """The four tensors."""
        return {key: getattr(self, key) for key in ("class_loss", "class_margin", "seen", "mean_loss")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the four tensors in."""
        for key, value in self.state_dict().items():
            value.copy_(state[key])
