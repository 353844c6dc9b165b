"""Diagonal covariances: H numbers a class, and matrix products of the layer's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Covariance


class DiagonalCovariance(Covariance):
    """The diagonals ``[C, H]`` of covariances whose other entries are left out."""

    name = "diagonal"

    @classmethod
    def shapes(cls, num_classes: int, num_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"covariance": (num_classes, num_features)}

    @property
    def diagonal(self) -> Tensor:
        """``[C, H]``."""
        return self.tensors[0]

    def variances(self) -> Tensor:
        return self.diagonal

    def dense(self) -> Tensor:
        return torch.diag_embed(self.diagonal)

    def eigenvalues(self) -> Tensor:
        return self.diagonal.sort(dim=1).values

    def sample(self, labels: Tensor, normal: Callable[[int], Tensor]) -> Tensor:
        return self.diagonal[labels].clamp_min(0).sqrt()[:, None] * normal(self.diagonal.shape[1])

    def merge(self, rate: Tensor, rows: Tensor) -> DiagonalCovariance:
        return DiagonalCovariance((1 - rate)[:, None] * self.diagonal + rows.square().sum(dim=1))

    def relative_step(self, gradient: Covariance, lr: float) -> DiagonalCovariance:
        sigma, (g,) = self.diagonal, gradient.tensors
        tiny = torch.finfo(torch.float32).tiny
        g = g / g.square().sum(1, keepdim=True).sqrt().clamp_min(tiny)
        product = g * sigma
        change = product + product
        step = lr * sigma.square().sum(1, keepdim=True).sqrt()
        step = step / change.square().sum(1, keepdim=True).sqrt().clamp_min(tiny)
        step = step.clamp_max(0.5)  # keeps I - t G invertible where Sigma is nearly orthogonal to G
        return DiagonalCovariance(sigma - step * change + step.square() * (product * g))

    def plain_step(self, gradient: Covariance, lr: float) -> DiagonalCovariance:
        return DiagonalCovariance((self.diagonal - lr * gradient.tensors[0]).clamp_min(0))

    def variance_term(self, weight: Tensor, classes: Tensor) -> Tensor:
        # Expanded into matrix products. Only differences between rows matter, so the mean row is taken out first to keep
        # the cancellation small.
        centred = weight - weight.mean(dim=0)
        own = centred[classes]
        scaled = self.diagonal * own
        rho = 0.5 * (self.diagonal @ centred.square().T + (scaled * own).sum(dim=1, keepdim=True)) - scaled @ centred.T
        return rho.scatter(1, classes[:, None], 0.0)

    def variance_tangent(self, weight: Tensor, weight_dot: Tensor, classes: Tensor) -> Tensor:
        sigma = self.diagonal
        w, w_dot = weight - weight.mean(dim=0), weight_dot - weight_dot.mean(dim=0)
        o, o_dot = w[classes], w_dot[classes]
        mixed = sigma @ (w * w_dot).T - (sigma * o) @ w_dot.T - (sigma * o_dot) @ w.T
        return mixed + (sigma * o * o_dot).sum(dim=1, keepdim=True)

    def gradient(
        self, weight: Tensor, classes: Tensor, k: Tensor, weight_dot: Tensor | None = None, r: Tensor | None = None
    ) -> DiagonalCovariance:
        return DiagonalCovariance(diagonal_gradient(weight, classes, k, weight_dot, r))

    def add_to(
        self, logits: Tensor, weight: Tensor, classes: Tensor, inverse: Tensor, shift: Tensor | None, alpha: float,
        more: Callable[[], Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        rows = self.diagonal[classes]
        # rho = 1/2 Sigma (w_j - m)^2 - Sigma (w_y - m) w_j + 1/2 Sigma (w_y^2 - m^2) for the diagonal Sigma of class y
        # and any m: the middle joins the shift in one product. With m the mean row little cancels.
        mean = weight.mean(dim=0)
        own, sigma = weight[classes][inverse], (alpha * rows)[inverse]
        middle = sigma * (own - mean)
        logits.addmm_(-middle if shift is None else shift - middle, weight.T)
        quadratic = (0.5 * alpha * rows) @ (weight - mean).square_().T
        if more is not None:  # [U, C] of a form that has a diagonal among other things
            quadratic = quadratic + alpha * more()
        logits += quadratic[inverse]
        logits += 0.5 * (sigma * (own + mean) * (own - mean)).sum(dim=1, keepdim=True)
        return [rows]

    @classmethod
    def weight_gradient(
        cls, kept: Sequence[Tensor], weight: Tensor, classes: Tensor, inverse: Tensor, alpha: float,
        g: Tensor, k: Tensor, through: Tensor, inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        scaled = alpha * kept[0]
        own = weight[classes]
        gradient = g.T @ (inputs - (scaled * own)[inverse])
        gradient.addcmul_(k.T @ scaled, weight)
        pull = torch.zeros_like(own).index_add_(0, inverse, through) - k.sum(dim=1, keepdim=True) * own
        return gradient.index_add_(0, classes, scaled * pull, alpha=-1)

    @classmethod
    def tensor_gradients(
        cls, kept: Sequence[Tensor], weight: Tensor, classes: Tensor, k: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        return [diagonal_gradient(weight, classes, k) if wanted[0] else None]


def diagonal_gradient(
    weight: Tensor, classes: Tensor, k: Tensor, weight_dot: Tensor | None = None, r: Tensor | None = None
) -> Tensor:
    """Diagonals ``[U, H]`` of :meth:`iada_plugin.functional.base.Covariance.gradient`."""
    w = weight - weight.mean(dim=0)
    o = w[classes]
    gradient = k @ w.square() - 2 * o * (k @ w) + k.sum(dim=1, keepdim=True) * o.square()
    if r is not None and weight_dot is not None:
        w_dot = weight_dot - weight_dot.mean(dim=0)
        o_dot = w_dot[classes]
        r_sum = r.sum(dim=1, keepdim=True)
        gradient += 2 * (r @ (w * w_dot) - o * (r @ w_dot) - o_dot * (r @ w) + r_sum * o * o_dot)
    return 0.5 * gradient
