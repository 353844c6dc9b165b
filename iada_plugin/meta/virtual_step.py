"""The virtual step (Eq. 7): gradients, and how they are scaled into a displacement of the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import IADAConfig
from ..runtime.checks import REENTRANT, optimizer_groups, unwrap_optimizer
from ..runtime.sharding import local


class VirtualStep:
    """The learning rates, and the scaling, of the step that the optimizer is imagined to take.

    Args:
        optimizer: of the model.
        parameters: what the step moves.
        config: settings.

    Raises:
        ValueError: ``virtual_step="adaptive"`` with an optimizer that does not keep second moments as Adam does.
    """

    def __init__(self, optimizer: Any, parameters: list[nn.Parameter], config: IADAConfig) -> None:
        self._given, self.optimizer = optimizer, unwrap_optimizer(optimizer)
        self.parameters, self.config = parameters, config
        known = {id(p) for _, members in self.groups for p in members}
        if known.isdisjoint(map(id, parameters)):
            raise ValueError(
                "the optimizer holds none of the model's trainable parameters: pass the one that trains this very model, and"
                " make MetaIADA after both were prepared (Accelerate, fully_shard, DeepSpeed)."
            )
        owned = {id(p) for group, _ in self.groups for p in group["params"]}
        if config.virtual_step == "adaptive" and owned.isdisjoint(map(id, parameters)):
            raise ValueError("DeepSpeed keeps second moments in a form of its own: use virtual_step='sgd'.")
        if config.virtual_step == "adaptive" and any(len(g.get("betas", ())) != 2 for g, _ in self.groups):
            raise self._not_adam()

    @property
    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Parameter groups of the optimizer, which makes new ones when it loads a state, and the model's parameters in each."""
        return optimizer_groups(self._given)

    def _not_adam(self) -> ValueError:
        return ValueError(
            "virtual_step='adaptive' needs an Adam-like optimizer, which keeps second moments ('exp_avg_sq' and 'step');"
            f" {type(self.optimizer).__name__} has none: use virtual_step='sgd'."
        )

    def rates(self) -> tuple[list[float], float]:
        """eta_1 of each parameter, and the largest of them."""
        if self.config.virtual_lr is not None:
            return [self.config.virtual_lr] * len(self.parameters), self.config.virtual_lr
        rate = {id(p): float(group["lr"]) for group, members in self.groups for p in members}
        rates = [rate.get(id(p), 0.0) for p in self.parameters]
        if max(rates) > 0:
            return rates, max(rates)
        # A learning-rate warm-up that starts at zero: as good as no displacement, while the direction is plain v.
        return [1e-12] * len(rates), 1e-12

    def scale_(self, direction: list[Tensor], rates: list[float]) -> list[Tensor]:
        """Times the rates, and the optimizer's scaling, in place."""
        torch._foreach_mul_(direction, rates)
        if self.config.virtual_step == "adaptive" and self.optimizer.state:  # it is empty before the first step
            torch._foreach_mul_(direction, self._scaling())
        return direction

    def _scaling(self) -> list[Tensor]:
        """``1 / (sqrt(v) + eps)`` of the optimizer's second moments v (of amsgrad their maximum). Zero where v is zero: an
        entry that no gradient has reached yet, a rare word's say, would outweigh all others a millionfold."""
        groups = {id(p): group for group, members in self.groups for p in members}
        scaling = []
        for p in self.parameters:
            state, group = self.optimizer.state.get(p), groups.get(id(p))
            if not state or group is None:
                scaling.append(torch.zeros_like(local(p)))
                continue
            second, step = state.get("max_exp_avg_sq", state.get("exp_avg_sq")), state.get("step", group.get("step"))
            if second is None or step is None:
                raise self._not_adam()
            if isinstance(step, Tensor) and step.device.type == "cpu":
                step = float(step)
            root = (local(second) / (1 - group["betas"][1] ** step)).sqrt_()
            scaling.append(torch.where(root > 0, 1 / (root + group.get("eps", 1e-8)), 0))
        return scaling


class LossScale:
    """What a loss is multiplied by before its gradient goes through a float16 graph, where small values vanish and large
    ones overflow. A power of two that falls fourfold with an overflow and doubles after 200 steps without one; as
    ``torch.amp.GradScaler``, but kept on the device, so that nobody has to wait for it.

    Attributes:
        scale: ``[]``.
        streak: ``[]`` steps without an overflow.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), 8192.0, device=device)
        self.streak = torch.zeros((), device=device)

    def adjust(self, fine: Tensor) -> None:
        """Take note of a step, whose gradients were finite if ``fine`` ``[]``."""
        self.streak = torch.where(fine, self.streak + 1, 0)
        grown = torch.where(self.streak >= 200, 2 * self.scale, self.scale)
        self.streak = torch.where(self.streak >= 200, 0, self.streak)
        self.scale = torch.where(fine, grown, self.scale / 4).clamp(1.0, 65536.0)


def loss_gradient(
    loss: Tensor, parameters: list[nn.Parameter], scale: Tensor | None = None, retain_graph: bool = False
) -> list[Tensor]:
    """Gradient of ``loss``, which is multiplied by ``scale`` on its way; zero for a parameter it does not reach."""
    loss = loss if scale is None else loss * scale
    found = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    # Reentrant checkpointing hides the parameters inside it from autograd.grad: they would pass for unused.
    if any(g is None for g in found) and _has_reentrant_checkpoint(loss):
        raise ValueError(REENTRANT)
    gradient = [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(parameters, found, strict=True)]
    return gradient if scale is None else [g / scale for g in gradient]


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
