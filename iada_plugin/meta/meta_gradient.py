"""The gradient of the meta loss, averaged over processes and, where asked, over meta steps."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..functional.labels import check_labels
from ..runtime import sharding
from ..runtime.batches import MetaBatches
from ..runtime.capture import Capture, Forward, WrittenWeightError
from ..runtime.failures import is_out_of_memory
from ..runtime.isolation import seed_rng
from ..runtime.precision import meta_precision
from ..runtime.processes import gather_rows, global_mean, weighted_average_, world_size
from .virtual_step import LossScale, loss_gradient


class MetaGradient:
    """Draws meta batches and differentiates their plain cross-entropy.

    Args:
        capture: repeats the model's forward passes.
        parameters: names and values of what the virtual step moves.
        batches: endless ``((args, kwargs), labels)``.
        head_only: differentiate by the last layer only.
        momentum: decay of the running average over meta steps; 0 for none.
        seed: of the meta passes.
    """

    def __init__(
        self,
        capture: Capture,
        parameters: dict[str, torch.nn.Parameter],
        batches: MetaBatches,
        *,
        head_only: bool,
        momentum: float,
        seed: int,
    ) -> None:
        self.capture, self.head, self.batches = capture, capture.head, batches
        self.parameters, self._values = parameters, list(parameters.values())
        self.head_only, self.momentum, self.seed = head_only, momentum, seed
        #: Running average of the meta gradient, one tensor a parameter; with ``momentum``, from the first step on.
        self.average: list[Tensor] | None = None
        self.scaling = LossScale(capture.device)
        self._checked = False

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """The average (whole, where parameters are sharded), the loss scale, and which meta batch comes next."""
        found = {"loss_scale": torch.stack([self.scaling.scale, self.scaling.streak])}
        if self.average is not None:
            for (name, p), t in zip(self.parameters.items(), self.average, strict=True):
                found[f"average.{name}"] = sharding.whole_like(t, p)
        return {**found, "position": torch.tensor(self.batches.position)}

    def expected(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The average is there from the first meta step on."""
        wanted = {k: v for k, v in self.state_dict().items() if not k.startswith("average.")}
        if any(k.startswith("average.") for k in state):
            wanted |= {f"average.{name}": p for name, p in self.parameters.items()}
        return wanted

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there.

        Raises:
            ValueError: the meta loader is shorter than it was; nothing is changed then.
        """
        self.batches.move_to(state["position"].tolist())
        self.scaling.scale, self.scaling.streak = state["loss_scale"].to(self.capture.device, copy=True)
        kept = self.momentum > 0 and any(k.startswith("average.") for k in state)
        values = [sharding.part_like(state[f"average.{n}"], p) for n, p in self.parameters.items()] if kept else None
        self.average = values

    def commit(self, average: list[Tensor] | None, fine: Tensor, half: bool) -> None:
        """The step with the last meta batch was made."""
        self.batches.commit()
        if average is not None:
            self.average = average
        if half:
            self.scaling.adjust(fine)

    # ------------------------------------------------------------------------------------------------------ gradients

    def of(self, loss: Tensor, forward: Forward, n: int, retain_graph: bool = False) -> tuple[list[Tensor], Tensor]:
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

    def draw(self, step: int) -> Any:
        """The next meta batch; its augmentation, and the meta pass after it, run from a seed of the step's own."""
        seed = (self.seed * 1_000_003 + step) % 2**31
        batch = self.batches.draw(seed)
        seed_rng(self.capture.device, seed)
        return batch

    def at_parameters(self, batch: Any, autocast_dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
        """Meta loss (plain cross-entropy) and its gradient at the current parameters."""
        (args, kwargs), labels = batch
        with meta_precision(autocast_dtype, labels.device.type), torch.set_grad_enabled(not self.head_only):
            forward = self.capture.features_of(args, kwargs)
        torch.clear_autocast_cache()
        check_labels(labels, forward.features.shape[0], self.head.out_features, always=not self._checked)  # type: ignore[union-attr]
        self._checked, labels = True, labels.long()
        loss = F.cross_entropy(self.head.iada_logits(forward.features, None, alpha=0, beta=0), labels)  # type: ignore[arg-type]
        v, value = self.of(loss, forward, labels.numel())
        return value, v

    def averaged(self, meta_loss: Tensor, v: list[Tensor]) -> Tensor:
        """Turn a meta gradient into the running average with it, in place; :meth:`commit` makes that the average. Returns
        whether it was finite (else it is left out)."""
        fine = torch.isfinite(meta_loss) & torch.isfinite(sharding.norm(v, self.capture.sharded))
        if self.momentum:
            old = self.average or [torch.zeros_like(t) for t in v]
            if fine.device.type != "cpu" or not bool(fine):  # on a CPU looking costs nothing, and saves the copies
                torch._foreach_copy_(v, [torch.where(fine, new, kept) for new, kept in zip(v, old, strict=True)])
            if self.average is not None:
                torch._foreach_lerp_(v, old, self.momentum)
        return fine

    # ------------------------------------------------------------------------------------------------- before training

    def check_batch(self) -> None:
        """Look at the first meta batch, before training: its form and labels.

        Raises:
            ValueError: naming what is wrong.
        """
        with self.capture.isolated():
            (args, kwargs), labels = self.batches.peek(self.seed)
            check_labels(labels, labels.shape[0] if labels.dim() else -1, self.head.out_features, always=True)
            cast = self.head.weight.dtype if self.head.weight.dtype == torch.float32 else None
            try:
                features = self._look_at(args, kwargs, cast)
            except Exception as error:
                if is_out_of_memory(error) or isinstance(error, WrittenWeightError):
                    raise
                raise ValueError(
                    f"the model cannot run a meta batch ({type(error).__name__}: {error}): meta samples have to come in the form of the"
                    " training batches."
                ) from error
        if world_size() > 1 and not self.batches.shared_out:
            leaves = [t for t in tree_leaves((args, kwargs, labels)) if isinstance(t, Tensor)]
            sums = gather_rows(torch.stack([t.double().sum() for t in leaves])[None])[0]
            if bool((sums == sums[0]).all()):
                warnings.warn(
                    "all processes get the same meta batches: give each a share of its own, for example by"
                    " iada_plugin.meta_dataloader(dataset, batch_size_over_all_processes, seed), which is not to be prepared."
                )
        if features.shape[0] != labels.shape[0] and features.dim() == 2:
            raise ValueError(f"a meta batch has {features.shape[0]} inputs and {labels.shape[0]} labels.")

    @torch.no_grad()
    def _look_at(self, args: Any, kwargs: Any, cast: torch.dtype | None) -> Tensor:
        try:
            found = self.capture.features_of(args, kwargs, cast=cast)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # A model of mixed precision that runs under the caller's autocast only?
            try:
                with torch.autocast(self.capture.device.type, dtype=torch.bfloat16):
                    found = self.capture.features_of(args, kwargs)
            except Exception:
                raise error from None
        return found.features  # type: ignore[return-value]
