"""The features of a training batch, and their tangent along the meta gradient."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..config import IADAConfig
from ..runtime.capture import Capture, Forward
from ..runtime.isolation import isolated
from ..runtime.precision import full_precision
from . import hypergradient as hg


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
    """The part of a step that needs the training batch's inputs only, not its pass."""

    step: int
    meta_loss: Tensor
    fine: Tensor
    eta: float
    weight_dot: Tensor | None
    bias_dot: Tensor | None
    inputs: Forward | None = None
    direction: list[Tensor] | None = None  # the scaled meta gradient; not kept where the average gives it again
    features: Tensor | None = None
    features_dot: Tensor | None = None
    displaced: Tensor | None = None  # features at parameters moved along the meta gradient
    distance: Tensor | None = None  # by so much


class Tangents:
    """Directional derivatives of the features in the configured mode.

    Args:
        capture: repeats the model's forward passes.
        parameters: names and values of what is moved.
        config: settings.
    """

    def __init__(self, capture: Capture, parameters: dict[str, nn.Parameter], config: IADAConfig) -> None:
        self.capture, self.parameters, self.config, self.head = capture, parameters, config, capture.head
        self._values = list(parameters.values())
        self._repeatable: bool | None = None
        # Whether the training pass's features are those of a difference pass, bit for bit; known from the first step on.
        self._exact = True

    def go_along(self, probe: Probe, inputs: Forward, direction: list[Tensor]) -> None:
        """Put into ``probe`` what the inputs alone tell of the tangent along ``direction``."""
        probe.inputs = inputs
        if self.config.hypergradient == "head":
            return
        with full_precision(self.capture.device.type):
            if self.config.hypergradient == "forward":
                at = lambda values: self._features(inputs, values)  # noqa: E731
                probe.features, probe.features_dot = hg.forward_tangent(at, self.parameters, direction)
                return
            probe.displaced, probe.distance = hg.displaced_features(
                lambda: self._features(inputs), self._values, direction
            )
            # In the first step too, to see whether a pass can be repeated.
            known = self._exact and self._repeatable is not None
            probe.features = None if known else self._base(inputs)

    def _features(self, inputs: Forward, replaced: dict[str, Tensor] | None = None) -> Tensor:
        """Features ``[N, H]`` of the training batch in full precision, with the dropout masks of its pass."""
        cast = None if self.config.hypergradient == "forward" else self.head.covariance.dtype
        leaves = tree_leaves((inputs.args, inputs.kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and not t.is_inference()]
        versions = [t._version for t in tensors]
        found = self.capture.features_of(
            inputs.args, inputs.kwargs, rng=inputs.rng, replaced=replaced, cast=cast, autocast=False
        )
        if [t._version for t in tensors] != versions:
            raise RuntimeError(
                f"{type(self.capture.model).__name__} changes its input in place, so that a repeated pass sees another one."
                " Work on a copy in its forward, or use IADAConfig(hypergradient='head')."
            )
        features: Tensor = found.features  # type: ignore[assignment]
        if self.config.hypergradient == "finite_difference" and features.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the features are {features.dtype} although autocast is off (FSDP's MixedPrecisionPolicy?): their differences"
                " are noise. Use float32 there and autocast, or IADAConfig(hypergradient='head')."
            )
        return features

    @torch.no_grad()
    def _base(self, inputs: Forward) -> Tensor:
        return self._features(inputs)

    def complete(self, probe: Probe, forward: Forward) -> Tangent:
        """Features and tangent, once the training pass is there."""
        features: Tensor = forward.features.detach()  # type: ignore[union-attr]
        dot = probe.features_dot
        if self.config.hypergradient == "head":
            dot = torch.zeros_like(features)
        elif probe.displaced is not None:
            base = probe.features
            if self._repeatable is None:
                self._check_repeatable(features, base, probe.displaced)  # type: ignore[arg-type]
            self._exact = bool(self._repeatable) and forward.exact and features.dtype == probe.displaced.dtype
            if base is None and not self._exact:
                with isolated(self.capture), full_precision(features.device.type):
                    base = self._base(forward)
            features = features if base is None else base
            dot = (probe.displaced - features) / probe.distance  # type: ignore[operator]
        elif probe.features is not None:
            features = probe.features
        return Tangent(features, dot, probe.weight_dot, probe.bias_dot, probe.meta_loss, probe.fine, probe.eta)  # type: ignore[arg-type]

    def _check_repeatable(self, features: Tensor, again: Tensor, displaced: Tensor) -> None:
        """Once: compare the repeated pass with the displaced one, and with the training pass. Where these are bit-equal, the
        training pass may serve as the base of the difference; where not (autocast, compiled code), the repeated one does.

        Raises:
            RuntimeError: the pass cannot be repeated, so that the difference would be noise.
        """
        size = features.float().norm().clamp_min(1e-6)
        noise, other = ((again - t).float().norm() / size for t in (displaced, features))
        if not bool(torch.isfinite(noise + other)):
            return  # nothing can be told from this batch
        name = type(self.capture.model).__name__
        if bool(noise > 0.2):
            raise RuntimeError(
                f"{name}: the same pass, repeated with the same random state, gives features that differ by"
                f" {100 * float(noise):.0f} %. Finite differences would be noise. Something in the model draws or keeps what"
                " cannot be restored (state outside of buffers): use IADAConfig(hypergradient='head')."
            )
        if bool(other > 0.2):
            warnings.warn(
                f"{name}: the training pass draws other dropout masks than its repetition in float32, as fused attention in"
                " half precision and compiled code do. The meta gradient is then that of the same batch under another mask:"
                " right on average, but noisier. attention_dropout=0 (or attn_implementation='eager') avoids it."
            )
        self._repeatable = torch.equal(again, features)
