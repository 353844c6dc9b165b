"""One meta step: virtual step, perturbation network, class covariances (Eqs. 7 to 9 of the paper)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import hypergradient as hg
from .batches import MetaBatches
from .capture import Capture, Forward, isolated, seed_rng
from .checks import REENTRANT, check_labels
from .config import IADAConfig
from .covariance import LowRank, plain_step, put, relative_step, take
from .distributed import gather_rows, weighted_average_
from .head import IADAHead
from .perturbation import EpsilonLog, PerturbationNetwork


def mean_loss(logits: Tensor, labels: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Cross-entropy: the mean, or the sum over ``denominator``."""
    if denominator is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / denominator


class MetaStep:
    """What is learned on the meta set, Omega and Sigma, and how.

    Args:
        capture: repeats the model's forward passes.
        optimizer: of the model, for its learning rates.
        parameters: names and values of what the virtual step moves.
        batches: endless ``((args, kwargs), labels)``.
        num_characteristics: K.
        config: settings.
    """

    def __init__(
        self,
        capture: Capture,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
        batches: MetaBatches,
        num_characteristics: int,
        config: IADAConfig,
    ) -> None:
        self.capture, self.optimizer, self.parameters = capture, optimizer, parameters
        self.batches, self.config = batches, config
        self.head: IADAHead = capture.head
        self.perturbation = PerturbationNetwork(
            num_characteristics, epsilon_range=config.epsilon_range, seed=config.seed
        ).to(self.head.covariance.device, self.head.covariance.dtype)
        device = self.head.covariance.device
        # On an accelerator Adam's step count stays there too.
        self.meta_optimizer = torch.optim.Adam(
            self.perturbation.parameters(), lr=config.meta_lr, capturable=device.type == "cuda"
        )
        self.log = EpsilonLog(self.head.out_features)
        self._skipped = torch.zeros((), dtype=torch.long, device=device)
        self._ready: tuple[int, Tensor, list[Tensor]] | None = None  # step, meta loss and its gradient, of before_pass
        #: Running average of the meta gradient, one tensor a parameter; with ``meta_momentum``, from the first step on.
        self.average: list[Tensor] | None = None
        self._checked = self._warned = False
        self._repeatable: bool | None = None

    @torch.no_grad()
    def epsilon(self, f: Tensor) -> Tensor:
        """Perturbation sizes for characteristics ``[N, K]``: ``[N]``."""
        return self.perturbation(f)

    def logits(self, features: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """IADA logits ``[N, C]`` with the configured terms."""
        config = self.config
        epsilon = epsilon * self._delta_size(labels)
        return self.head.iada_logits(
            features, labels, epsilon, config.alpha, config.beta, config.fixed_shift, self._in_margin
        )

    def train_loss(
        self, features: Tensor, labels: Tensor, epsilon: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor:
        """IADA loss of a batch: its mean, or its sum over ``denominator``."""
        return mean_loss(self.logits(features, labels, epsilon), labels, denominator)

    @property
    def _in_margin(self) -> bool:
        return self.config.perturbation_scale == "margin"

    def _delta_size(self, labels: Tensor) -> Tensor | float:
        """Size of delta at epsilon = 1, in nats or feature units: ``[N]``, or the same for all samples."""
        size = self.config.perturbation_size
        if self.config.perturbation_scale == "feature_std":
            return size * self.head.feature_std()[labels]
        return size

    def before_pass(self, step: int) -> None:
        """The part of an online step that needs no training batch. Taken before the training pass, so that the two
        passes' activations are never held together; idempotent within a step.

        Args:
            step: optimizer step.
        """
        if self._ready is not None and self._ready[0] == step:
            return
        kind = self.capture.device.type
        dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
        with isolated(self.capture), torch.autocast(kind, enabled=False):
            self._ready = (step, *self._meta_gradient(self._draw(step), list(self.parameters.values()), dtype))

    def __call__(self, forward: Forward, labels: Tensor, f: Tensor, step: int) -> Tensor:
        """Update Omega and Sigma. The model's parameters and buffers and the random state end as they were.

        Args:
            forward: the train batch's pass.
            labels: ``[N]``.
            f: ``[N, K]``.
            step: optimizer step; seeds the meta pass's dropout, so that a resumed run repeats it.

        Returns:
            Features ``[N, H]`` to take the loss of: those of ``forward``, whose graph is kept, or with ``memory="low"``
            those of a new pass.
        """
        parameters = list(self.parameters.values())
        lookahead = self.config.schedule == "lookahead"
        # In mode "head" the virtual step does not reach the backbone, whose graph is there anyway.
        again = lookahead and self.config.memory == "low" and not self._head_only
        if not lookahead:
            self.before_pass(step)
        with isolated(self.capture):
            rates, eta = self._virtual_rates(parameters)
            scaling = self._adaptive_scaling(parameters)
            if self._ready is not None and not lookahead:
                (_, meta_loss, v), self._ready = self._ready, None
            else:
                batch = self._draw(step)
                move = self._train_gradient(forward, labels, f, parameters, retain_graph=not again)
                torch._foreach_mul_(move, [-r for r in rates])
                if scaling is not None:
                    torch._foreach_mul_(move, scaling)
                with hg.displaced(parameters, move):
                    del move[:]
                    meta_loss, v = self._meta_gradient(batch, parameters, forward.autocast_dtype)
            fine = self._average(meta_loss, v)
            # eta_1 is divided out: Omega's Adam and the relative step of Sigma do not depend on its size.
            torch._foreach_mul_(v, [r / eta for r in rates])
            if scaling is not None:
                torch._foreach_mul_(v, scaling)
            features, features_dot = self._features_and_tangent(forward, v)
        self._update(features, features_dot, v, labels, f, meta_loss, fine, eta)
        return self._repeat(forward) if again else forward.features  # type: ignore[return-value]

    def _average(self, meta_loss: Tensor, v: list[Tensor]) -> Tensor:
        """Put the running average of the meta gradients in the place of the last one; returns whether that was finite."""
        fine = torch.isfinite(meta_loss) & torch.isfinite(torch.stack(torch._foreach_norm(v))).all()
        momentum = self.config.meta_momentum
        if momentum == 0:
            return fine
        if self.average is None:
            self.average = [torch.where(fine, new, 0) for new in v]
        else:
            kept = [torch.where(fine, new, old) for new, old in zip(v, self.average, strict=True)]
            torch._foreach_lerp_(self.average, kept, 1 - momentum)
        torch._foreach_copy_(v, self.average)
        return fine

    def _repeat(self, forward: Forward) -> Tensor:
        """The training pass once more, for a graph in the place of the one that was used up."""
        with isolated(self.capture), hg.meta_precision(forward.autocast_dtype, self.capture.device.type):
            features = self.capture.features_of(forward.args, forward.kwargs, rng=forward.rng).features
        torch.clear_autocast_cache()
        return features  # type: ignore[return-value]

    @property
    def _head_only(self) -> bool:
        return self.config.hypergradient == "head"

    def _virtual_rates(self, parameters: list[nn.Parameter]) -> tuple[list[float], float]:
        """eta_1 of each parameter, and the largest of them."""
        if self.config.virtual_lr is not None:
            return [self.config.virtual_lr] * len(parameters), self.config.virtual_lr
        rate = {id(p): float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
        rates = [rate.get(id(p), 0.0) for p in parameters]
        if max(rates) > 0:
            return rates, max(rates)
        # A learning-rate warm-up that starts at zero: as good as no displacement, while the direction is plain v.
        return [1e-12] * len(rates), 1e-12

    def _adaptive_scaling(self, parameters: list[nn.Parameter]) -> list[Tensor] | None:
        """``1 / (sqrt(v) + eps)`` of the optimizer's second moments v, for ``virtual_step="adaptive"``.

        Raises:
            ValueError: the optimizer keeps none.
        """
        if self.config.virtual_step == "sgd":
            return None
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        scaling = []
        for p in parameters:
            state = self.optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                group = groups[id(p)]
                correction = 1 - group["betas"][1] ** torch.as_tensor(state["step"], dtype=torch.float32)
                second = state["exp_avg_sq"] / correction.to(p.device)
                scaling.append(second.sqrt_().add_(group.get("eps", 1e-8)).reciprocal_())
            else:
                scaling.append(torch.ones_like(p))  # no gradient ever reached it
        if not any("exp_avg_sq" in self.optimizer.state.get(p, {}) for p in parameters):
            raise ValueError(
                f"virtual_step='adaptive' needs an Adam-like optimizer, which keeps second moments ('exp_avg_sq');"
                f" {type(self.optimizer).__name__} has none: use virtual_step='sgd'."
            )
        return scaling

    def _train_gradient(
        self, forward: Forward, labels: Tensor, f: Tensor, parameters: list[nn.Parameter], retain_graph: bool
    ) -> list[Tensor]:
        """Gradient of the mean IADA loss on the train batch (Eq. 7)."""
        features = forward.features.detach() if self._head_only else forward.features  # type: ignore[union-attr]
        loss = self.train_loss(features, labels, self.epsilon(f))  # type: ignore[arg-type]
        gradient = _gradient(loss, parameters, forward.autocast_dtype, retain_graph)
        weighted_average_(gradient, labels.numel())
        return gradient

    def check_batch(self) -> None:
        """Look at the first meta batch, before training: its form and labels.

        Raises:
            ValueError: naming what is wrong.
        """
        with isolated(self.capture):
            seed_rng(self.capture.device, self.config.seed)
            _, labels = self.batches.peek()
        check_labels(labels, labels.shape[0] if labels.dim() else -1, self.head.out_features, always=True)

    def _draw(self, step: int) -> Any:
        """The next meta batch; its augmentation, and the meta pass after it, run from a seed of the step's own."""
        seed = (self.config.seed * 1_000_003 + step) % 2**31
        self.batches.open()
        seed_rng(self.capture.device, seed)
        batch = next(self.batches)
        seed_rng(self.capture.device, seed)
        return batch

    def _meta_gradient(
        self, batch: Any, parameters: list[nn.Parameter], autocast_dtype: torch.dtype | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Meta loss (plain cross-entropy) and its gradient at the current parameters."""
        (args, kwargs), labels = batch
        with hg.meta_precision(autocast_dtype, labels.device.type), torch.set_grad_enabled(not self._head_only):
            forward = self.capture.features_of(args, kwargs)
        torch.clear_autocast_cache()
        check_labels(labels, forward.features.shape[0], self.head.out_features, always=not self._checked)  # type: ignore[union-attr]
        self._checked, labels = True, labels.long()
        loss = F.cross_entropy(self.head.iada_logits(forward.features, None, alpha=0, beta=0), labels)  # type: ignore[arg-type]
        v = _gradient(loss, parameters, forward.autocast_dtype)
        loss = loss.detach().clone()
        weighted_average_([*v, loss], labels.numel())
        return loss, v

    def _features_and_tangent(self, forward: Forward, direction: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features of the train batch and their tangent, ``[N, H]`` each, with the dropout masks of training."""
        base = forward.features.detach()
        if self._head_only:
            return base, torch.zeros_like(base)
        dtype = self.head.covariance.dtype

        def features_here(replaced: dict[str, Tensor] | None = None) -> Tensor:
            cast = None if self.config.hypergradient == "forward" else dtype
            found = self.capture.features_of(
                forward.args, forward.kwargs, rng=forward.rng, replaced=replaced, cast=cast, autocast=False
            )
            return found.features  # type: ignore[return-value]

        with hg.full_precision(base.device.type):
            if self.config.hypergradient == "forward":
                return hg.forward_tangent(features_here, self.parameters, direction)
            self._check_repeatable(base, features_here)
            known = base if forward.exact and self._repeatable and base.dtype == dtype else None
            return hg.finite_difference_tangent(features_here, list(self.parameters.values()), direction, known)

    def _check_repeatable(self, base: Tensor, features_here: Callable[[], Tensor]) -> None:
        """Once: repeat the training pass. Bit-equal features may serve as the base of the difference; features that are
        equal to rounding only (compiled code, say) may not; others mean that the difference would be noise.

        Raises:
            RuntimeError: the pass cannot be repeated.
        """
        if self._repeatable is not None:
            return
        with torch.no_grad():
            again = features_here()
            error = (again - base).float().norm() / base.float().norm().clamp_min(1e-6)
        if bool(error > 0.2):
            raise RuntimeError(
                f"{type(self.capture.model).__name__}: the same pass, repeated with the same random state, gives features"
                f" that differ by {100 * float(error):.0f} %. Finite differences would be noise. Something in the model"
                " draws or keeps what cannot be restored (dropout in compiled code, state outside of buffers): use"
                " IADAConfig(hypergradient='head')."
            )
        self._repeatable = torch.equal(again, base)

    @torch.no_grad()
    def _update(
        self,
        features: Tensor,
        features_dot: Tensor,
        direction: list[Tensor],
        labels: Tensor,
        f: Tensor,
        meta_loss: Tensor,
        fine: Tensor,
        eta: float,
    ) -> None:
        """Eqs. 8 and 9 on the batch of all processes, so that every process takes the same step."""
        head = self.head
        dtype = head.covariance.dtype
        tangent = {id(p): d.to(dtype) for p, d in zip(self.parameters.values(), direction, strict=True)}
        weight = head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        layer = hg.HeadTangent(
            gather_rows(features.to(dtype)),
            weight,
            bias,
            gather_rows(features_dot.to(dtype)),
            tangent.get(id(head.weight), torch.zeros_like(weight)),
            tangent.get(id(head.bias)),
        )
        labels, f = gather_rows(labels), gather_rows(f)
        # What the passes gave holds for several small steps of Omega and Sigma: only the last layer is gone through again.
        for _ in range(self.config.meta_updates or self.config.meta_every):
            fine = self._learn(layer, labels, f, fine, eta)
        self.log.add_meta_loss(meta_loss, fine)
        self._skipped += ~fine
        if fine.device.type == "cpu":
            self.report_skipped()

    def _learn(self, layer: hg.HeadTangent, labels: Tensor, f: Tensor, fine: Tensor, eta: float) -> Tensor:
        """Step Omega and Sigma, unless something is not finite; returns whether everything was, ``[]`` on the device: the
        decision is taken there, so that nobody has to wait for it."""
        head, config = self.head, self.config
        size = self._delta_size(labels)
        with torch.enable_grad():
            epsilon = self.perturbation(f)
        for_epsilon, classes, for_covariance = hg.head_hypergradient(
            layer, labels, epsilon.detach() * size, head.class_covariance, head.log_prior, config.alpha, config.beta,
            config.fixed_shift, self._in_margin,
        )  # fmt: skip
        parts = for_covariance if isinstance(for_covariance, LowRank) else (for_covariance,)
        for values in (for_epsilon, *parts):
            fine = fine & torch.isfinite(values).all()
        # d meta / d(eps, Sigma) is -eta times what was computed.
        with torch.enable_grad():
            self._step_network(-(epsilon * (for_epsilon * size)).sum(), fine)
        if config.alpha != 0 and config.covariance_lr > 0:
            own = take(head.class_covariance, classes)
            if config.covariance_step == "relative":
                step = -for_covariance if isinstance(for_covariance, Tensor) else LowRank(*(-t for t in parts))
                moved = relative_step(own, step, config.covariance_lr)
            else:
                moved = plain_step(own, -eta * for_covariance, config.covariance_lr)  # type: ignore[arg-type, operator]
            if isinstance(moved, LowRank):
                moved = LowRank(*(torch.where(fine, new, old) for new, old in zip(moved, own, strict=True)))
            else:
                moved = torch.where(fine, moved, own)  # type: ignore[arg-type]
            put(head.class_covariance, classes, moved)
        return fine

    def _step_network(self, objective: Tensor, fine: Tensor) -> None:
        """One step of Omega down the gradient of ``objective``, if ``fine``."""
        with _undone_unless(fine, self._network_state):
            self.meta_optimizer.zero_grad()
            objective.backward()
            self.meta_optimizer.step()

    def _network_state(self) -> list[Tensor]:
        """Omega and its Adam state."""
        weights = list(self.perturbation.parameters())
        adam = [t for p in weights for t in self.meta_optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
        return [*(p.data for p in weights), *adam]

    def forget_pass(self) -> None:
        """Drop what :meth:`before_pass` has prepared, for another state."""
        self._ready = None

    @property
    def skipped(self) -> int:
        """Meta steps left out so far because something was not finite."""
        return int(self._skipped)

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._skipped.fill_(count)

    def report_skipped(self) -> int:
        """:attr:`skipped`; warns once."""
        count = self.skipped
        if count and not self._warned:
            self._warned = True
            warnings.warn(
                "the meta loss or its gradient is not finite: this meta step is skipped, and counted as"
                " iada/skipped_steps. If it happens again, look for NaN in the inputs, or lower virtual_lr."
            )
        return count


@contextmanager
def _undone_unless(fine: Tensor, state: Callable[[], list[Tensor]]) -> Iterator[None]:
    """Put tensors back, after a block, where ``fine`` ``[]`` is false; those that the block made become zero."""
    before = [t.clone() for t in state()]
    yield
    after = state()
    # The first step makes Adam's state.
    before += [torch.zeros_like(t) for t in after[len(before) :]]
    for tensor, old in zip(after, before, strict=True):
        tensor.copy_(torch.where(fine, tensor, old))


def _gradient(
    loss: Tensor, parameters: list[nn.Parameter], autocast_dtype: torch.dtype | None, retain_graph: bool = False
) -> list[Tensor]:
    """Gradient of ``loss``; zero for a parameter it does not reach."""
    # Through a float16 graph small gradients vanish unless they are scaled up.
    scale = 8192.0 if autocast_dtype == torch.float16 else 1.0
    loss = loss * scale if scale != 1 else loss
    found = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    # Reentrant checkpointing hides the parameters inside it from autograd.grad: they would pass for unused.
    if any(g is None for g in found) and _has_reentrant_checkpoint(loss):
        raise ValueError(REENTRANT)
    gradient = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(parameters, found, strict=True)]
    return gradient if scale == 1 else list(torch._foreach_div(gradient, scale))


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the graph of ``loss`` holds a reentrant ``torch.utils.checkpoint``."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False
