"""Class covariances: how they are kept, estimated and moved.

A covariance argument is ``[C, H, H]`` (full), ``[C, H]`` (diagonal) or a `LowRank`; none of the three needs a Python loop
over classes. Rows of the classes present in a batch have the same form with U in the place of C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Covariances kept in full only while all of them fit into this many bytes.
FULL_COVARIANCE_BUDGET = 256 * 2**20
#: Temporary tensors over several classes are cut into pieces of about this many elements.
CHUNK_ELEMENTS = 2**22


class LowRank(NamedTuple):
    """Covariances ``diag(diagonal) + factor factor^T``: ``R + 1`` numbers a feature and class instead of H."""

    diagonal: Tensor  # [C, H]
    factor: Tensor  # [C, H, R]


Covariance = Tensor | LowRank


def covariance_shapes(kind: str, num_classes: int, num_features: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the buffers: ``covariance`` is ``[C, H, H]`` for "full", else ``[C, H]``; "low_rank" has
    ``covariance_factor`` ``[C, H, rank]`` too.

    "auto" is full while ``4 C H^2`` bytes stay under :data:`FULL_COVARIANCE_BUDGET`, else diagonal.

    Raises:
        ValueError: for another ``kind``, or a rank that is not below H.
    """
    if kind not in ("auto", "full", "diagonal", "low_rank"):
        raise ValueError(f"covariance={kind!r} is unknown: use 'auto', 'full', 'diagonal' or 'low_rank'.")
    fits = 4 * num_classes * num_features**2 <= FULL_COVARIANCE_BUDGET
    if kind == "full" or (kind == "auto" and fits):
        return {"covariance": (num_classes, num_features, num_features)}
    shapes: dict[str, tuple[int, ...]] = {"covariance": (num_classes, num_features)}
    if kind == "low_rank":
        if not 1 <= rank < num_features:
            raise ValueError(
                f"covariance_rank={rank} must be from 1 to {num_features - 1}, below the number of features."
            )
        shapes["covariance_factor"] = (num_classes, num_features, rank)
    return shapes


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


def take(covariance: Covariance, classes: Tensor) -> Covariance:
    """Rows of the given classes, copied."""
    if isinstance(covariance, LowRank):
        return LowRank(covariance.diagonal[classes], covariance.factor[classes])
    return covariance[classes]


def put(covariance: Covariance, classes: Tensor, rows: Covariance) -> None:
    """Write rows back, in place; ``classes`` are different ones."""
    if isinstance(covariance, LowRank):
        covariance.diagonal[classes], covariance.factor[classes] = rows
    else:
        covariance[classes] = rows


def variances(covariance: Covariance) -> Tensor:
    """Diagonals of the covariances, ``[C, H]``."""
    if isinstance(covariance, LowRank):
        return covariance.diagonal + covariance.factor.square().sum(dim=2)
    return covariance.diagonal(dim1=1, dim2=2) if covariance.dim() == 3 else covariance


# ---------------------------------------------------------------------------------------------------------- estimation


