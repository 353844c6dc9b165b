"""The virtual step (Eq. 7): gradients, and how they are scaled into a displacement of the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import REENTRANT
from .config import IADAConfig


class VirtualStep:
    """The learning rates, and the scaling, of the step that the optimizer is imagined to take.

    Args:
        optimizer: of the model.
        parameters: what the step moves.
        config: settings.

    Raises:
        ValueError: ``virtual_step="adaptive"`` with an optimizer that has no second moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], config: IADAConfig) -> None:
        self.optimizer, self.parameters, self.config = optimizer, parameters, config
        self._check(config.virtual_step != "adaptive" or any("betas" in group for group in optimizer.param_groups))

    def _check(self, adaptive: bool) -> None:
        if not adaptive:
            raise ValueError(
                "virtual_step='adaptive' needs an Adam-like optimizer, which keeps second moments ('exp_avg_sq');"
                f" {type(self.optimizer).__name__} has none: use virtual_step='sgd'."
            )

    def rates(self) -> tuple[list[float], float]:
        """eta_1 of each parameter, and the largest of them."""
        if self.config.virtual_lr is not None:
            return [self.config.virtual_lr] * len(self.parameters), self.config.virtual_lr
        rate = {id(p): float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
        rates = [rate.get(id(p), 0.0) for p in self.parameters]
        if max(rates) > 0:
            return rates, max(rates)
        # A learning-rate warm-up that starts at zero: as good as no displacement, while the direction is plain v.
        return [1e-12] * len(rates), 1e-12

    def scale_(self, direction: list[Tensor], rates: list[float]) -> list[Tensor]:
        """Times the rates, and the optimizer's scaling, in place."""
        torch._foreach_mul_(direction, rates)
        if self.config.virtual_step == "adaptive":
            torch._foreach_mul_(direction, self._second_moments())
        return direction

    def _second_moments(self) -> list[Tensor]:
        """``1 / (sqrt(v) + eps)`` of the optimizer's second moments v, for ``virtual_step="adaptive"``."""
        self._check(any("exp_avg_sq" in self.optimizer.state.get(p, {}) for p in self.parameters))
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        scaling = []
        for p in self.parameters:
            state = self.optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                group = groups[id(p)]
                correction = 1 - group["betas"][1] ** torch.as_tensor(state["step"], dtype=torch.float32)
                second = state["exp_avg_sq"] / correction.to(p.device)
                scaling.append(second.sqrt_().add_(group.get("eps", 1e-8)).reciprocal_())
            else:
                scaling.append(torch.ones_like(p))  # no gradient ever reached it
        return scaling


def loss_gradient(
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
