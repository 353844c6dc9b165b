"""Full covariances: ``H x H`` numbers a class; what has size ``U x C x H`` or more is cut into pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Covariance, pieces
from .differences import differences, full_gradient, transposed


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

    def move(self, step: str, classes: Tensor, gradient: Covariance, lr: float, fine: Tensor) -> None:
        if step != "relative":
            return super().move(step, classes, gradient, lr, fine)
        assert isinstance(gradient, FullCovariance)
        for part in pieces(classes.numel(), self.matrices.shape[1] ** 2):
            own = classes[part]
            rows = self.matrices[own]
            moved = gradient.step_down(part, rows, lr)
            self.matrices[own] = torch.where(fine, moved, rows, out=moved)

    def step_down(self, part: slice, sigma: Tensor, lr: float) -> Tensor:
        """Where :meth:`relative_step` along this gradient leads the covariances ``sigma`` ``[piece, H, H]``."""
        tiny, dims = torch.finfo(torch.float32).tiny, (1, 2)
        gradient = self.matrices[part]
        gradient = gradient / gradient.square().sum(dims, keepdim=True).sqrt().clamp_min(tiny)
        product = gradient @ sigma
        change = product + transposed(product)
        step = lr * sigma.square().sum(dims, keepdim=True).sqrt()
        step = step / change.square().sum(dims, keepdim=True).sqrt().clamp_min(tiny)
        step = step.clamp_max(0.5)  # keeps I - t G invertible where Sigma is nearly orthogonal to G
        moved = sigma - step * change + step.square() * (product @ gradient)
        return (moved + transposed(moved)).mul_(0.5)

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
        # Of three times as many features as classes on, a factored gradient is the cheaper one to go along.
        if r is not None and weight_dot is not None and 3 * weight.shape[0] <= weight.shape[1]:
            return FactoredGradient(weight, weight_dot, classes, k, r)
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


class FactoredGradient(FullCovariance):
    """``G_u = 1/2 (D^T E + E^T D)`` with rows ``d_j = w_j - w_u`` of D and ``e_j = 1/2 k_uj d_j + r_uj w'_j - r_uj w'_u`` of E.

    That is ``B^T M B`` with the basis ``B = [D; E]`` ``[R, H]``, R = 2 C, and a core M that is half the exchange of D and E:
    of rank at most R. The matrices are built where somebody asks for them.

    Args:
        weight, weight_dot: ``[C, H]``.
        classes: ``[U]``.
        k, r: ``[U, C]``.
    """

    def __init__(self, weight: Tensor, weight_dot: Tensor, classes: Tensor, k: Tensor, r: Tensor) -> None:
        self.weight, self.weight_dot, self.classes, self.k, self.r = weight, weight_dot, classes, k, r

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.weight, self.weight_dot, self.k, self.r

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The matrices ``[U, H, H]``, built each time."""
        return (full_gradient(self.weight, self.classes, self.k, self.weight_dot, self.r),)

    def isfinite(self) -> Tensor:
        return torch.stack([t.isfinite().all() for t in self._parts]).all()

    def scaled(self, factor: float) -> FactoredGradient:
        return FactoredGradient(self.weight, self.weight_dot, self.classes, factor * self.k, factor * self.r)

    def zero_unless(self, condition: Tensor) -> FactoredGradient:
        weight, weight_dot, k, r = (torch.where(condition, t, 0) for t in self._parts)
        return FactoredGradient(weight, weight_dot, self.classes, k, r)

    def step_down(self, part: slice, sigma: Tensor, lr: float) -> Tensor:
        """In ``O(R H^2 + R^2 H)`` a class instead of ``O(H^3)``."""
        tiny = torch.finfo(torch.float32).tiny
        classes, k, r = self.classes[part], self.k[part], self.r[part]
        # Any multiple will do: this one keeps the squares below in range.
        largest = torch.maximum(k.abs().amax(dim=1), r.abs().amax(dim=1)).clamp_min(tiny)[:, None, None]
        d = self.weight[None] - self.weight[classes][:, None]
        d_dot = self.weight_dot[None] - self.weight_dot[classes][:, None]
        e = 0.5 * (k[:, :, None] / largest) * d + (r[:, :, None] / largest) * d_dot
        basis = torch.cat([d, e], dim=1)  # B: [piece, R, H]
        gram = basis @ basis.mT  # S = B B^T
        product = basis @ sigma  # X = B Sigma
        # In the basis: G Sigma = B^T Y, and tr(G Sigma G Sigma) = tr(V V) with V = Y B^T.
        moved = _exchanged(product)  # Y = M X
        inner = moved @ basis.mT  # V
        own = _exchanged(gram)  # M S: |G|^2 = tr(M S M S)
        norm = (own * own.mT).sum((1, 2)).clamp_min(0).sqrt()
        # |G Sigma + Sigma G|^2, of two parts that are not negative.
        change = 2 * ((gram @ moved) * moved).sum((1, 2)) + 2 * (inner * inner.mT).sum((1, 2))
        size = torch.linalg.vector_norm(sigma, dim=(1, 2))
        # Keeps I - t G invertible where Sigma is nearly orthogonal to G. (No smaller divisor: where G is zero, the square of an
        # infinite step would be no number. Nor one below what |G| can be told by in float32, of the size of D and E.)
        half = gram.shape[1] // 2
        sizes = gram.diagonal(dim1=1, dim2=2)
        told = 1e-4 * (sizes[:, :half].sum(1) * sizes[:, half:].sum(1)).sqrt()
        largest_step = 0.5 / torch.maximum(norm, told).clamp_min(_SMALLEST)
        step = lr * size / change.clamp_min(0).sqrt().clamp_min(_SMALLEST)
        step = torch.minimum(step, largest_step)[:, None, None]
        # G Sigma G = B^T (V M) B, so that Sigma moves by the symmetric part of -2 B^T Z.
        z = step * moved - (0.5 * step.square()) * (_exchanged(inner.mT).mT @ basis)
        found = torch.baddbmm(sigma, basis.mT, z, alpha=-2)
        return (found + transposed(found)).mul_(0.5)


#: A divisor whose reciprocal can be squared in float32.
_SMALLEST = 1e-18


def _exchanged(rows: Tensor) -> Tensor:
    """``M rows``: half the rows of D and E ``[piece, R, ...]``, exchanged."""
    return 0.5 * rows.roll(rows.shape[1] // 2, dims=1)