@torch.no_grad()
def update_class_statistics(
    count: Tensor,
    mean: Tensor,
    covariance: Covariance | None,
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
) -> None:
    """Merge a batch into running class means and covariances, exactly as if all samples had been seen at once.

    With n samples so far, m new ones and r = m / (n + m): ``Sigma <- (1-r) Sigma + r S' + r (1-r) d d^T`` with d the
    difference of the means (as ISDA). Covariances are those of the population (divided by n). Of a `LowRank`, the
    diagonal of ``Sigma`` stays exact, and the factor is cut to the leading directions after each batch (incremental
    principal components; Ross et al., 2008).

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
        step = max(1, CHUNK_ELEMENTS // ((slots + 1) * mean.shape[1]))
        for start in range(0, classes.numel(), step):
            part = classes[start : start + step]
            inside = (inverse >= start) & (inverse < start + step) & (place < slots)
            rows = mean.new_zeros(part.numel(), slots + 1, mean.shape[1])
            # Samples of other pieces are added to row 0 of the first class, as zeros.
            at = torch.where(inside, (inverse - start) * (slots + 1) + place, 0)
            rows.view(-1, mean.shape[1]).index_add_(0, at, scaled * inside[:, None])
            rows[:, slots] = between[start : start + step]
            put(covariance, part, _merge(take(covariance, part), rate[start : start + step], rows))
        count[classes] += new.to(count.dtype)
    mean[classes] += rate[:, None] * difference


def _place_in_class(inverse: Tensor) -> Tensor:
    """0, 1, 2, ... for the samples of each class, in the order of the batch: ``[N]``."""
    order = inverse.argsort(stable=True)
    place = torch.arange(inverse.numel(), device=inverse.device)
    ordered = inverse[order]
    start = torch.where(torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]]), place, 0)
    return torch.empty_like(place).scatter_(0, order, place - start.cummax(dim=0).values)


def _merge(covariance: Covariance, rate: Tensor, rows: Tensor) -> Covariance:
    """``(1-r) Sigma + sum of the outer products of rows``, for ``rate`` ``[U]`` and ``rows`` ``[U, S, H]``."""
    kept = (1 - rate)[:, None]
    if not isinstance(covariance, LowRank):
        if covariance.dim() == 2:
            return kept * covariance + rows.square().sum(dim=1)
        return torch.baddbmm(kept[:, :, None] * covariance, rows.mT, rows)
    rank = covariance.factor.shape[2]
    # The leading directions of what is to be kept in factored form, from the Gram matrix of its columns.
    columns = torch.cat([covariance.factor * kept.sqrt()[:, :, None], rows.mT], dim=2)  # [U, H, R + S]
    _, vectors = torch.linalg.eigh(columns.mT @ columns)
    factor = columns @ vectors[:, :, -rank:]  # orthogonal columns, the longest last
    rest = (columns.square().sum(dim=2) - factor.square().sum(dim=2)).clamp_min(0)
    return LowRank(kept * covariance.diagonal + rest, factor)


# -------------------------------------------------------------------------------------------------------------- steps


def relative_step(covariance: Covariance, gradient: Covariance, lr: float) -> Covariance:
    """Move each covariance down its gradient by the share ``lr`` of its own Frobenius norm.

    ``Sigma <- (I - t G) Sigma (I - t G)``: to first order a step along ``-(G Sigma + Sigma G)``, the gradient in the
    geometry of covariance matrices (Bures-Wasserstein), a descent direction that cannot leave the positive
    semi-definite matrices, at the cost of two matrix products. ``t`` is set so that the relative change is ``lr``, which
    makes the step independent of the scale of the features, of the virtual learning rate and of the loss. A covariance of
    zero stays zero. A `LowRank` moves its two parts; what ``G`` makes of the diagonal beside it is left out.

    Args:
        covariance: rows of any form.
        gradient: same shape, symmetric; any positive multiple gives the same step. For a `LowRank`: the gradient's
            diagonal, and its product with the factor.
        lr: relative change in (0, 1).

    Returns:
        Same form.
    """
    tiny = torch.finfo(torch.float32).tiny
    if isinstance(covariance, LowRank):
        assert isinstance(gradient, LowRank)
        diagonal, factor = covariance
        norm = (gradient.diagonal.square().sum(dim=1) + gradient.factor.square().sum(dim=(1, 2))).sqrt().clamp_min(tiny)
        g, moved = gradient.diagonal / norm[:, None], gradient.factor / norm[:, None, None]
        # Frobenius norms of D + L L^T and of its change D g + g D + (G L) L^T + L (G L)^T, without building either.
        spread, gram = factor.square().sum(dim=2), factor.mT @ factor
        size = (diagonal.square() + 2 * diagonal * spread).sum(dim=1) + gram.square().sum(dim=(1, 2))
        along, across = 2 * diagonal * g, factor.mT @ moved
        both = 2 * (moved.mT @ moved * gram).sum(dim=(1, 2)) + 2 * (across * across.mT).sum(dim=(1, 2))
        change = (along.square() + 4 * along * (moved * factor).sum(dim=2)).sum(dim=1) + both
        step = (lr * size.clamp_min(0).sqrt() / change.clamp_min(tiny).sqrt()).clamp_max(0.5)[:, None]
        return LowRank(diagonal * (1 - step * g).square(), factor - step[:, :, None] * moved)
    assert isinstance(gradient, Tensor)
    full = covariance.dim() == 3
    dims = (1, 2) if full else (1,)
    gradient = gradient / gradient.square().sum(dims, keepdim=True).sqrt().clamp_min(tiny)
    product = gradient @ covariance if full else gradient * covariance
    change = product + (product.mT if full else product)
    size = covariance.square().sum(dims, keepdim=True).sqrt()
    step = lr * size / change.square().sum(dims, keepdim=True).sqrt().clamp_min(tiny)
    step = step.clamp_max(0.5)  # keeps I - t G invertible where Sigma is nearly orthogonal to G
    square = product @ gradient if full else product * gradient
    moved = covariance - step * change + step.square() * square
    return 0.5 * (moved + moved.mT) if full else moved


def plain_step(covariance: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """Eq. 9 of the paper to the letter, ``Sigma - lr * gradient``, then the nearest positive semi-definite matrix.

    The eigenvalues are computed, at ten times the cost of a product, only for batches in which a Cholesky factorisation
    finds a matrix that needs it (negative beyond a millionth of its mean variance).

    Args:
        covariance: ``[U, H, H]`` or ``[U, H]``.
        gradient: same shape.
        lr: step size eta_2.

    Returns:
        Same shape.
    """
    moved = covariance - lr * gradient
    if moved.dim() == 2:
        return moved.clamp_min(0)
    moved = 0.5 * (moved + moved.mT)
    slack = 1e-6 * moved.diagonal(dim1=1, dim2=2).abs().mean(dim=1).clamp_min(torch.finfo(moved.dtype).tiny)
    shifted = moved + torch.diag_embed(slack[:, None].expand(-1, moved.shape[1]))
    if not bool(torch.linalg.cholesky_ex(shifted).info.any()):
        return moved
    values, vectors = torch.linalg.eigh(moved)
    return (vectors * values.clamp_min(0)[:, None, :]) @ vectors.mT
