"""What every form of class covariances can do; a form is one class, and nobody else asks which one it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

#: Temporary tensors over several classes are cut into pieces of about this many elements.
CHUNK_ELEMENTS = 2**22


def pieces(count: int, elements: int) -> list[slice]:
    """Cut ``count`` classes, of so many elements each, into pieces of :data:`CHUNK_ELEMENTS`."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class Covariance:
    """Covariances of C classes, kept in one form. Rows of the classes present in a batch are one too, with U in C's place.

    Unpacks into its tensors. The gradient of something with respect to a covariance has the covariance's form.

    Args:
        tensors: what a form keeps, each ``[C, ...]``; they are not copied.
    """

    #: Its key in :data:`iada_plugin.functional.covariance.COVARIANCES`.
    name: ClassVar[str]
    #: Names of the head's buffers, one a tensor.
    buffers: ClassVar[tuple[str, ...]] = ("covariance",)
    #: Which of :meth:`relative_step` and :meth:`plain_step` it has.
    steps: ClassVar[tuple[str, ...]] = ("relative", "plain")
    tensors: tuple[Tensor, ...]

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(str([*t.shape]) for t in self.tensors)})"

    @classmethod
    def shapes(cls, num_classes: int, num_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the buffers by name."""
        raise NotImplementedError

    @classmethod
    def check_rank(cls, num_features: int, rank: int) -> None:
        """Refuse a rank that this form cannot have."""

    # ----------------------------------------------------------------------------------------------- rows and values

    def take(self, classes: Tensor) -> Covariance:
        """Rows of the classes ``[U]``, copied."""
        return type(self)(*(t[classes] for t in self.tensors))

    def put(self, classes: Tensor, rows: Covariance) -> None:
        """Write rows back, in place; ``classes`` are different ones."""
        for own, new in zip(self.tensors, rows.tensors, strict=True):
            own[classes] = new

    def isfinite(self) -> Tensor:
        """Whether everything is finite, ``[]``; not waited for."""
        return torch.stack([t.isfinite().all() for t in self.tensors]).all()

    def where(self, condition: Tensor, other: Covariance) -> Covariance:
        """This one where ``condition`` ``[]`` holds, else ``other``."""
        return type(self)(*(torch.where(condition, a, b) for a, b in zip(self.tensors, other.tensors, strict=True)))

    def zero_unless(self, condition: Tensor) -> Covariance:
        """This one where ``condition`` ``[]`` holds, else zero."""
        return type(self)(*(torch.where(condition, t, 0) for t in self.tensors))

    def scaled(self, factor: float) -> Covariance:
        """Every tensor times ``factor``: for gradients, which are linear in what they keep."""
        return type(self)(*(factor * t for t in self.tensors))

    def variances(self) -> Tensor:
        """The covariances' diagonals, ``[C, H]``."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The matrices themselves, ``[C, H, H]``."""
        raise NotImplementedError

    def eigenvalues(self) -> Tensor:
        """Smallest first, ``[C, H]``."""
        return torch.linalg.eigvalsh(self.dense())

    def sample(self, labels: Tensor, normal: Callable[[int], Tensor]) -> Tensor:
        """Draws from ``N(0, Sigma_y)`` for labels ``[N]``: ``[N, S, H]``. ``normal(width)`` gives ``[N, S, width]``."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ as they change

    def merge(self, rate: Tensor, rows: Tensor) -> Covariance:
        """``(1-r) Sigma + sum of the outer products of rows``, for ``rate`` ``[U]`` and ``rows`` ``[U, S, H]``."""
        raise NotImplementedError

    def relative_step(self, gradient: Covariance, lr: float) -> Covariance:
        """Move each covariance down its gradient by the share ``lr`` of its own Frobenius norm.

        ``Sigma <- (I - t G) Sigma (I - t G)``: to first order a step along ``-(G Sigma + Sigma G)``, the gradient in the
        geometry of covariance matrices (Bures-Wasserstein), a descent direction that cannot leave the positive
        semi-definite matrices. ``t`` is set so that the relative change is ``lr``, which makes the step independent of the
        scale of the features, of the virtual learning rate and of the loss. A covariance of zero stays zero.

        Args:
            gradient: what :meth:`gradient` gives; any positive multiple gives the same step.
            lr: relative change in (0, 1).
        """
        raise NotImplementedError

    def plain_step(self, gradient: Covariance, lr: float) -> Covariance:
        """Eq. 9 of the paper to the letter, ``Sigma - lr * gradient``, then the nearest positive semi-definite matrix.

        Raises:
            ValueError: a form that such a step would leave.
        """
        raise NotImplementedError

    def move(self, step: str, classes: Tensor, gradient: Covariance, lr: float, fine: Tensor) -> None:
        """Take a step of the rows of ``classes``, in place, if ``fine`` ``[]``; not waited for.

        Args:
            step: "relative" or "plain".
            classes: ``[U]`` different ones.
            gradient: of their rows, finite.
            lr: as the step has it.
            fine: whether to.
        """
        rows = self.take(classes)
        moved = (rows.relative_step if step == "relative" else rows.plain_step)(gradient, lr)
        self.put(classes, moved.where(fine, rows))

    # ----------------------------------------------------------------- the variance term, of rows of the classes present

    def variance_term(self, weight: Tensor, classes: Tensor) -> Tensor:
        """``rho_uj = 1/2 (w_j - w_u)^T Sigma_u (w_j - w_u)`` for these rows of ``classes``: ``[U, C]``; differentiable."""
        raise NotImplementedError

    def variance_tangent(self, weight: Tensor, weight_dot: Tensor, classes: Tensor) -> Tensor:
        """Tangent of rho along ``weight_dot``: ``(w_j - w_u)^T Sigma_u (w'_j - w'_u)``, ``[U, C]``."""
        raise NotImplementedError

    def gradient(
        self, weight: Tensor, classes: Tensor, k: Tensor, weight_dot: Tensor | None = None, r: Tensor | None = None
    ) -> Covariance:
        """``d / d Sigma`` of ``sum_uj k_uj rho_uj + r_uj rho'_uj``, rho' being the tangent along ``weight_dot``.

        Args:
            weight, weight_dot: ``[C, H]``.
            classes: ``[U]``.
            k, r: ``[U, C]``; without ``r`` the first sum only.
        """
        raise NotImplementedError

    # ------------------------------------------------------------- its part of the logits, of covariances of all classes

    def add_to(
        self, logits: Tensor, weight: Tensor, classes: Tensor, inverse: Tensor, shift: Tensor | None, alpha: float
    ) -> list[Tensor]:
        """Add ``shift W^T + alpha rho`` to the logits ``[N, C]``, in place.

        Args:
            logits: ``[N, C]``.
            weight: ``[C, H]``.
            classes: ``[U]`` present ones.
            inverse: ``[N]``, each sample's place among them.
            shift: ``[N, H]`` or ``None``: a move of the features. Here, because what rho asks of the same matrix product
                may join it.
            alpha: weight of rho.

        Returns:
            Tensors that the two methods below want.
        """
        raise NotImplementedError

    @classmethod
    def weight_gradient(
        cls, kept: Sequence[Tensor], weight: Tensor, classes: Tensor, inverse: Tensor, alpha: float,
        g: Tensor, k: Tensor, through: Tensor, inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        """Gradient of the weight ``[C, H]`` through ``inputs W^T + alpha rho``.

        Args:
            kept: from :meth:`add_to`.
            weight, classes, inverse, alpha: as there.
            g: ``[N, C]`` gradient of the logits.
            k: ``[U, C]``, its sum over the samples of each class.
            through: ``[N, H]``, ``g W``.
            inputs: ``[N, H]`` features, moved ones where the weight is trained through the move.
        """
        raise NotImplementedError

    @classmethod
    def tensor_gradients(
        cls, kept: Sequence[Tensor], weight: Tensor, classes: Tensor, k: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients ``[U, ...]`` of ``sum_uj k_uj rho_uj`` for the rows of each tensor, or ``None`` where not wanted."""
        raise NotImplementedError
