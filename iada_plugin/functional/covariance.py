"""Class covariances: the forms they are kept in, by name, and how they are estimated.

A covariance argument is ``[C, H, H]`` (full), ``[C, H]`` (diagonal), or a :class:`Covariance` such as a `LowRank`; none of
them needs a Python loop over classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Covariance, pieces
from .diagonal import DiagonalCovariance
from .full import FullCovariance
from .low_rank import LowRankCovariance

#: Covariances kept in full only while all of them fit into this many bytes.
FULL_COVARIANCE_BUDGET = 16 * 2**20

COVARIANCES: dict[str, type[Covariance]] = {
    form.name: form for form in (FullCovariance, DiagonalCovariance, LowRankCovariance)
}
LowRank = LowRankCovariance
#: Forms that a bare tensor stands for, by its number of dimensions.
_BARE = {3: FullCovariance, 2: DiagonalCovariance}


def covariance_form(kind: str, num_classes: int, num_features: int, rank: int) -> type[Covariance]:
    """The form of that name. "auto" is full while ``4 C H^2`` bytes stay under :data:`FULL_COVARIANCE_BUDGET`, else diagonal.

    Raises:
        ValueError: for another ``kind``, or a rank that the form cannot have.
    """
    if kind == "auto":
        kind = "full" if 4 * num_classes * num_features**2 <= FULL_COVARIANCE_BUDGET else "diagonal"
    if kind not in COVARIANCES:
        raise ValueError(f"covariance={kind!r} is unknown: use 'auto', 'full', 'diagonal' or 'low_rank'.")
    COVARIANCES[kind].check_rank(num_features, rank)
    return COVARIANCES[kind]


def as_covariance(covariance: Tensor | Covariance) -> Covariance:
    """A bare ``[C, H, H]`` or ``[C, H]`` in its form."""
    return covariance if isinstance(covariance, Covariance) else _BARE[covariance.dim()](covariance)


def wanted_shapes(
    covariance: Tensor | Covariance | None, num_classes: int, num_features: int
) -> list[tuple[str, Tensor, list[tuple[int, ...]]]]:
    """Name of each tensor, the tensor, and the shapes that fit so many classes and features."""
    if covariance is None:
        return []
    if isinstance(covariance, Tensor):
        fitting = [s for n in sorted(_BARE) for s in _BARE[n].shapes(num_classes, num_features, 0).values()]
        return [("covariance", covariance, fitting)]
    shapes = covariance.shapes(num_classes, num_features, covariance.tensors[-1].shape[-1])
    named = zip(covariance.buffers, covariance.tensors, strict=True)
    return [(name.replace("_", "."), tensor, [shapes[name]]) for name, tensor in named]


def present_classes(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Classes of a batch, and each sample's place among them: ``[U]`` and ``[N]``.

    On a CPU these are the classes that occur. Elsewhere their number would have to be waited for: there are ``min(N, C)``
    of them, the ones that occur first and different ones that do not after them.
    """
    if labels.device.type == "cpu":
        return torch.unique(labels, return_inverse=True)  # type: ignore[no-any-return]
    return padded_classes(labels, num_classes)


def padded_classes(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """:func:`present_classes` with shapes that do not depend on the labels."""
    absent = torch.ones(num_classes, dtype=torch.uint8, device=labels.device).index_fill_(0, labels, 0)
    order = absent.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(num_classes, device=labels.device))
    return order[: min(num_classes, labels.numel())], place[labels]


# ---------------------------------------------------------------------------------------------------------- estimation


@torch.no_grad()
def update_class_statistics(
    count: Tensor,
    mean: Tensor,
    covariance: Tensor | Covariance | None,
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
) -> None:
    """Merge a batch into running class means and covariances, exactly as if all samples had been seen at once.

    With n samples so far, m new ones and r = m / (n + m): ``Sigma <- (1-r) Sigma + r S' + r (1-r) d d^T`` with d the
    difference of the means (as ISDA). Covariances are those of the population (divided by n).

    Args:
        count: ``[C]`` samples so far.
        mean: ``[C, H]``.
        covariance: of all classes, in any form. ``None``: only the means move and ``count`` stays, so that they become
            moving averages over about as many samples as ``count`` says.
        features: ``[N, H]``.
        labels: ``[N]``.
        weight: ``[N]`` of 0 and 1: which samples count. ``None``: all.
    """
    if labels.numel() == 0:
        return
    classes, inverse = present_classes(labels, count.numel())
    features = features.to(mean.dtype)
    weight = torch.ones_like(features[:, 0]) if weight is None else weight.to(mean.dtype)
    features = torch.where(weight[:, None] > 0, features, 0)
    new = mean.new_zeros(classes.numel()).index_add_(0, inverse, weight)  # [U]
    divisor = new.clamp_min(1)
    new_mean = torch.zeros_like(mean[classes]).index_add_(0, inverse, features) / divisor[:, None]
    rate = new / (count[classes].to(mean.dtype) + new).clamp_min(1)
    difference = (new_mean - mean[classes]) * (new > 0)[:, None]
    if covariance is not None:
        centred = (features - new_mean[inverse]) * weight[:, None]
        # Rows whose outer products, summed, are r S' + r (1-r) d d^T; zero rows fill classes up to the largest one.
        between = (rate * (1 - rate)).sqrt()[:, None] * difference
        scaled = centred * (rate / divisor).sqrt()[inverse][:, None]
        slots = int(inverse.bincount().max()) if labels.device.type == "cpu" else labels.numel()
        place = _place_in_class(inverse)
        covariance = as_covariance(covariance)
        for part in pieces(classes.numel(), (slots + 1) * mean.shape[1]):
            own = classes[part]
            inside = (inverse >= part.start) & (inverse < part.stop) & (place < slots)
            rows = mean.new_zeros(own.numel(), slots + 1, mean.shape[1])
            # Samples of other pieces are added to row 0 of the first class, as zeros.
            at = torch.where(inside, (inverse - part.start) * (slots + 1) + place, 0)
            rows.view(-1, mean.shape[1]).index_add_(0, at, scaled * inside[:, None])
            rows[:, slots] = between[part]
            covariance.put(own, covariance.take(own).merge(rate[part], rows))
        count[classes] += new.to(count.dtype)
    mean[classes] += rate[:, None] * difference


def _place_in_class(inverse: Tensor) -> Tensor:
    """0, 1, 2, ... for the samples of each class, in the order of the batch: ``[N]``."""
    order = inverse.argsort(stable=True)
    place = torch.arange(inverse.numel(), device=inverse.device)
    ordered = inverse[order]
    start = torch.where(torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]]), place, 0)
    return torch.empty_like(place).scatter_(0, order, place - start.cummax(dim=0).values)
