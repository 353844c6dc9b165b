"""What is put onto a model and its optimizer for the time of a run, and taken off again."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from .head import IADAHead, convert_to_iada, restore_linear


class Attachment:
    """The classifier as an `IADAHead`, whose statistics DDP leaves alone, and hooks.

    Args:
        model: that is trained.
        linear: its classifier, converted in place; an `IADAHead` is used as it is.
        name: of the classifier in the model.
        covariance, covariance_rank: settings.

    Attributes:
        head: the classifier.
    """

    def __init__(
        self, model: nn.Module, linear: nn.Linear, name: str, *, covariance: str, covariance_rank: int
    ) -> None:
        if "_converted_from" in vars(linear):
            warnings.warn("an earlier MetaIADA on this model was not closed: this one takes its place.")
            restore_linear(linear)  # type: ignore[arg-type]
        if not isinstance(linear, IADAHead):
            linear = convert_to_iada(linear, covariance=covariance, covariance_rank=covariance_rank)
        self.head: IADAHead = linear
        self._conversion = vars(linear).get("_converted_from")
        self._model, self._hooks = model, list[Callable[[], None]]()
        # DDP would send the statistics, equal on all ranks anyway, at every forward pass.
        self._ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", None)
        buffers = [f"{name}.{buffer}" for buffer, _ in linear.named_buffers()]
        model._ddp_params_and_buffers_to_ignore = [*(self._ignored or []), *buffers]  # type: ignore[assignment]

    def on_removal(self, remove: Callable[[], None]) -> None:
        """``remove`` takes off something else that was put on."""
        self._hooks.append(remove)

    def after_steps(self, optimizer: torch.optim.Optimizer, function: Callable[[], None]) -> None:
        """Call ``function`` after each step of the optimizer."""
        if not getattr(type(optimizer).step, "hooked", False):
            optimizer._patch_step_function()  # a wrapper that skips Optimizer.__init__, such as timm's Lookahead: no hooks until then
        self.on_removal(optimizer.register_step_post_hook(lambda *_: function()).remove)

    def unhook(self) -> None:
        """Take off the hooks, and leave the rest."""
        while self._hooks:
            self._hooks.pop()()

    def remove(self) -> None:
        """Leave the model and the optimizer as they were. May be called twice."""
        self.unhook()
        if self._conversion is not None and vars(self.head).get("_converted_from") is self._conversion:
            restore_linear(self.head)
        if self._ignored is not None:
            self._model._ddp_params_and_buffers_to_ignore = self._ignored  # type: ignore[assignment]
        else:
            vars(self._model).pop("_ddp_params_and_buffers_to_ignore", None)
