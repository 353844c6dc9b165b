"""Turning a model's classifier into an `IADAHead` in place, and back."""

from __future__ import annotations

from torch import nn

from ..runtime.sharding import FSDPModule, is_fsdp
from .find import require_linear
from .layer import BUFFERS, IADAHead


def convert_to_iada(linear: nn.Linear, *, covariance: str = "auto", covariance_rank: int = 8) -> IADAHead:
    """Turn a ``Linear`` into an `IADAHead` in place: same object, same Parameters, same hooks.

    Whatever refers to the module (the model, an optimizer, DDP, a sharding wrapper) does not notice, and what a subclass of
    ``nn.Linear`` adds (attributes, extra state) stays. :func:`restore_linear` is the exact inverse.

    Raises:
        TypeError: where it is no plain ``nn.Linear``.
    """
    require_linear(linear, "the classifier")
    original = type(linear)
    if is_fsdp(linear):  # fully_shard makes a class of its own for the modules that it is called on
        linear.__class__ = type("FSDPIADAHead", (FSDPModule, IADAHead), {})
    elif original is nn.Linear or original.__module__.startswith(("torch.", "timm.")):
        linear.__class__ = IADAHead
    else:
        linear.__class__ = type(f"IADA{original.__name__}", (IADAHead, original), {})
    try:
        linear._init_statistics(covariance, covariance_rank)  # type: ignore[attr-defined, operator]
    except Exception:
        linear.__class__ = original
        raise
    # A fresh object each time: whoever keeps it can tell whether the conversion is still its own.
    linear.__dict__["_converted_from"] = [original]
    return linear  # type: ignore[return-value]


def restore_linear(head: IADAHead) -> nn.Linear:
    """Undo :func:`convert_to_iada`. A head that was never converted (built by hand) is left as it is."""
    converted_from = head.__dict__.pop("_converted_from", None)
    if converted_from is not None:
        for name in (*BUFFERS, "covariance_form"):
            delattr(head, name)
        head.__class__ = converted_from[0]
    return head
