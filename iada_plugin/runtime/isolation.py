"""Random state of everything that models and augmentations draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


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
