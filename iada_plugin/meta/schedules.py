"""When, and where, the meta gradient is taken: one class for each schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import IADAConfig
from ..runtime import sharding
from ..runtime.batches import MetaBatches
from ..runtime.capture import Capture, Forward
from ..runtime.precision import displaced, meta_precision
from .meta_gradient import MetaGradient
from .tangents import TANGENTS, Probe, Tangent
from .virtual_step import VirtualStep


class Schedule:
    """Virtual step, meta gradient and tangent of a meta step; leaves parameters, buffers and random state as they were.

    Args:
        capture: repeats the model's forward passes.
        optimizer: of the model, for its learning rates.
        parameters: names and values of what the virtual step moves.
        batches: endless ``((args, kwargs), labels)``.
        config: settings.
    """

    #: Default of the setting ``meta_momentum``.
    momentum: ClassVar[float]
    #: Meta samples per training sample, by default.
    share: ClassVar[float]

    def __init__(
        self,
        capture: Capture,
        optimizer: Any,
        parameters: dict[str, nn.Parameter],
        batches: MetaBatches,
        config: IADAConfig,
    ) -> None:
        self.capture, self.config, self.head = capture, config, capture.head
        self._values = list(parameters.values())
        place = {id(p): k for k, p in enumerate(self._values)}
        self._head_places = place.get(id(self.head.weight)), place.get(id(self.head.bias))
        self.virtual = VirtualStep(optimizer, parameters, config.virtual_lr)
        self.tangents = TANGENTS[config.hypergradient](capture, parameters)
        self.gradient = MetaGradient(
            capture,
            parameters,
            batches,
            head_only=self.tangents.head_only,
            momentum=self.momentum if config.meta_momentum is None else config.meta_momentum,
            seed=config.seed,
        )

    @classmethod
    def check(cls, model: nn.Module, config: IADAConfig) -> None:
        """Refuse a model for which this schedule does not work.

        Raises:
            ValueError: with what to use instead.
        """

    @classmethod
    def meta_batch(cls, config: IADAConfig, train_batch: int) -> int:
        """Meta samples per meta step for so many training samples."""
        return config.meta_batch_size or max(min(train_batch, 16), int(train_batch * cls.share))

    def before_pass(self, forward: Forward, step: int) -> Probe | None:
        """The part of a meta step that can be taken before the training pass, from its inputs; ``None`` where there is none.

        Args:
            forward: inputs and random state of the pass to come.
            step: optimizer step; seeds the meta pass's dropout, so that a resumed run repeats it.
        """
        return None

    def tangent(
        self, forward: Forward, probe: Probe | None, train_loss: Callable[[Tensor], Tensor], n: int, step: int
    ) -> tuple[Tangent, Probe]:
        """The training features and their tangent along the meta gradient.

        Args:
            forward: the training pass.
            probe: what :meth:`before_pass` gave.
            train_loss: from features ``[N, H]`` to the mean IADA loss.
            n: samples in the training batch.
            step: optimizer step.
        """
        raise NotImplementedError

    def features_to_train(self, forward: Forward) -> Tensor:
        """Features ``[N, H]`` with a graph: those of ``forward``, or of a pass in its place where the step used it up."""
        return forward.features  # type: ignore[return-value]

    def _probe(self, inputs: Forward, found: tuple[Tensor, list[Tensor]]) -> Probe:
        """Go along the meta gradient that was ``found`` with its loss."""
        meta_loss, v = found
        fine = self.gradient.averaged(meta_loss, v)
        direction, eta = self.virtual.direction(v)
        weight_dot, bias_dot = (
            None if place is None else sharding.whole_like(direction[place], self._values[place])
            for place in self._head_places
        )
        probe = Probe(meta_loss, fine, eta, weight_dot, bias_dot, inputs)
        if self.gradient.momentum > 0:
            probe.average = v
        else:
            probe.direction = direction
        self.tangents.go_along(probe, inputs, direction)
        return probe


class Lookahead(Schedule):
    """The meta gradient after a virtual step down the training loss, as the paper (Eqs. 7 to 9)."""

    momentum, share = 0.0, 1.0

    @classmethod
    def check(cls, model: nn.Module, config: IADAConfig) -> None:
        """The virtual step moves whole parameters."""
        if any(map(sharding.is_sharded, model.parameters())) and not TANGENTS[config.hypergradient].head_only:
            raise ValueError(
                "schedule='lookahead' needs whole parameters, and FSDP shards them: use IADAConfig(schedule='online'), or"
                " hypergradient='head'."
            )

    def tangent(
        self, forward: Forward, probe: Probe | None, train_loss: Callable[[Tensor], Tensor], n: int, step: int
    ) -> tuple[Tangent, Probe]:
        """Virtual step, meta pass there, and back."""
        with self.capture.isolated():
            batch = self.gradient.draw(step)
            with displaced(self._values, self._virtual_step(forward, train_loss, n)):
                found = self.gradient.at_parameters(batch, forward.autocast_dtype)
            probe = self._probe(forward, found)
        return self.tangents.complete(probe, forward), probe

    def _virtual_step(self, forward: Forward, train_loss: Callable[[Tensor], Tensor], n: int) -> list[Tensor]:
        """Displacement of the parameters (Eq. 7)."""
        head_only = self.tangents.head_only
        loss = train_loss(forward.features.detach() if head_only else forward.features)  # type: ignore[union-attr, arg-type]
        gradient, _ = self.gradient.of(loss, forward, n, retain_graph=not self._releases_graph)
        return self.virtual.displacement(gradient)

    @property
    def _releases_graph(self) -> bool:
        # Where only the head moves, the virtual step does not go through the backbone, whose graph is there anyway.
        # A CUDA graph cannot run a backward pass twice.
        return (self.config.memory == "low" or self.capture.cuda_graphs) and not self.tangents.head_only

    def features_to_train(self, forward: Forward) -> Tensor:
        """A repeated pass with ``memory="low"``."""
        if not self._releases_graph:
            return forward.features  # type: ignore[return-value]
        with self.capture.isolated(), meta_precision(forward.autocast_dtype, self.capture.device.type):
            again = self.capture.features_of(forward.args, forward.kwargs, rng=forward.rng, start=forward.start)
        torch.clear_autocast_cache()
        return again.features  # type: ignore[return-value]


class Online(Schedule):
    """The meta gradient at the current parameters: Eqs. 8 and 9 without the displacement of Eq. 7, an approximation that is
    poor on an untrained network. The passes come before the training pass, whose activations are then never held together
    with those of another one."""

    momentum, share = 0.8, 0.25

    def before_pass(self, forward: Forward, step: int) -> Probe:
        """The whole of it but the training pass's features."""
        kind = self.capture.device.type
        dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
        with self.capture.isolated(), torch.autocast(kind, enabled=False):
            batch = self.gradient.draw(step)
            return self._probe(forward, self.gradient.at_parameters(batch, dtype))

    def tangent(
        self, forward: Forward, probe: Probe | None, train_loss: Callable[[Tensor], Tensor], n: int, step: int
    ) -> tuple[Tangent, Probe]:
        """Put the probe and the training pass together."""
        if probe is None:
            probe = self.before_pass(forward, step)
        elif probe.inputs is not forward:  # several training passes before the loss is taken, of the last one
            direction = probe.direction or self.virtual.direction(probe.average)[0]  # type: ignore[arg-type]
            with self.capture.isolated():
                self.tangents.go_along(probe, forward, direction)
        return self.tangents.complete(probe, forward), probe


#: By the setting ``schedule``.
SCHEDULES: dict[str, type[Schedule]] = {"lookahead": Lookahead, "online": Online}
