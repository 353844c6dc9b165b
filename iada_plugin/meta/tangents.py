"""The features of a training batch and their tangent along the meta gradient: one class for each way to get it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..config import IADAConfig
from ..runtime.capture import Capture, Forward
from ..runtime.checks import REENTRANT
from ..runtime.precision import RELATIVE_STEP, full_precision
from ..runtime.sharding import is_fsdp, is_sharded
from .difference import displaced_features, forward_tangent


class Tangent(NamedTuple):
    """What a meta step learns from."""

    features: Tensor  # [N, H] of the training batch
    features_dot: Tensor  # [N, H] their tangent along the meta gradient
    weight_dot: Tensor | None  # [C, H] the meta gradient of the classifier; None where it is not trained
    bias_dot: Tensor | None  # [C]
    meta_loss: Tensor  # []
    fine: Tensor  # [] whether the meta loss and its gradient are finite
    eta: float  # the learning rate of the virtual step, which is divided out of the tangents


@dataclass
class Probe:
    """The part of a meta step that needs the training batch's inputs only, not its pass."""

    meta_loss: Tensor  # []
    fine: Tensor  # []
    eta: float
    weight_dot: Tensor | None
    bias_dot: Tensor | None
    inputs: Forward
    average: list[Tensor] | None = None  # the running average of the meta gradient with this step's in it
    direction: list[Tensor] | None = None  # the meta gradient; not kept where the average gives it again
    features: Tensor | None = None
    features_dot: Tensor | None = None
    displaced: Tensor | None = None  # features at parameters moved along the meta gradient
    distance: Tensor | None = None  # by so much


