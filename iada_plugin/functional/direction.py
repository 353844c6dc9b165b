"""Where a perturbation of a sample's features goes, and how far one unit of it is."""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import class_indices


def _toward_others(logits: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``sum_{j != y} p_j / (1 - p_y) w_j - w_y``, ``[N, H]``: how the others' lead over the own class grows with h.

    The gradient of the cross-entropy is ``1 - p_y`` times this. ``p - e_y`` itself would cancel to nothing in float32 for
    a sample that is certain (from a margin of about 13 nats on).
    """
    others = logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)
    return others @ weight - weight[labels]


@torch.no_grad()
def perturbation_direction(logits: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sign of the gradient of the cross-entropy with respect to the features: ``sign(W^T (p - e_y))``.

    Closed form, so no backward pass; constant under differentiation, as a sign is.

    Args:
        logits: ``[N, C]`` plain logits ``W h + b``.
        weight: ``[C, H]``.
        labels: ``[N]`` class indices.

    Returns:
        ``[N, H]`` of -1, 0 and 1.
    """
    return _toward_others(logits, weight, class_indices(labels, len(logits), len(weight))).sign_()


@torch.no_grad()
def margin_scale(logits: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Size of a perturbation along :func:`perturbation_direction` that changes the margin by one.

    The margin is that of the own logit over the other classes, which are weighted by their probabilities ``p_j / (1 -
    p_y)``; it falls by ``|sum_j p_j / (1 - p_y) (w_j - w_y)|_1`` for each unit of the perturbation, whatever the number of
    features and the size of the weights.

    Args:
        logits: ``[N, C]`` plain logits.
        weight: ``[C, H]``.
        labels: ``[N]``.

    Returns:
        ``[N]``.
    """
    return _unit_margin(_toward_others(logits, weight, class_indices(labels, len(logits), len(weight))))


def _unit_margin(toward: Tensor) -> Tensor:
    return 1 / toward.abs().sum(dim=1).clamp_min(1e-6)


@torch.no_grad()
def direction_and_scale(logits: Tensor, weight: Tensor, labels: Tensor, in_margin: bool) -> tuple[Tensor, Tensor]:
    """:func:`perturbation_direction` ``[N, H]`` and the size ``[N]`` of one unit along it: :func:`margin_scale` where
    ``in_margin``, else one in every feature."""
    toward = _toward_others(logits, weight, labels)
    scale = _unit_margin(toward) if in_margin else torch.ones_like(toward[:, 0])
    return toward.sign_(), scale
