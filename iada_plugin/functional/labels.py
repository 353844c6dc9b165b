"""Labels as class indices, or a clear error."""

from __future__ import annotations

import torch
from torch import Tensor


def is_soft(target: Tensor, output: Tensor) -> bool:
    """Whether targets are class probabilities, as mixup gives them."""
    return target.is_floating_point() and target.shape == output.shape


def hard_labels(target: Tensor, smoothing: float) -> Tensor | None:
    """The class indices ``[N]`` of one-hot targets ``[N, C]``, smoothed by ``smoothing``; ``None`` where they are anything else.
    timm's mixup gives such ones once it is switched off."""
    labels = target.argmax(dim=1)
    expected = torch.full_like(target, smoothing / target.shape[1])
    expected.scatter_(1, labels[:, None], 1 - smoothing + smoothing / target.shape[1])
    return labels if torch.allclose(target, expected, rtol=0, atol=2e-3) else None


def smoothing_of(target: Tensor) -> float | None:
    """By how much soft targets ``[N, C]`` of one class each, or of two that are mixed, are smoothed; ``None`` where it does not show."""
    least, num_classes = target.min(), target.shape[1]
    classes = int((target > least + 1e-3).sum(dim=1).max())
    return None if classes > min(2, num_classes - 1) else round(float(least) * num_classes, 2)


def check_labels(labels: Tensor, n: int, num_classes: int, *, always: bool) -> None:
    """Labels are ``[n]`` class indices below ``num_classes``.

    On an accelerator reading their range costs a wait: it is done where ``always`` is set, else the indexing by labels
    asserts it on the device.

    Raises:
        ValueError: naming what is wrong.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: IADA needs class indices, one per sample: labels.long() where they are whole"
                         " numbers, labels.argmax(1) where they are one-hot.")  # fmt: skip
    if labels.dim() != 1 or labels.shape[0] != n:
        raise ValueError(f"labels have shape {list(labels.shape)}: IADA needs class indices [N], one per sample"
                         " (squeeze(1) a column; argmax(1) one-hot rows; give a loader of batches, not of samples).")  # fmt: skip
    if n == 0:
        raise ValueError("a batch has no sample.")
    if labels.device.type == "cpu" or always:
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if wrong.numel():
            raise ValueError(
                f"label {int(wrong[0])} is out of range: the classifier has {num_classes} classes,"
                f" 0 to {num_classes - 1}."
            )


def class_indices(labels: Tensor | None, n: int | None, num_classes: int) -> Tensor:
    """The labels as int64. Their values are looked at on a CPU only, and not in a compiled function.

    Raises:
        ValueError: labels that are no class indices ``[n]``, or of any length where ``n`` is ``None``.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels={labels!r:.40}: IADA needs a tensor [N] of class indices.")
    if not torch.compiler.is_compiling():
        check_labels(labels, labels.numel() if n is None else n, num_classes, always=False)
    return labels.long()
