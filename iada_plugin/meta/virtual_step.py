"""The virtual step (Eq. 7): gradients of a loss, and the learning rates that turn them into a displacement."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.checks import REENTRANT, optimizer_groups, unwrap_optimizer


class VirtualStep:
    """The step of plain SGD (Eq. 7) that is imagined at the learning rates of the user's optimizer.

    Args:
        optimizer: of the model.
        parameters: what the step moves, by name.
        lr: eta_1; ``None`` for each parameter's current rate.

    Raises:
        ValueError: the optimizer holds none of the parameters.
    """

    def __init__(self, optimizer: Any, parameters: dict[str, nn.Parameter], lr: float | None = None) -> None:
        self._given, self.optimizer = optimizer, unwrap_optimizer(optimizer)
        self.parameters, self.lr = list(parameters.values()), lr
        known = {id(p) for _, members in self.groups for p in members}
        unknown = [name for name, p in parameters.items() if id(p) not in known]
        if len(unknown) == len(parameters):
            raise ValueError(
                "the optimizer holds none of the model's trainable parameters: pass the one that trains this very model, and"
                " make MetaIADA after both were prepared (Accelerate, fully_shard, DeepSpeed)."
            )
        if unknown and lr is None:
            warnings.warn(
                f"the optimizer does not hold {len(unknown)} of the {len(parameters)} trainable parameters ({', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}), so that the virtual step does not move them: set virtual_lr where another"
                " optimizer trains them, or requires_grad=False where nothing does."
            )

    @property
    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Parameter groups of the optimizer, which makes new ones when it loads a state, and the model's parameters in each."""
        return optimizer_groups(self._given)

    def rates(self) -> tuple[list[float], float]:
        """eta_1 of each parameter, and the largest of them."""
        if self.lr is not None:
            return [self.lr] * len(self.parameters), self.lr
        rate = {id(p): float(group["lr"]) for group, members in self.groups for p in members}
        rates = [rate.get(id(p), 0.0) for p in self.parameters]
        if max(rates) > 0:
            return rates, max(rates)
        # A learning-rate warm-up that starts at zero: as good as no displacement, while the direction is plain v.
        return [1e-12] * len(rates), 1e-12

    def displacement(self, gradient: list[Tensor]) -> list[Tensor]:
        """The step down ``gradient``, in its place."""
        rates, _ = self.rates()
        torch._foreach_mul_(gradient, [-r for r in rates])
        return gradient

    def direction(self, v: list[Tensor]) -> tuple[list[Tensor], float]:
        """The meta gradient as the virtual step sees it, and the eta_1 that is divided out of it: Omega's Adam and the relative
        step of Sigma do not depend on its size."""
        rates, eta = self.rates()
        if all(r == eta for r in rates):
            return v, eta
        return torch._foreach_mul(v, [r / eta for r in rates]), eta  # type: ignore[return-value]


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
