"""Full covariances: ``H x H`` numbers a class; what has size ``U x C x H`` or more is cut into pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .base import Covariance, pieces


class FullCovariance(Covariance):
    """Matrices ``[C, H, H]``."""

    name = "full"

    @classmethod
    def shapes(cls, num_classes: int, num_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"covariance": (num_classes, num_features, num_features)}

    @property
    def matrices(self) -> Tensor:
        """``[C, H, H]``."""
        return self.tensors[0]

    def variances(self) -> Tensor:
        return self.matrices.diagonal(dim1=1, dim2=2)

    def dense(self) -> Tensor:
        return self.matrices

    def sample(self, labels: Tensor, normal: Callable[[int], Tensor]) -> Tensor:
        numbers = normal(self.matrices.shape[1])
        classes, inverse = torch.unique(labels, return_inverse=True)
        values, vectors = torch.linalg.eigh(self.matrices[classes])
        root = vectors * values.clamp_min(0).sqrt()[:, None, :]  # root root^T = Sigma
        return torch.stack([numbers[i] @ root[c].T for i, c in enumerate(inverse.tolist())])

    def merge(self, rate: Tensor, rows: Tensor) -> FullCovariance:
        return FullCovariance(torch.baddbmm((1 - rate)[:, None, None] * self.matrices, rows.mT, rows))

    def relative_step(self, gradient: Covariance, lr: float) -> FullCovariance:
        """At the cost of two products of ``H x H`` matrices; less for a gradient that is kept factored."""
        assert isinstance(gradient, FullCovariance)
        moved = torch.empty_like(self.matrices)
        for part in pieces(len(moved), moved.shape[1] ** 2):
            moved[part] = gradient.step_down(part, self.matrices[part], lr)
        return FullCovariance(moved)

    def step_down(self, part: slice, sigma: Tensor, lr: float) -> Tensor:
        """Where :meth:`relative_step` along this gradient leads the covariances ``sigma`` ``[piece, H, H]``."""
        tiny, dims = torch.finfo(torch.float32).tiny, (1, 2)
        gradient = self.matrices[part]
        gradient = gradient / gradient.square().sum(dims, keepdim=True).sqrt().clamp_min(tiny)
        product = gradient @ sigma
        change = product + product.mT
        step = lr * sigma.square().sum(dims, keepdim=True).sqrt()
        step = step / change.square().sum(dims, keepdim=True).sqrt().clamp_min(tiny)
        step = step.clamp_max(0.5)  # keeps I - t G invertible where Sigma is nearly orthogonal to G
        moved = sigma - step * change + step.square() * (product @ gradient)
        return 0.5 * (moved + moved.mT)

    def plain_step(self, gradient: Covariance, lr: float) -> FullCovariance:
        """The eigenvalues are computed, at ten times the cost of a product, only for batches in which a Cholesky
        factorisation finds a matrix that needs it (negative beyond a millionth of its mean variance)."""
        moved = self.matrices - lr * gradient.tensors[0]
        moved = 0.5 * (moved + moved.mT)
        slack = 1e-6 * moved.diagonal(dim1=1, dim2=2).abs().mean(dim=1).clamp_min(torch.finfo(moved.dtype).tiny)
        shifted = moved + torch.diag_embed(slack[:, None].expand(-1, moved.shape[1]))
        if not bool(torch.linalg.cholesky_ex(shifted).info.any()):
            return FullCovariance(moved)
        values, vectors = torch.linalg.eigh(moved)
        return FullCovariance((vectors * values.clamp_min(0)[:, None, :]) @ vectors.mT)

    def variance_term(self, weight: Tensor, classes: Tensor) -> Tensor:
        return torch.cat([
            0.5 * ((d @ self.matrices[part]) * d).sum(dim=2) for part, d in differences(weight, classes)
        ])  # fmt: skip

    def variance_tangent(self, weight: Tensor, weight_dot: Tensor, classes: Tensor) -> Tensor:
        dots = differences(weight_dot, classes)
        return torch.cat([
            ((d @ self.matrices[part]) * d_dot).sum(dim=2)
            for (part, d), (_, d_dot) in zip(differences(weight, classes), dots, strict=True)
        ])  # fmt: skip

    def gradient(
        self, weight: Tensor, classes: Tensor, k: Tensor, weight_dot: Tensor | None = None, r: Tensor | None = None
    ) -> FullCovariance:
        return FullCovariance(full_gradient(weight, classes, k, weight_dot, r))

    def add_to(
        self, logits: Tensor, weight: Tensor, classes: Tensor, inverse: Tensor, shift: Tensor | None, alpha: float
    ) -> list[Tensor]:
        """Keeps the products ``(w_j - w_u) Sigma_u`` or the covariances of the classes present, whichever is smaller."""
        if shift is not None:
            logits.addmm_(shift, weight.T)
        terms, kept = [], []
        for part, d in differences(weight, classes):
            own = self.matrices[classes[part]]
            product = d @ own
            terms.append(0.5 * (product * d).sum(dim=2))
            kept.append(product if weight.shape[0] <= weight.shape[1] else own)
        logits += alpha * torch.cat(terms)[inverse]
        return kept

    @classmethod
    def weight_gradient(
        cls, kept: Sequence[Tensor], weight: Tensor, classes: Tensor, inverse: Tensor, alpha: float,
        g: Tensor, k: Tensor, through: Tensor, inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        gradient = torch.zeros_like(weight)
        for (part, d), own in zip(differences(weight, classes), kept, strict=True):
            product = own if weight.shape[0] <= weight.shape[1] else d @ own
            product = k[part][:, :, None] * product
            gradient += product.sum(dim=0)
            gradient.index_add_(0, classes[part], product.sum(dim=1), alpha=-1)
        return g.T @ inputs + alpha * gradient

    @classmethod
    def tensor_gradients(
        cls, kept: Sequence[Tensor], weight: Tensor, classes: Tensor, k: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        return [full_gradient(weight, classes, k) if wanted[0] else None]


def differences(weight: Tensor, classes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``w_j - w_u`` ``[piece, C, H]`` for one piece of the classes after the other."""
    num_classes, num_features = weight.shape
    for part in pieces(classes.numel(), max(num_classes, num_features) * num_features):
        yield part, weight[None] - weight[classes[part]][:, None]


def full_gradient(
    weight: Tensor, classes: Tensor, k: Tensor, weight_dot: Tensor | None = None, r: Tensor | None = None
) -> Tensor:
    """:meth:`iada_plugin.functional.base.Covariance.gradient` as matrices, ``[U, H, H]``."""
    found = []
    for part, d in differences(weight, classes):
        gradient = d.mT @ (k[part][:, :, None] * d)
        if r is not None and weight_dot is not None:
            d_dot = weight_dot[None] - weight_dot[classes[part]][:, None]
            cross = d_dot.mT @ (r[part][:, :, None] * d)
            gradient += cross + cross.mT
        found.append(0.5 * gradient)
    return torch.cat(found)