class Tangents:
    """Directional derivatives of the features.

    Args:
        capture: repeats the model's forward passes.
        parameters: names and values of what is moved.
    """

    #: The virtual step moves the classifier only.
    head_only: ClassVar[bool] = False
    #: Half-precision inputs are cast to the precision of the statistics.
    casts: ClassVar[bool] = True

    def __init__(self, capture: Capture, parameters: dict[str, nn.Parameter]) -> None:
        self.capture, self.parameters, self.head = capture, parameters, capture.head
        self._values = list(parameters.values())

    @classmethod
    def check(cls, model: nn.Module, config: IADAConfig) -> None:
        """Refuse a model for which this way does not work.

        Raises:
            ValueError: with what to use instead.
        """
        refuse_reentrant_checkpointing(model)
        sparse = [n for n, m in model.named_modules() if getattr(m, "sparse", False) and isinstance(m, _EMBEDDINGS)]
        if sparse:
            raise ValueError(f"{sparse[0]} has sparse gradients, which cannot be a displacement: use sparse=False.")

    @classmethod
    def parameters_of(cls, model: nn.Module, head: nn.Linear, config: IADAConfig) -> dict[str, nn.Parameter]:
        """The trainable parameters that the virtual step moves, by name.

        Raises:
            ValueError: there are none, or they are of a kind that cannot be moved.
        """
        own = {id(head.weight), id(head.bias)}
        parameters = {
            name: p for name, p in model.named_parameters() if p.requires_grad and (not cls.head_only or id(p) in own)
        }
        if not parameters:
            what = "the classifier" if cls.head_only else "the model"
            raise ValueError(f"{what} has no trainable parameter (requires_grad): there is nothing to augment for.")
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError("DeepSpeed ZeRO-3 shards the parameters: use stage 1 or 2, or FSDP2 (fully_shard).")
        if any(map(is_sharded, model.parameters())) and not is_fsdp(model):
            raise ValueError(
                f"{type(model).__name__} has parameters that are spread over processes, but not by fully_shard on the model"
                " itself (torch >= 2.6): tensor parallelism is not supported; call fully_shard(model) last."
            )
        cls.check(model, config)
        return parameters

    def go_along(self, probe: Probe, inputs: Forward, direction: list[Tensor]) -> None:
        """Put into ``probe`` what the inputs alone tell of the tangent along ``direction``."""
        raise NotImplementedError

    def of(self, probe: Probe, forward: Forward) -> tuple[Tensor, Tensor]:
        """Features and tangent ``[N, H]``, once the training pass is there."""
        raise NotImplementedError

    def complete(self, probe: Probe, forward: Forward) -> Tangent:
        """All that the meta step learns from."""
        features, dot = self.of(probe, forward)
        return Tangent(features, dot, probe.weight_dot, probe.bias_dot, probe.meta_loss, probe.fine, probe.eta)

    def _features(self, inputs: Forward, replaced: dict[str, Tensor] | None = None) -> Tensor:
        """Features ``[N, H]`` of the training batch in full precision, with the dropout masks of its pass."""
        leaves = tree_leaves((inputs.args, inputs.kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and not t.is_inference()]
        versions = [t._version for t in tensors]
        found = self.capture.features_of(
            inputs.args,
            inputs.kwargs,
            rng=inputs.rng,
            start=inputs.start,
            replaced=replaced,
            cast=self.head.covariance.dtype if self.casts else None,
            autocast=False,
        )
        if [t._version for t in tensors] != versions:
            raise RuntimeError(
                f"{type(self.capture.model).__name__} changes its input in place, so that a repeated pass sees another one."
                " Work on a copy in its forward, or use IADAConfig(hypergradient='head')."
            )
        return found.features  # type: ignore[return-value]


class FiniteDifference(Tangents):
    """The difference of two passes in full precision, one of them at parameters moved a little along the meta gradient."""

    def __init__(self, capture: Capture, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(capture, parameters)
        self._repeatable: bool | None = None
        # Whether the training pass's features are those of a difference pass, bit for bit; known from the first step on.
        self._exact = True

    @classmethod
    def check(cls, model: nn.Module, config: IADAConfig) -> None:
        """Differences need weights in float32."""
        super().check(model, config)
        coarse = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype not in RELATIVE_STEP}
        if coarse:
            raise ValueError(
                f"hypergradient='finite_difference' needs float32 weights, got {', '.join(map(str, coarse))}: a difference"
                " of half-precision features is noise. Keep float32 weights under autocast (bf16=True in the Trainer), or"
                " use hypergradient='forward' or 'head'."
            )

    def go_along(self, probe: Probe, inputs: Forward, direction: list[Tensor]) -> None:
        """The displaced pass; in the first step the undisplaced one too, and again, to see whether a pass can be repeated."""
        probe.inputs = inputs
        with full_precision(self.capture.device.type):
            probe.displaced, probe.distance = displaced_features(
                lambda: self._features(inputs), self._values, direction
            )
            known = self._exact and self._repeatable is not None
            probe.features = None if known else self._base(inputs)
            if self._repeatable is None:
                self._check_repeatable(probe.features, self._base(inputs), probe.displaced)  # type: ignore[arg-type]

    @torch.no_grad()
    def _base(self, inputs: Forward) -> Tensor:
        return self._features(inputs)

    def _features(self, inputs: Forward, replaced: dict[str, Tensor] | None = None) -> Tensor:
        features = super()._features(inputs, replaced)
        if features.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the features are {features.dtype} although autocast is off (FSDP's MixedPrecisionPolicy?): their differences"
                " are noise. Use float32 there and autocast, or IADAConfig(hypergradient='head')."
            )
        return features

    def of(self, probe: Probe, forward: Forward) -> tuple[Tensor, Tensor]:
        """The training pass is the base of the difference where it is exact, else a pass of its own."""
        features: Tensor = forward.features.detach()  # type: ignore[union-attr]
        base, displaced = probe.features, probe.displaced
        assert displaced is not None
        if self._repeatable is None:
            self._compare(features, base, forward.exact and features.dtype == displaced.dtype)  # type: ignore[arg-type]
        self._exact = bool(self._repeatable) and forward.exact and features.dtype == displaced.dtype
        if base is None and not self._exact:
            with self.capture.isolated(), full_precision(features.device.type):
                base = self._base(forward)
        features = features if base is None else base
        return features, (displaced - features) / probe.distance

    def _check_repeatable(self, base: Tensor, again: Tensor, displaced: Tensor) -> None:
        """Once: two passes at the same parameters are the same, but for rounding in another order as some kernels on GPUs have it.

        Raises:
            RuntimeError: the pass cannot be repeated, so that the difference would be noise.
        """
        noise, size = (again - base).norm(), base.norm()
        rounding = 16 * torch.finfo(base.dtype).eps * size
        if bool(noise > rounding) and bool(noise > 0.05 * (displaced - base).norm()):
            self._refuse(noise / size)

    def _refuse(self, error: Tensor) -> None:
        raise RuntimeError(
            f"{type(self.capture.model).__name__}: the same pass, repeated with the same random state, gives features that differ by"
            f" {100 * float(error):.2g} %, whereby finite differences are noise. Something in the model draws or keeps what cannot be"
            " restored (a generator or state that is not on its modules): use IADAConfig(hypergradient='head')."
        )

    def _compare(self, features: Tensor, base: Tensor, exact: bool) -> None:
        """Once: where the training pass's features are those of its repetition, bit for bit, they may serve as the base of the
        difference; where not (autocast, compiled code), the repeated ones do."""
        self._repeatable = torch.equal(base, features)
        error = (base - features).norm() / base.norm().clamp_min(torch.finfo(base.dtype).tiny)
        if not bool(torch.isfinite(error)):
            self._repeatable = None  # nothing can be told from this batch
        elif exact and bool(error > 1e-3):
            self._refuse(error)
        elif bool(error > 0.2):
            warnings.warn(
                f"{type(self.capture.model).__name__}: the training pass draws other dropout masks than its repetition in float32, as"
                " fused attention in half precision and compiled code do. The meta gradient is then that of the same batch under another"
                " mask: right on average, but noisier. attention_dropout=0 (or attn_implementation='eager') avoids it."
            )


class ForwardMode(Tangents):
    """Forward-mode automatic differentiation: exact, also with weights in half precision."""

    casts = False

    @classmethod
    def check(cls, model: nn.Module, config: IADAConfig) -> None:
        """It replaces parameters, which sharded ones cannot be."""
        super().check(model, config)
        if any(map(is_sharded, model.parameters())):
            raise ValueError(
                "hypergradient='forward' needs whole parameters, and FSDP shards them: use 'finite_difference' with"
                " IADAConfig(schedule='online'), or hypergradient='head'."
            )

    def go_along(self, probe: Probe, inputs: Forward, direction: list[Tensor]) -> None:
        """A pass that carries the tangent along."""
        probe.inputs = inputs
        at: Callable[[dict[str, Tensor]], Tensor] = lambda values: self._features(inputs, values)  # noqa: E731
        with full_precision(self.capture.device.type):
            probe.features, probe.features_dot = forward_tangent(at, self.parameters, direction)  # type: ignore[arg-type]

    def of(self, probe: Probe, forward: Forward) -> tuple[Tensor, Tensor]:
        """What the pass gave."""
        return probe.features, probe.features_dot  # type: ignore[return-value]


class LastLayer(Tangents):
    """The virtual step moves the last layer only, so the features stay: the cheapest, an approximation."""

    head_only = True

    @classmethod
    def check(cls, model: nn.Module, config: IADAConfig) -> None:
        """No pass goes through the backbone."""

    def go_along(self, probe: Probe, inputs: Forward, direction: list[Tensor]) -> None:
        """Nothing to do."""
        probe.inputs = inputs

    def of(self, probe: Probe, forward: Forward) -> tuple[Tensor, Tensor]:
        """A tangent of zero."""
        features: Tensor = forward.features.detach()  # type: ignore[union-attr]
        return features, torch.zeros_like(features)


#: By the setting ``hypergradient``.
TANGENTS: dict[str, type[Tangents]] = {
    "finite_difference": FiniteDifference,
    "forward": ForwardMode,
    "head": LastLayer,
}

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Refuse transformers' reentrant gradient checkpointing, which cannot do ``torch.autograd.grad``."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(REENTRANT)
