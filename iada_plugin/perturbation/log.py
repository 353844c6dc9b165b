"""What is logged of epsilon, per class too."""

from __future__ import annotations

import torch
from torch import Tensor


class EpsilonLog:
    """Running sums of what is logged, kept on the device until somebody asks.

    Args:
        num_classes: C; per-class figures are kept for at most ten classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes if num_classes <= 10 else 0
        self._sums: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """All that :meth:`pop` may give."""
        alone = ["iada/epsilon_mean", "iada/epsilon_std", "iada/adversarial_ratio", "iada/meta_loss"]
        return alone + [f"{alone[k]}/{c}" for c in range(self.num_classes) for k in (0, 2)]

    @torch.no_grad()
    def add(self, epsilon: Tensor, labels: Tensor, weight: Tensor) -> None:
        """Count the epsilon ``[N]`` of samples with labels ``[N]``, whose ``weight`` ``[N]`` of 0 and 1 tells which count."""
        epsilon = torch.where(weight > 0, epsilon, 0)
        positive = (epsilon > 0).to(epsilon.dtype)
        self._add("all", torch.stack([weight.sum(), epsilon.sum(), epsilon.square().sum(), positive.sum()]))
        if self.num_classes:
            rows = torch.stack([weight, epsilon, positive], dim=1)
            self._add("classes", rows.new_zeros(self.num_classes, 3).index_add_(0, labels, rows))

    def add_meta_loss(self, loss: Tensor, fine: Tensor) -> None:
        """Count one meta loss, if ``fine`` ``[]``."""
        self._add("meta", torch.where(fine, torch.stack([torch.ones_like(loss), loss]), 0))

    def _add(self, key: str, value: Tensor) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value

    def pop(self) -> dict[str, float]:
        """Averages since the last call."""
        sums, self._sums = self._sums, {}
        metrics: dict[str, float] = {}
        n, total, squares, positive = sums["all"].tolist() if "all" in sums else [0.0] * 4
        if n:
            mean = total / n
            metrics["iada/epsilon_mean"] = mean
            metrics["iada/epsilon_std"] = max(squares / n - mean * mean, 0.0) ** 0.5
            metrics["iada/adversarial_ratio"] = positive / n
        if "meta" in sums:
            count, total = sums["meta"].tolist()
            if count:
                metrics["iada/meta_loss"] = total / count
        for c, (n, total, positive) in enumerate(sums["classes"].tolist() if "classes" in sums else []):
            if n:
                metrics[f"iada/epsilon_mean/{c}"] = total / n
                metrics[f"iada/adversarial_ratio/{c}"] = positive / n
        return metrics
