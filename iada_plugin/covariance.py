"""Running class statistics and the steps that change them. All functions work in place on the rows they are given."""

from __future__ import annotations

import torch
from torch import Tensor

#: Covariances kept in full only while all of them fit into this many bytes.
FULL_COVARIANCE_BUDGET = 256 * 2**20


def covariance_shape(kind: str, num_classes: int, num_features: int) -> tuple[int, ...]:
    """Shape of the covariance buffer: ``[C, H, H]`` for "full", ``[C, H]`` for "diagonal".

    "auto" is full while ``4 C H^2`` bytes stay under :data:`FULL_COVARIANCE_BUDGET`, else diagonal.

    Raises:
        ValueError: for another ``kind``.
    """
    if kind not in ("auto", "full", "diagonal"):
        raise ValueError(f"covariance={kind!r} is unknown: use 'auto', 'full' or 'diagonal'.")
    fits = 4 * num_classes * num_features**2 <= FULL_COVARIANCE_BUDGET
    full = kind == "full" or (kind == "auto" and fits)
    return (num_classes, num_features, num_features) if full else (num_classes, num_features)


def variances(covariance: Tensor) -> Tensor:
    """Diagonals of the covariances: ``[C, H, H]`` or ``[C, H]`` -> ``[C, H]``."""
    return covariance.diagonal(dim1=1, dim2=2) if covariance.dim() == 3 else covariance


@torch.no_grad()
def update_class_statistics(
    count: Tensor, mean: Tensor, covariance: Tensor | None, features: Tensor, labels: Tensor
) -> None:
    """Merge a batch into running class means and covariances, exactly as if all samples had been seen at once.

    With n samples so far, m new ones and r = m / (n + m): ``Sigma <- (1-r) Sigma + r S' + r (1-r) d d^T`` with d the
    difference of the means (as ISDA). Covariances are those of the population (divided by n).

    Args:
        count: ``[C]`` samples so far.
        mean: ``[C, H]``.
        covariance: ``[C, H, H]`` or ``[C, H]``. ``None``: only the means move and ``count`` stays, so that they become
            moving averages over about as many samples as ``count`` says.
        features: ``[N, H]``.
        labels: ``[N]``.
    """
    classes, inverse = torch.unique(labels, return_inverse=True)
    if classes.numel() == 0:
        return
    features = features.to(mean.dtype)
    new = torch.zeros_like(mean[classes, 0]).index_add_(0, inverse, torch.ones_like(features[:, 0]))  # [U]
    new_mean = torch.zeros_like(mean[classes]).index_add_(0, inverse, features) / new[:, None]
    old = count[classes].to(mean.dtype)
    rate = new / (old + new)
    difference = new_mean - mean[classes]
    if covariance is not None:
        centred = features - new_mean[inverse]
        if covariance.dim() == 2:
            spread = torch.zeros_like(new_mean).index_add_(0, inverse, centred.square()) / new[:, None]
            between = difference.square()
            r = rate[:, None]
        else:
            members = [centred[inverse == u] for u in range(classes.numel())]
            spread = torch.stack([x.T @ x / len(x) for x in members])
            between = difference[:, :, None] * difference[:, None, :]
            r = rate[:, None, None]
        covariance[classes] = (1 - r) * covariance[classes] + r * spread + r * (1 - r) * between
        count[classes] += new.to(count.dtype)
    mean[classes] += rate[:, None] * difference


def relative_step(covariance: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """Move each covariance down its gradient by the share ``lr`` of its own Frobenius norm.

    ``Sigma <- (I - t G) Sigma (I - t G)``: to first order a step along ``-(G Sigma + Sigma G)``, the gradient in the
    geometry of covariance matrices (Bures-Wasserstein), a descent direction that cannot leave the positive
    semi-definite matrices. ``t`` is set so that the relative change is ``lr``, which makes the step independent of the
    scale of the features, of the virtual learning rate and of the loss. A covariance of zero stays zero.

    Args:
        covariance: ``[U, H, H]`` or ``[U, H]``.
        gradient: same shape, symmetric; any positive multiple gives the same step.
        lr: relative change in (0, 1).

    Returns:
        Same shape.
    """
    tiny = torch.finfo(covariance.dtype).tiny
    full = covariance.dim() == 3
    dims = (1, 2) if full else (1,)
    norm = gradient.square().sum(dims, keepdim=True).sqrt().clamp_min(tiny)
    gradient = gradient / norm
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
    values, vectors = torch.linalg.eigh(0.5 * (moved + moved.mT))
    return (vectors * values.clamp_min(0)[:, None, :]) @ vectors.mT
