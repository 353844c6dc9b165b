"""Arithmetic in which a difference of features is more than noise, and moving parameters for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import sharding

#: Relative size of a finite difference: small against curvature, large against rounding.
RELATIVE_STEP = {torch.float32: 1e-5, torch.float64: 1e-8}


@contextmanager
def displaced(parameters: Sequence[Tensor], displacement: Sequence[Tensor]) -> Iterator[None]:
    """Add ``displacement`` to the parameters for the length of a block; restored from a copy, bit for bit.

    The edit goes through ``.data``: autograd graphs that saved the parameters stay valid, since they see the old values
    again when they run. (Subtracting what was added would leave rounding errors.)
    """
    data = [sharding.local(p.data) for p in parameters]
    saved = [d.clone() for d in data]
    try:
        torch._foreach_add_(data, list(displacement))
        del displacement  # may be the caller's last reference: one copy of the parameters less
        yield
    finally:
        torch._foreach_copy_(data, saved)


def _tf32_switches() -> list[tuple[Any, str, Any]]:
    """Where TF32 is switched, and the value that means off. Where torch has its newer switches (2.9), the old ones
    raise as soon as both were used."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]


def tf32_enabled() -> bool:
    """Whether CUDA may round float32 products to TF32."""
    return any(getattr(place, name) not in (off, "none") for place, name, off in _tf32_switches())


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """No autocast and no TF32: differences of features are noise under either."""
    switches = _tf32_switches() if device_type == "cuda" else []
    saved = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, off in switches:
            setattr(place, name, off)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for (place, name, _), value in zip(switches, saved, strict=True):
            setattr(place, name, value)


def meta_precision(dtype: torch.dtype | None, device_type: str) -> AbstractContextManager[None]:
    """The user's autocast, without its cache of cast weights: a cached copy would hide a displacement."""
    torch.clear_autocast_cache()
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype, cache_enabled=False)
