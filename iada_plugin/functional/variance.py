"""The variance term ``rho_uj = 1/2 (w_j - w_u)^T Sigma_u (w_j - w_u)`` of the classes present, and its derivatives.

Everything here is for a list of classes ``[U]`` and the rows of their covariances, so that nothing of size ``N x C x H``
exists; what has size ``U x C x H`` is cut into pieces. Shapes: weight ``[C, H]``, results ``[U, C]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .covariance import CHUNK_ELEMENTS, Covariance, LowRank


def class_variance_term(weight: Tensor, classes: Tensor, covariance: Covariance) -> Tensor:
    """rho, ``[U, C]``; differentiable.

    Args:
        weight: ``[C, H]``.
        classes: ``[U]`` class indices.
        covariance: rows of ``classes``, in any form.
    """
    if isinstance(covariance, LowRank):
        low = low_rank_variance_term(weight, classes, covariance.factor)
        return class_variance_term(weight, classes, covariance.diagonal) + low
    if covariance.dim() == 3:
        return torch.cat([
            0.5 * ((d @ covariance[part]) * d).sum(dim=2) for part, d in _differences(weight, classes)
        ])  # fmt: skip
    # The diagonal is expanded into matrix products. Only differences between rows matter, so the mean row is taken out
    # first to keep the cancellation small.
    centred = weight - weight.mean(dim=0)
    own = centred[classes]
    scaled = covariance * own
    rho = 0.5 * (covariance @ centred.square().T + (scaled * own).sum(dim=1, keepdim=True)) - scaled @ centred.T
    return rho.scatter(1, classes[:, None], 0.0)


def variance_tangent(weight: Tensor, weight_dot: Tensor, classes: Tensor, covariance: Covariance) -> Tensor:
    """Tangent of rho along ``weight_dot``: ``(w_j - w_u)^T Sigma_u (w'_j - w'_u)``, ``[U, C]``."""
    if isinstance(covariance, LowRank):
        low = _projections(weight, classes, covariance.factor) * _projections(weight_dot, classes, covariance.factor)
        return variance_tangent(weight, weight_dot, classes, covariance.diagonal) + low.sum(dim=2)
    if covariance.dim() == 3:
        dots = _differences(weight_dot, classes)
        return torch.cat([
            ((d @ covariance[part]) * d_dot).sum(dim=2)
            for (part, d), (_, d_dot) in zip(_differences(weight, classes), dots, strict=True)
        ])  # fmt: skip
    w, w_dot = weight - weight.mean(dim=0), weight_dot - weight_dot.mean(dim=0)
    o, o_dot = w[classes], w_dot[classes]
    mixed = covariance @ (w * w_dot).T - (covariance * o) @ w_dot.T - (covariance * o_dot) @ w.T
    return mixed + (covariance * o * o_dot).sum(dim=1, keepdim=True)


def covariance_gradient(
    weight: Tensor,
    classes: Tensor,
    k: Tensor,
    weight_dot: Tensor | None = None,
    r: Tensor | None = None,
    *,
    full: bool,
) -> Tensor:
    """``d / d Sigma`` of ``sum_uj k_uj rho_uj + r_uj rho'_uj``, rho' being the tangent along ``weight_dot``.

    Args:
        weight, weight_dot: ``[C, H]``.
        classes: ``[U]``.
        k, r: ``[U, C]``; without ``r`` the first sum only.
        full: ``[U, H, H]``, else its diagonal ``[U, H]``.
    """
    tangent = r is not None and weight_dot is not None
    if full:
        pieces = []
        for part, d in _differences(weight, classes):
            gradient = d.mT @ (k[part][:, :, None] * d)
            if tangent:
                d_dot = weight_dot[None] - weight_dot[classes[part]][:, None]  # type: ignore[index]
                cross = d_dot.mT @ (r[part][:, :, None] * d)  # type: ignore[index]
                gradient += cross + cross.mT
            pieces.append(0.5 * gradient)
        return torch.cat(pieces)
    w = weight - weight.mean(dim=0)
    o = w[classes]
    gradient = k @ w.square() - 2 * o * (k @ w) + k.sum(dim=1, keepdim=True) * o.square()
    if tangent:
        w_dot = weight_dot - weight_dot.mean(dim=0)  # type: ignore[operator, union-attr]
        o_dot = w_dot[classes]
        r_sum = r.sum(dim=1, keepdim=True)  # type: ignore[union-attr]
        gradient += 2 * (r @ (w * w_dot) - o * (r @ w_dot) - o_dot * (r @ w) + r_sum * o * o_dot)
    return 0.5 * gradient


# -------------------------------------------------------------------------------------------------- full covariances


def _differences(weight: Tensor, classes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``w_j - w_u`` ``[piece, C, H]`` for one piece of the classes after the other."""
    num_classes, num_features = weight.shape
    step = max(1, CHUNK_ELEMENTS // (max(num_classes, num_features) * num_features))
    for start in range(0, classes.numel(), step):
        part = slice(start, start + step)
        yield part, weight[None] - weight[classes[part]][:, None]


def full_variance_term(weight: Tensor, classes: Tensor, covariance: Tensor) -> tuple[Tensor, list[Tensor]]:
    """rho for covariances ``[C, H, H]`` of all classes, and what :func:`full_weight_gradient` wants: the products
    ``(w_j - w_u) Sigma_u`` or the covariances of the classes present, whichever is smaller."""
    terms, kept = [], []
    for part, d in _differences(weight, classes):
        own = covariance[classes[part]]
        product = d @ own
        terms.append(0.5 * (product * d).sum(dim=2))
        kept.append(product if weight.shape[0] <= weight.shape[1] else own)
    return torch.cat(terms), kept


def full_weight_gradient(weight: Tensor, classes: Tensor, kept: list[Tensor], k: Tensor) -> Tensor:
    """``d / d weight`` of ``sum_uj k_uj rho_uj``, ``[C, H]``; ``kept`` from :func:`full_variance_term`."""
    gradient = torch.zeros_like(weight)
    for (part, d), own in zip(_differences(weight, classes), kept, strict=True):
        product = own if weight.shape[0] <= weight.shape[1] else d @ own
        product = k[part][:, :, None] * product
        gradient += product.sum(dim=0)
        gradient.index_add_(0, classes[part], product.sum(dim=1), alpha=-1)
    return gradient


# --------------------------------------------------------------------------- the part L L^T of a covariance D + L L^T


def _projections(weight: Tensor, classes: Tensor, factor: Tensor) -> Tensor:
    """``L_u^T (w_j - w_u)``: ``[U, C, R]`` for factors ``[U, H, R]``."""
    count, num_features, rank = factor.shape
    # One product for all classes: many thin ones are several times slower.
    projected = weight @ factor.permute(1, 0, 2).reshape(num_features, count * rank)
    projected = projected.view(-1, count, rank).permute(1, 0, 2)
    return projected - projected.gather(1, classes[:, None, None].expand(-1, 1, rank))


def _from_projections(weight: Tensor, classes: Tensor, values: Tensor) -> Tensor:
    """``sum_j (w_j - w_u) values_uj``: ``[U, C, R] -> [U, H, R]``."""
    count, num_classes, rank = values.shape
    product = weight.T @ values.permute(1, 0, 2).reshape(num_classes, count * rank)
    product = product.view(-1, count, rank).permute(1, 0, 2)
    return product - weight[classes][:, :, None] * values.sum(dim=1, keepdim=True)


def low_rank_variance_term(weight: Tensor, classes: Tensor, factor: Tensor) -> Tensor:
    """rho of ``L L^T``, factors ``[U, H, R]``."""
    return 0.5 * _projections(weight, classes, factor).square().sum(dim=2)


def low_rank_weight_gradient(weight: Tensor, classes: Tensor, factor: Tensor, k: Tensor) -> Tensor:
    """``d / d weight`` of ``sum_uj k_uj rho_uj``, ``[C, H]``."""
    scaled = k[:, :, None] * _projections(weight, classes, factor)  # [U, C, R]
    count, num_features, rank = factor.shape
    gradient = scaled.permute(1, 0, 2).reshape(-1, count * rank) @ factor.mT.reshape(count * rank, num_features)
    return gradient.index_add_(0, classes, (factor @ scaled.sum(dim=1)[:, :, None]).squeeze(2), alpha=-1)


def low_rank_gradient(
    weight: Tensor,
    classes: Tensor,
    factor: Tensor,
    k: Tensor,
    weight_dot: Tensor | None = None,
    r: Tensor | None = None,
) -> Tensor:
    """:func:`covariance_gradient` times the factor, ``[U, H, R]``, without building it; half the gradient of ``L``."""
    projected = _projections(weight, classes, factor)
    product = _from_projections(weight, classes, k[:, :, None] * projected)
    if r is not None and weight_dot is not None:
        product += _from_projections(weight_dot, classes, r[:, :, None] * projected)
        product += _from_projections(weight, classes, r[:, :, None] * _projections(weight_dot, classes, factor))
    return 0.5 * product
