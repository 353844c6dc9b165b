"""A module among modules: what a criterion needs to stand as an attribute of a module that it knows."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Guest(nn.Module):
    """A module that registers nothing: its owner keeps its parameters and the keys of its state dict."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # nothing is registered

    def _apply(self, fn: Any, recurse: bool = True) -> Guest:
        return self  # the model is moved by its owner; a move after the start is said by the next call

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return Copied()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "MetaIADA cannot be pickled, since it holds the model, its optimizer and hooks on both: save iada.state_dict(), and"
            " load it into a new MetaIADA."
        )


class Copied(nn.Module):
    """What stands for a criterion in a copy of its owner."""

    def forward(self, output: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Cross-entropy, for evaluation.

        Raises:
            RuntimeError: it is trained with.
        """
        if torch.is_grad_enabled() and output.requires_grad:
            raise RuntimeError(
                "this is a copy of a MetaIADA, which trains the model of the original only: make a new one."
            )
        return F.cross_entropy(output, target)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.copy(self)
