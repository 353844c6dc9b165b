"""`IADAHead`: a classifier's last layer that knows its classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import logits as functional
from ..functional.covariance import COVARIANCES, Covariance, covariance_form, update_class_statistics
from ..functional.labels import check_labels
from ..runtime.sharding import whole
from .find import require_linear

BUFFERS = ("class_count", "class_mean", "covariance", "covariance_factor", "log_prior")


class IADAHead(nn.Linear):
    """A ``Linear`` that knows its classes' feature statistics and can give the IADA logits.

    ``forward`` is that of ``nn.Linear``, bit for bit, in training and in evaluation; the loss asks for
    :meth:`iada_logits`. The statistics are non-persistent buffers: ``state_dict`` holds ``weight`` and ``bias`` only.

    Args:
        in_features: H.
        out_features: number of classes C, at least 2.
        bias: as ``nn.Linear``.
        class_counts: ``[C]`` training samples per class, for the prior; see :meth:`set_class_counts`.
        covariance: "full", "diagonal", "low_rank" or "auto" (full while all classes fit into 16 MB, else diagonal).
        covariance_rank: R of "low_rank".

    Attributes:
        covariance_form: "full", "diagonal" or "low_rank": what "auto" came to.
        class_count: ``[C]`` samples in the statistics.
        class_mean: ``[C, H]``.
        covariance: ``[C, H, H]``, or ``[C, H]`` where only the diagonal is kept; zero for a class never seen.
        covariance_factor: ``[C, H, R]`` of "low_rank", whose covariances are ``diag(covariance) + factor factor^T``.
        log_prior: ``[C]``, zero until counts are given.

    Example:
        >>> head = IADAHead.from_linear(nn.Linear(8, 3), class_counts=[90, 9, 1])
        >>> features, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
        >>> head.update_statistics(features, labels)
        >>> head.iada_logits(features, labels).shape
        torch.Size([4, 3])
    """

    covariance_form: str
    class_count: Tensor
    class_mean: Tensor
    covariance: Tensor
    covariance_factor: Tensor | None
    log_prior: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        class_counts: Sequence[float] | Tensor | None = None,
        covariance: str = "auto",
        covariance_rank: int = 8,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_statistics(covariance, covariance_rank, class_counts)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        class_counts: Sequence[float] | Tensor | None = None,
        covariance: str = "auto",
        covariance_rank: int = 8,
    ) -> IADAHead:
        """A head that holds the very same ``weight`` and ``bias`` Parameters as ``linear``.

        Raises:
            TypeError: where ``linear`` is no ``nn.Linear`` (quantised and LoRA layers among them).
            ValueError: a ``LazyLinear`` that has not seen a batch.
        """
        require_linear(linear, "linear")
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight, head.bias = linear.weight, linear.bias
        head.train(linear.training)
        head._init_statistics(covariance, covariance_rank, class_counts)
        return head

    def _init_statistics(
        self, covariance: str, rank: int, class_counts: Sequence[float] | Tensor | None = None
    ) -> None:
        if self.out_features < 2:
            raise ValueError(
                f"the classifier has {self.out_features} output: IADA needs a softmax over at least 2 classes. "
                "Use two outputs for a binary task."
            )
        # Statistics need float32 at least, whatever the weights are kept in.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        options = {"dtype": dtype, "device": self.weight.device}
        num_classes, num_features = self.out_features, self.in_features
        shapes = {"class_count": (num_classes,), "class_mean": (num_classes, num_features), "log_prior": (num_classes,)}
        form = covariance_form(covariance, num_classes, num_features, rank)
        shapes |= form.shapes(num_classes, num_features, rank)
        for name in BUFFERS:
            buffer = torch.zeros(shapes[name], **options) if name in shapes else None
            self.register_buffer(name, buffer, persistent=False)
        self.covariance_form = form.name
        if class_counts is not None:
            self.set_class_counts(class_counts)

    @torch.no_grad()
    def set_class_counts(self, class_counts: Sequence[float] | Tensor) -> None:
        """Set the class prior. A class with no sample counts as one, with a warning: ``log 0`` has no gradient.

        Args:
            class_counts: ``[C]`` samples per class, or proportions.

        Raises:
            ValueError: for what is no list of numbers, another length, a negative or non-finite value, or all zeros.
        """
        class_counts = in_label_order(class_counts, self.out_features)
        try:
            counts = torch.as_tensor(class_counts).detach().cpu().double()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"class_counts={class_counts!r:.80}: give a list of one number per class, in label order."
            ) from None
        if counts.shape != (self.out_features,):
            raise ValueError(
                f"class_counts has shape {list(counts.shape)}; the classifier has {self.out_features} classes and needs"
                f" [{self.out_features}], one count per class in label order."
            )
        if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()) or not bool(counts.any()):
            raise ValueError(f"class_counts must be finite, not negative and not all zero, got {counts.tolist()}.")
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            warnings.warn(f"class_counts is 0 for classes {_some(empty)}: the prior counts them as one sample.")
            counts[empty] = min(1.0, float(counts[counts > 0].min()))
        self.log_prior.copy_((counts / counts.sum()).log())

    @property
    def class_covariance(self) -> Covariance:
        """Covariances of all classes in the form that functions take; its tensors are the buffers themselves."""
        form = COVARIANCES[self.covariance_form]
        return form(*(getattr(self, name) for name in form.buffers))

    def update_statistics(
        self, features: Tensor, labels: Tensor, *, means_only: bool = False, weight: Tensor | None = None
    ) -> None:
        """Merge features ``[N, H]`` with labels ``[N]`` into the class means and covariances.

        Args:
            features: ``[N, H]``; a sample with NaN or Inf among them does not count.
            labels: ``[N]``.
            means_only: leave covariances and counts alone, let the means follow as moving averages.
            weight: ``[N]`` of 0 and 1, which samples count; all by default.

        Raises:
            ValueError: labels that are no class indices (their range is looked at on a CPU only).
        """
        if labels.numel() == 0:
            return
        check_labels(labels, features.shape[0], self.out_features, always=False)
        features = features.detach().to(self.class_mean.dtype)
        # A weight, because picking rows would wait for the device.
        finite = features.isfinite().all(dim=1)
        weight = finite if weight is None else finite & (weight > 0)
        covariance = None if means_only else self.class_covariance
        update_class_statistics(self.class_count, self.class_mean, covariance, features, labels.long(), weight)

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forget the class means and covariances; the prior stays."""
        for name in ("class_count", "class_mean", *self.class_covariance.buffers):
            getattr(self, name).zero_()

    def iada_logits(
        self,
        features: Tensor,
        labels: Tensor | None,
        epsilon: Tensor | None = None,
        alpha: float = 0.5,
        beta: float = 1.0,
        fixed_shift: bool = False,
        in_margin: bool = False,
    ) -> Tensor:
        """The IADA logits of a batch, see :func:`iada_plugin.functional.iada_logits`.

        Args:
            features: ``[N, H]`` input of this layer.
            labels: ``[N]``; ``None`` only where neither the variance nor the perturbation term is on.
            epsilon: ``[N]`` or ``None`` for no perturbation term.
            alpha: weight of the variance term, 0 leaves it out.
            beta: weight of the prior term, 0 leaves it out.
            fixed_shift: do not train ``weight`` through the perturbation.
            in_margin: epsilon is in nats of margin.

        Returns:
            ``[N, C]`` in the precision of the statistics.
        """
        dtype = self.covariance.dtype
        bias = None if self.bias is None else whole(self.bias).to(dtype)
        return functional.iada_logits(
            features.to(dtype),
            whole(self.weight).to(dtype),
            bias,
            labels,
            epsilon,
            self.class_covariance,
            self.log_prior,
            alpha,
            beta,
            fixed_shift,
            in_margin,
        )


def in_label_order(counts: Any, num_classes: int) -> Any:
    """Counts as they are, but for a Series of pandas: ``value_counts`` sorts by frequency and leaves empty classes out.

    Raises:
        ValueError: it counts what is no class.
    """
    if not hasattr(counts, "reindex"):
        return counts
    found = counts.reindex(range(num_classes), fill_value=0)
    if found.sum() != counts.sum():
        raise ValueError(
            f"class_counts is a Series over {list(counts.index)!r:.80}: its index must be the classes, 0 to {num_classes - 1}."
        )
    return found.to_numpy(copy=True)


def _some(items: list[Any], limit: int = 10) -> str:
    """The first few items of a list, for messages."""
    return ", ".join(map(str, items[:limit])) + (f" and {len(items) - limit} more" if len(items) > limit else "")
