"""Covariances of a diagonal and a few directions: ``R + 1`` numbers a feature and class instead of H."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Covariance
from .diagonal import DiagonalCovariance, diagonal_gradient


class LowRankCovariance(Covariance):
    """Covariances ``diag(diagonal) + factor factor^T``; of a gradient, its diagonal and its product with the factor.

    Args:
        diagonal: ``[C, H]``.
        factor: ``[C, H, R]``.
    """

    name = "low_rank"
    buffers = ("covariance", "covariance_factor")
    steps = ("relative",)

    def __init__(self, diagonal: Tensor, factor: Tensor) -> None:
        super().__init__(diagonal, factor)

    @classmethod
    def shapes(cls, num_classes: int, num_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"covariance": (num_classes, num_features), "covariance_factor": (num_classes, num_features, rank)}

    @classmethod
    def check_rank(cls, num_features: int, rank: int) -> None:
        """Raises ValueError for a rank that is not below H."""
        if not 1 <= rank < num_features:
            raise ValueError(
                f"covariance_rank={rank} must be from 1 to {num_features - 1}, below the number of features."
            )

    @property
    def diagonal(self) -> Tensor:
        """``[C, H]``."""
        return self.tensors[0]

    @property
    def factor(self) -> Tensor:
        """``[C, H, R]``."""
        return self.tensors[1]

    @property
    def _beside(self) -> DiagonalCovariance:
        return DiagonalCovariance(self.diagonal)

    def variances(self) -> Tensor:
        return self.diagonal + self.factor.square().sum(dim=2)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.diagonal) + self.factor @ self.factor.mT

    def sample(self, labels: Tensor, normal: Callable[[int], Tensor]) -> Tensor:
        return self._beside.sample(labels, normal) + normal(self.factor.shape[2]) @ self.factor[labels].mT

    def merge(self, rate: Tensor, rows: Tensor) -> LowRankCovariance:
        """The diagonal of ``Sigma`` stays exact, and the factor is cut to the leading directions (incremental principal
        components; Ross et al., 2008)."""
        kept, rank = (1 - rate)[:, None], self.factor.shape[2]
        # The leading directions of what is to be kept in factored form, from the Gram matrix of its columns.
        columns = torch.cat([self.factor * kept.sqrt()[:, :, None], rows.mT], dim=2)  # [U, H, R + S]
        _, vectors = torch.linalg.eigh(columns.mT @ columns)
        factor = columns @ vectors[:, :, -rank:]  # orthogonal columns, the longest last
        rest = (columns.square().sum(dim=2) - factor.square().sum(dim=2)).clamp_min(0)
        return LowRankCovariance(kept * self.diagonal + rest, factor)

    def relative_step(self, gradient: Covariance, lr: float) -> LowRankCovariance:
        """Moves the two parts; what ``G`` makes of the diagonal beside it is left out."""
        (diagonal, factor), (for_diagonal, for_factor) = self.tensors, gradient.tensors
        tiny = torch.finfo(torch.float32).tiny
        norm = (for_diagonal.square().sum(dim=1) + for_factor.square().sum(dim=(1, 2))).sqrt().clamp_min(tiny)
        g, moved = for_diagonal / norm[:, None], for_factor / norm[:, None, None]
        # Frobenius norms of D + L L^T and of its change D g + g D + (G L) L^T + L (G L)^T, without building either.
        spread, gram = factor.square().sum(dim=2), factor.mT @ factor
        size = (diagonal.square() + 2 * diagonal * spread).sum(dim=1) + gram.square().sum(dim=(1, 2))
        along, across = 2 * diagonal * g, factor.mT @ moved
        both = 2 * (moved.mT @ moved * gram).sum(dim=(1, 2)) + 2 * (across * across.mT).sum(dim=(1, 2))
        change = (along.square() + 4 * along * (moved * factor).sum(dim=2)).sum(dim=1) + both
        step = (lr * size.clamp_min(0).sqrt() / change.clamp_min(tiny).sqrt()).clamp_max(0.5)[:, None]
        return LowRankCovariance(diagonal * (1 - step * g).square(), factor - step[:, :, None] * moved)

    def plain_step(self, gradient: Covariance, lr: float) -> Covariance:
        raise ValueError("covariance_step='plain' would leave the form of covariance='low_rank': use 'relative'.")

    def variance_term(self, weight: Tensor, classes: Tensor) -> Tensor:
        low = _factor_term(weight, classes, self.factor)
        return self._beside.variance_term(weight, classes) + low

    def variance_tangent(self, weight: Tensor, weight_dot: Tensor, classes: Tensor) -> Tensor:
        low = _projections(weight, classes, self.factor) * _projections(weight_dot, classes, self.factor)
        return self._beside.variance_tangent(weight, weight_dot, classes) + low.sum(dim=2)

    def gradient(
        self, weight: Tensor, classes: Tensor, k: Tensor, weight_dot: Tensor | None = None, r: Tensor | None = None
    ) -> LowRankCovariance:
        diagonal = diagonal_gradient(weight, classes, k, weight_dot, r)
        return LowRankCovariance(diagonal, _factor_gradient(weight, classes, self.factor, k, weight_dot, r))

    def add_to(
        self, logits: Tensor, weight: Tensor, classes: Tensor, inverse: Tensor, shift: Tensor | None, alpha: float
    ) -> list[Tensor]:
        low = self.factor[classes]
        kept = self._beside.add_to(
            logits, weight, classes, inverse, shift, alpha, lambda: _factor_term(weight, classes, low)
        )
        return [*kept, low]

    @classmethod
    def weight_gradient(
        cls, kept: Sequence[Tensor], weight: Tensor, classes: Tensor, inverse: Tensor, alpha: float,
        g: Tensor, k: Tensor, through: Tensor, inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        beside = DiagonalCovariance.weight_gradient(kept, weight, classes, inverse, alpha, g, k, through, inputs)
        low = kept[1]
        scaled = k[:, :, None] * _projections(weight, classes, low)  # [U, C, R]
        count, num_features, rank = low.shape
        gradient = scaled.permute(1, 0, 2).reshape(-1, count * rank) @ low.mT.reshape(count * rank, num_features)
        gradient.index_add_(0, classes, (low @ scaled.sum(dim=1)[:, :, None]).squeeze(2), alpha=-1)
        return beside + alpha * gradient

    @classmethod
    def tensor_gradients(
        cls, kept: Sequence[Tensor], weight: Tensor, classes: Tensor, k: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        return [
            diagonal_gradient(weight, classes, k) if wanted[0] else None,
            2 * _factor_gradient(weight, classes, kept[1], k) if wanted[1] else None,
        ]


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


def _factor_term(weight: Tensor, classes: Tensor, factor: Tensor) -> Tensor:
    """rho of ``L L^T``, factors ``[U, H, R]``."""
    return 0.5 * _projections(weight, classes, factor).square().sum(dim=2)


def _factor_gradient(
    weight: Tensor,
    classes: Tensor,
    factor: Tensor,
    k: Tensor,
    weight_dot: Tensor | None = None,
    r: Tensor | None = None,
) -> Tensor:
    """The dense gradient times the factor, ``[U, H, R]``, without building it; half the gradient of ``L``."""
    projected = _projections(weight, classes, factor)
    product = _from_projections(weight, classes, k[:, :, None] * projected)
    if r is not None and weight_dot is not None:
        product += _from_projections(weight_dot, classes, r[:, :, None] * projected)
        product += _from_projections(weight, classes, r[:, :, None] * _projections(weight_dot, classes, factor))
    return 0.5 * product
