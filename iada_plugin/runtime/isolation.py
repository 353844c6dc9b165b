"""Running extra passes without leaving a trace: random state and buffers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .sharding import reshard

if TYPE_CHECKING:
    from .capture import Capture


def rng_state(device: torch.device) -> list[Any]:
    """Random state of Python, NumPy, the CPU and ``device``; models and augmentations draw from any of them."""
    states: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type not in ("cpu", "meta"):
        states.append(getattr(torch, device.type).get_rng_state())
    return states


def set_rng_state(device: torch.device, states: list[Any]) -> None:
    """Restore :func:`rng_state`."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[3], device)
    elif len(states) > 3:
        getattr(torch, device.type).set_rng_state(states[3])


def seed_rng(device: torch.device, seed: int) -> None:
    """Seed Python, NumPy, the CPU and ``device``, and no other device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type not in ("cpu", "meta"):
        getattr(torch, device.type).manual_seed(seed)


@contextmanager
def isolated(capture: Capture) -> Iterator[None]:
    """Run extra passes, each from the same buffers; random state and buffers (BatchNorm's) end as they were."""
    if capture.sharded:
        reshard(capture.model)
    own = {id(b) for b in capture.head.buffers()}
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in capture.model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and id(buffer) not in own
    ]

    def restore() -> None:
        for module, name, buffer, value in kept:
            buffer.data.copy_(value)
            module._buffers[name] = buffer  # a pass may have put another tensor in its place

    states = rng_state(capture.device)
    capture._restore_buffers = restore
    try:
        yield
    finally:
        capture._restore_buffers = lambda: None
        set_rng_state(capture.device, states)
        restore()
