"""One meta step: virtual step, perturbation network, class covariances (Eqs. 7 to 9 of the paper)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import hypergradient as hg
from .batches import MetaBatches
from .capture import Capture, Forward, isolated, seed_rng
from .checks import REENTRANT, check_labels
from .config import IADAConfig
from .covariance import plain_step, relative_step
from .distributed import gather_rows, weighted_average_
from .functional import margin_scale
from .head import IADAHead
from .perturbation import EpsilonLog, PerturbationNetwork


class LinearTangent(NamedTuple):
    """What the last layer sees of a batch, and its tangent along the meta gradient."""

    features: Tensor  # [N, H]
    weight: Tensor  # [C, H]
    bias: Tensor | None  # [C]
    features_dot: Tensor  # [N, H]
    weight_dot: Tensor  # [C, H]
    bias_dot: Tensor | None  # [C]


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
        self.meta_optimizer = torch.optim.Adam(self.perturbation.parameters(), lr=config.meta_lr)
        self.log = EpsilonLog(self.head.out_features)
        self.skipped = 0
        self._checked = False
        self._repeatable: bool | None = None

    @torch.no_grad()
    def epsilon(self, f: Tensor) -> Tensor:
        """Perturbation sizes for characteristics ``[N, K]``: ``[N]``."""
        return self.perturbation(f)

    def logits(self, features: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """IADA logits ``[N, C]`` with the configured terms."""
        epsilon = epsilon * self._delta_scale(features.detach(), self.head.weight, self.head.bias, labels)
        config = self.config
        return self.head.iada_logits(features, labels, epsilon, config.alpha, config.beta, config.fixed_shift)

    def train_loss(
        self, features: Tensor, labels: Tensor, epsilon: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor:
        """IADA loss of a batch: its mean, or its sum over ``denominator``."""
        return mean_loss(self.logits(features, labels, epsilon), labels, denominator)

    @torch.no_grad()
    def _delta_scale(self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """Size of delta in every feature at epsilon = 1: ``[N]``."""
        kind, size, dtype = self.config.perturbation_scale, self.config.perturbation_size, self.head.covariance.dtype
        if kind == "margin":
            weight = weight.to(dtype)
            logits = F.linear(features.to(dtype), weight, None if bias is None else bias.to(dtype))
            return size * margin_scale(logits, weight, labels)
        if kind == "feature_std":
            return size * self.head.feature_std()[labels]
        return torch.full_like(features[:, 0], size, dtype=dtype)

    def __call__(self, forward: Forward, labels: Tensor, f: Tensor, step: int) -> None:
        """Update Omega and Sigma. The model's parameters and buffers and the random state end as they were.

        Args:
            forward: the train batch's pass, whose graph is kept.
            labels: ``[N]``.
            f: ``[N, K]``.
            step: optimizer step; seeds the meta pass's dropout, so that a resumed run repeats it.
        """
        parameters = list(self.parameters.values())
        with isolated(self.capture):
            batch = self._draw((self.config.seed * 1_000_003 + step) % 2**31)
            rates, eta = self._virtual_rates(parameters)
            if self.config.schedule == "lookahead":
                gradient = self._train_gradient(forward, labels, f, parameters)
                with hg.displaced(parameters, torch._foreach_mul(gradient, [-r for r in rates])):
                    meta_loss, v = self._meta_gradient(batch, parameters, forward)
            else:
                meta_loss, v = self._meta_gradient(batch, parameters, forward)
            # eta_1 is divided out: Omega's Adam and the relative step of Sigma do not depend on its size.
            direction = torch._foreach_mul(v, [r / eta for r in rates])
            features, features_dot = self._features_and_tangent(forward, direction)
        self._update(features, features_dot, direction, labels, f, meta_loss, eta)

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

    def _train_gradient(
        self, forward: Forward, labels: Tensor, f: Tensor, parameters: list[nn.Parameter]
    ) -> list[Tensor]:
        """Gradient of the mean IADA loss on the train batch (Eq. 7); the graph stays for the caller's backward pass."""
        features = forward.features.detach() if self._head_only else forward.features
        loss = self.train_loss(features, labels, self.epsilon(f))
        gradient = _gradient(loss, parameters, forward, retain_graph=True)
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

    def _draw(self, seed: int) -> Any:
        """The next meta batch; its augmentation, and the meta pass after it, run from ``seed``."""
        self.batches.open()
        seed_rng(self.capture.device, seed)
        batch = next(self.batches)
        seed_rng(self.capture.device, seed)
        return batch

    def _meta_gradient(self, batch: Any, parameters: list[nn.Parameter], like: Forward) -> tuple[Tensor, list[Tensor]]:
        """Meta loss (plain cross-entropy) and its gradient at the current parameters."""
        (args, kwargs), labels = batch
        with hg.meta_precision(like.autocast_dtype, labels.device.type), torch.set_grad_enabled(not self._head_only):
            features = self.capture.features_of(args, kwargs)
        torch.clear_autocast_cache()
        check_labels(labels, features.shape[0], self.head.out_features, always=not self._checked)
        self._checked, labels = True, labels.long()
        loss = F.cross_entropy(self.head.iada_logits(features, labels, alpha=0, beta=0), labels)
        v = _gradient(loss, parameters, like)
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
            return self.capture.features_of(forward.args, forward.kwargs, rng=forward.rng, replaced=replaced, cast=cast)

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
        eta: float,
    ) -> None:
        """Eqs. 8 and 9 on the batch of all processes, so that every process takes the same step."""
        head = self.head
        dtype = head.covariance.dtype
        tangent = {id(p): d.to(dtype) for p, d in zip(self.parameters.values(), direction, strict=True)}
        weight = head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        layer = LinearTangent(
            gather_rows(features.to(dtype)),
            weight,
            bias,
            gather_rows(features_dot.to(dtype)),
            tangent.get(id(head.weight), torch.zeros_like(weight)),
            tangent.get(id(head.bias)),
        )
        if self._learn(layer, gather_rows(labels), gather_rows(f), torch.isfinite(meta_loss), eta):
            self.log.add_meta_loss(meta_loss)
        else:
            self._skip()

    def _learn(self, layer: LinearTangent, labels: Tensor, f: Tensor, finite: Tensor, eta: float) -> bool:
        """Step Omega and Sigma; returns whether everything was finite. Otherwise nothing is changed."""
        head, config = self.head, self.config
        scale = self._delta_scale(layer.features, layer.weight, layer.bias, labels)
        with torch.enable_grad():
            epsilon = self.perturbation(f)
        for_epsilon, classes, for_covariance = hg.head_hypergradient(
            *layer, labels, epsilon.detach() * scale, head.covariance, head.log_prior, config.alpha, config.beta,
            config.fixed_shift,
        )  # fmt: skip
        if not bool(finite & torch.isfinite(for_epsilon).all() & torch.isfinite(for_covariance).all()):
            return False
        # d meta / d(eps, Sigma) is -eta times what was computed.
        self.meta_optimizer.zero_grad()
        epsilon.backward(-for_epsilon * scale)
        self.meta_optimizer.step()
        if config.alpha != 0 and config.covariance_lr > 0:
            own = head.covariance[classes]
            if config.covariance_step == "relative":
                head.covariance[classes] = relative_step(own, -for_covariance, config.covariance_lr)
            else:
                head.covariance[classes] = plain_step(own, -eta * for_covariance, config.covariance_lr)
        return True

    def _skip(self) -> None:
        self.skipped += 1
        if self.skipped == 1:
            warnings.warn(
                "the meta loss or its gradient is not finite: this meta step is skipped, and counted as"
                " iada/skipped_steps. If it happens again, look for NaN in the inputs, or lower virtual_lr."
            )


def _gradient(loss: Tensor, parameters: list[nn.Parameter], like: Forward, retain_graph: bool = False) -> list[Tensor]:
    """Gradient of ``loss``; zero for a parameter it does not reach."""
    # Through a float16 graph small gradients vanish unless they are scaled up.
    scale = 8192.0 if like.autocast_dtype == torch.float16 else 1.0
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
