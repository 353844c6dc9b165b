"""The passes of a meta step through the model: virtual step, meta gradient, and the order they come in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..config import IADAConfig
from ..functional.labels import check_labels
from ..runtime import sharding
from ..runtime.batches import MetaBatches
from ..runtime.capture import Capture, Forward
from ..runtime.checks import is_out_of_memory
from ..runtime.isolation import isolated, seed_rng
from ..runtime.precision import displaced, meta_precision
from ..runtime.processes import gather_rows, global_mean, weighted_average_, world_size
from .tangents import Probe, Tangent, Tangents
from .virtual_step import LossScale, VirtualStep, loss_gradient


class Passes:
    """Virtual step, meta gradient and tangents; leaves parameters, buffers and random state as they were.

    Args:
        capture: repeats the model's forward passes.
        optimizer: of the model, for its learning rates.
        parameters: names and values of what the virtual step moves.
        batches: endless ``((args, kwargs), labels)``.
        config: settings.
    """

    def __init__(
        self,
        capture: Capture,
        optimizer: Any,
        parameters: dict[str, nn.Parameter],
        batches: MetaBatches,
        config: IADAConfig,
    ) -> None:
        self.capture, self.parameters, self.batches = capture, parameters, batches
        self.config, self.head = config, capture.head
        #: Running average of the meta gradient, one tensor a parameter; with ``meta_momentum``, from the first step on.
        self.average: list[Tensor] | None = None
        #: Step, meta loss and whether it was fine, of a meta gradient that is in the average while its step is not made yet: a
        #: second try takes it from there.
        self.counted: tuple[int, Tensor, Tensor] | None = None
        self._values = list(parameters.values())
        place = {id(p): k for k, p in enumerate(self._values)}
        self._head_places = place.get(id(self.head.weight)), place.get(id(self.head.bias))
        self.virtual = VirtualStep(optimizer, self._values, config)
        self.tangents = Tangents(capture, parameters, config)
        self.scaling = LossScale(capture.device)
        self._ready: Probe | None = None  # for the next training pass
        self._done: tuple[Probe, Forward] | None = None  # not committed yet
        self._checked = False

    @property
    def head_only(self) -> bool:
        """Whether the virtual step moves the classifier only."""
        return self.config.hypergradient == "head"

    def check_batch(self) -> None:
        """Look at the first meta batch, before training: its form and labels.

        Raises:
            ValueError: naming what is wrong.
        """
        with isolated(self.capture):
            (args, kwargs), labels = self.batches.peek(self.config.seed)
            check_labels(labels, labels.shape[0] if labels.dim() else -1, self.head.out_features, always=True)
            cast = self.head.weight.dtype if self.head.weight.dtype == torch.float32 else None
            try:
                features = self._look_at(args, kwargs, cast)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise ValueError(
                    f"the model cannot run a meta batch ({type(error).__name__}: {error}): meta_loader has to yield inputs in"
                    " the form of the training batches."
                ) from error
        if world_size() > 1 and not self.batches.shared_out:
            leaves = [t for t in tree_leaves((args, kwargs, labels)) if isinstance(t, Tensor)]
            sums = gather_rows(torch.stack([t.double().sum() for t in leaves])[None])[0]
            if bool((sums == sums[0]).all()):
                warnings.warn(
                    "all processes get the same meta batches: give each a share of its own, for example by"
                    " iada_plugin.meta_dataloader(dataset, batch_size_over_all_processes, seed), which is not to be prepared."
                )
        if features.shape[0] != labels.shape[0] and features.dim() == 2:  # type: ignore[union-attr]
            raise ValueError(f"a meta batch has {features.shape[0]} inputs and {labels.shape[0]} labels.")  # type: ignore[union-attr]

    @torch.no_grad()
    def _look_at(self, args: Any, kwargs: Any, cast: torch.dtype | None) -> Tensor:
        try:
            found = self.capture.features_of(args, kwargs, cast=cast)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # A model of mixed precision that runs under the caller's autocast only.
            with torch.autocast(self.capture.device.type, dtype=torch.bfloat16):
                found = self.capture.features_of(args, kwargs)
        return found.features  # type: ignore[return-value]

    def before(self, forward: Forward, step: int) -> None:
        """The part of an online step that needs the training batch's inputs only. Taken before its pass, whose activations
        are then never held together with those of another one; idempotent within a step.

        Args:
            forward: inputs and random state of the pass to come.
            step: optimizer step.
        """
        if self._ready is not None and self._ready.step == step:
            return
        kind = self.capture.device.type
        dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
        with isolated(self.capture), torch.autocast(kind, enabled=False):
            batch = self._draw(step)
            found = None if self._is_counted(step) else self._meta_gradient(batch, dtype)
            self._ready = self._probe(forward, found, step)

    def _is_counted(self, step: int) -> bool:
        return self.counted is not None and self.counted[0] == step

    def forget(self) -> None:
        """Drop what was prepared for a step that will not be made, or will be made anew."""
        self._ready = self._done = None

    def online(self, forward: Forward, step: int) -> Tangent:
        """The meta gradient at the current parameters (Eqs. 8 and 9 without the displacement of Eq. 7).

        Args:
            forward: the training pass.
            step: optimizer step; seeds the meta pass's dropout, so that a resumed run repeats it.
        """
        self.before(forward, step)
        probe, self._ready = self._ready, None
        assert probe is not None
        if probe.inputs is not forward:  # several training passes before the loss is taken, of the last one
            with isolated(self.capture):
                self._go_along(probe, forward)
        return self._complete(probe, forward)

    def commit(self) -> None:
        """The step that the last tangent was for has been made. An error or an interrupt before leaves the meta batch and
        the average to the next try."""
        assert self._done is not None
        (probe, forward), self._done, self.counted = self._done, None, None
        self.batches.commit()
        if forward.autocast_dtype == torch.float16:
            self.scaling.adjust(probe.fine)

    def lookahead(self, forward: Forward, train_loss: Callable[[Tensor], Tensor], n: int, step: int) -> Tangent:
        """The meta gradient after a virtual step down ``train_loss`` (Eqs. 7 to 9).

        Args:
            forward: the training pass, whose graph is kept unless ``memory="low"``.
            train_loss: from features ``[N, H]`` to the mean IADA loss.
            n: samples in the training batch.
            step: as for :meth:`online`.
        """
        with isolated(self.capture):
            batch, found = self._draw(step), None
            if not self._is_counted(step):
                with displaced(self._values, self._virtual_step(forward, train_loss, n)):
                    found = self._meta_gradient(batch, forward.autocast_dtype)
            probe = self._probe(forward, found, step)
        return self._complete(probe, forward)

    def _complete(self, probe: Probe, forward: Forward) -> Tangent:
        self._done = probe, forward
        return self.tangents.complete(probe, forward)

    @property
    def _releases_graph(self) -> bool:
        # In mode "head" the virtual step does not go through the backbone, whose graph is there anyway.
        # A CUDA graph cannot run a backward pass twice.
        releases = self.config.memory == "low" or self.capture.cuda_graphs
        return releases and self.config.schedule == "lookahead" and not self.head_only

    def features_to_train(self, forward: Forward) -> Tensor:
        """Features ``[N, H]`` with a graph: those of ``forward``, or of a pass in its place where the step used it up."""
        if not self._releases_graph:
            return forward.features  # type: ignore[return-value]
        with isolated(self.capture), meta_precision(forward.autocast_dtype, self.capture.device.type):
            again = self.capture.features_of(forward.args, forward.kwargs, rng=forward.rng)
        torch.clear_autocast_cache()
        return again.features  # type: ignore[return-value]

    # ---------------------------------------------------------------------------------------------------- virtual step

    def _virtual_step(self, forward: Forward, train_loss: Callable[[Tensor], Tensor], n: int) -> list[Tensor]:
        """Displacement of the parameters (Eq. 7)."""
        loss = train_loss(forward.features.detach() if self.head_only else forward.features)  # type: ignore[union-attr, arg-type]
        move, _ = self._gradient(loss, forward, n, retain_graph=not self._releases_graph)
        rates, _ = self.virtual.rates()
        return self.virtual.scale_(move, [-r for r in rates])

    # --------------------------------------------------------------------------------------------------- meta gradient

    def _gradient(
        self, loss: Tensor, forward: Forward, n: int, retain_graph: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Gradient of a mean over ``n`` samples, and its value, both averaged over the samples of all processes."""
        scale = self.scaling.scale if forward.autocast_dtype == torch.float16 else None
        value = loss.detach().clone()
        if not self.capture.sharded:
            gradient = loss_gradient(loss, self._values, scale, retain_graph)
            weighted_average_([*gradient, value], n)
            return gradient, value
        loss = global_mean(loss, n)
        if self.head_only:
            gradient = [sharding.local(g) for g in loss_gradient(loss, self._values, scale, retain_graph)]
        else:
            loss = sharding.tie(loss if scale is None else loss * scale, forward.outputs)
            gradient = sharding.backward_gradient(loss, self._values, self.capture.model)
            gradient = gradient if scale is None else [g / scale for g in gradient]
        weighted_average_([value], n)
        return gradient, value

    def _draw(self, step: int) -> Any:
        """The next meta batch; its augmentation, and the meta pass after it, run from a seed of the step's own."""
        seed = (self.config.seed * 1_000_003 + step) % 2**31
        batch = self.batches.draw(seed)
        seed_rng(self.capture.device, seed)
        return batch

    def _meta_gradient(self, batch: Any, autocast_dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
        """Meta loss (plain cross-entropy) and its gradient at the current parameters."""
        (args, kwargs), labels = batch
        with meta_precision(autocast_dtype, labels.device.type), torch.set_grad_enabled(not self.head_only):
            forward = self.capture.features_of(args, kwargs)
        torch.clear_autocast_cache()
        check_labels(labels, forward.features.shape[0], self.head.out_features, always=not self._checked)  # type: ignore[union-attr]
        self._checked, labels = True, labels.long()
        loss = F.cross_entropy(self.head.iada_logits(forward.features, None, alpha=0, beta=0), labels)  # type: ignore[arg-type]
        v, value = self._gradient(loss, forward, labels.numel())
        return value, v

    def _averaged(self, meta_loss: Tensor, v: list[Tensor]) -> Tensor:
        """Turn the last meta gradient into the running average, in place; returns whether it was finite (else it is left
        out)."""
        fine = torch.isfinite(meta_loss) & torch.isfinite(sharding.norm(v, self.capture.sharded))
        if self.config.momentum:
            old = self.average or [torch.zeros_like(t) for t in v]
            if fine.device.type != "cpu" or not bool(fine):  # on a CPU looking costs nothing, and saves the copies
                torch._foreach_copy_(v, [torch.where(fine, new, kept) for new, kept in zip(v, old, strict=True)])
            if self.average is not None:
                torch._foreach_lerp_(v, old, self.config.momentum)
        return fine

    # -------------------------------------------------------------------------------------------------------- tangents

    def _probe(self, inputs: Forward, found: tuple[Tensor, list[Tensor]] | None, step: int) -> Probe:
        """Average the meta gradient that was ``found`` with its loss, unless it is in the average already, and go along it."""
        if found is None:
            _, meta_loss, fine = self.counted  # type: ignore[misc]
            v: list[Tensor] = self.average  # type: ignore[assignment]
        else:
            meta_loss, v = found
            fine = self._averaged(meta_loss, v)
            if self.config.momentum > 0:
                self.average, self.counted = v, (step, meta_loss, fine)
        _, eta = self.virtual.rates()
        direction = self._direction(v)
        weight_dot, bias_dot = (
            None if place is None else sharding.whole_like(direction[place], self._values[place])
            for place in self._head_places
        )
        probe = Probe(step, meta_loss, fine, eta, weight_dot, bias_dot, inputs, direction)
        self._go_along(probe, inputs)
        if self.config.momentum > 0:  # the average gives the direction again where that is needed
            probe.direction = None
        return probe

    def _direction(self, v: list[Tensor]) -> list[Tensor]:
        """The meta gradient as the virtual step sees it; eta_1 is divided out: Omega's Adam and the relative step of Sigma do
        not depend on its size."""
        rates, eta = self.virtual.rates()
        if self.config.virtual_step == "sgd" and all(r == eta for r in rates):
            return v
        return self.virtual.scale_([t.clone() for t in v], [r / eta for r in rates])

    def _go_along(self, probe: Probe, inputs: Forward) -> None:
        direction = probe.direction
        if direction is None:
            direction = self._direction(self.average)  # type: ignore[arg-type]
        self.tangents.go_along(probe, inputs, direction)
