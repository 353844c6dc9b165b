"""What a pass changes besides gradients: the random state of all that models and augmentations draw from, and the values that it
leaves on modules."""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .guest import Guest


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


#: Attributes that every module has.
_OF_ALL = frozenset(vars(nn.Module()))
#: Whose hooks see to parameters and devices, and keep a state for that.
_FRAMEWORKS = ("torch", "accelerate", "deepspeed", "iada_plugin")
_PLAIN = (int, float, str, tuple, type(None), torch.dtype, torch.device)
#: Generators that a model may keep for itself: how to read their state, and how to set it.
_GENERATORS: dict[type, tuple[Any, Any]] = {
    torch.Generator: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    random.Random: (lambda g: g.getstate(), lambda g, state: g.setstate(state)),
    np.random.RandomState: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    np.random.Generator: (lambda g: g.bit_generator.state, lambda g, s: setattr(g.bit_generator, "state", s)),
}


class Values:
    """The values on the modules of a model, to be put back after a pass: buffers, and all other attributes but parameters (auxiliary
    losses, caches, counters), with what is in their lists, dicts, sets and objects; what hooks write to; generators.

    Args:
        model: the model.
        but: buffers that no pass changes.
    """

    def __init__(self, model: nn.Module, but: Iterable[Tensor] = ()) -> None:
        self._seen = {id(t) for t in but}
        self._contents: list[tuple[Any, Any, frozenset[str]]] = []  # container, what was in it, keys to leave alone
        self._tensors: list[tuple[Tensor, int | None, Tensor]] = []  # tensor, its version, its value
        self._generators: list[tuple[Any, Any]] = []
        for module in model.modules():
            if isinstance(module, Guest):
                continue
            for buffer in module._buffers.values():
                if buffer is not None and id(buffer) not in self._seen:
                    self._seen.add(id(buffer))
                    self._tensors.append((buffer, None, buffer.detach().clone()))
            self._keep(module._buffers, tensors=False)
            self._keep_attributes(module, tensors=True, objects=True)
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                self._keep_of_hook(hook)

    def _keep_attributes(self, value: Any, tensors: bool, objects: bool) -> None:
        own = {k: v for k, v in vars(value).items() if k not in _OF_ALL}
        self._seen.add(id(value))
        self._contents.append((vars(value), own, _OF_ALL))
        for attribute in own.values():
            self._keep(attribute, tensors, objects)

    def _keep(self, value: Any, tensors: bool, objects: bool = False) -> None:
        """``tensors``: keep the values of tensors; those in an object may be a whole data set. ``objects``: look into an object."""
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            if tensors and value.grad_fn is None and not isinstance(value, nn.Parameter) and not value.is_inference():
                self._seen.add(id(value))
                self._tensors.append((value, value._version, value.detach().clone()))
        elif isinstance(value, (dict, list, deque, set)):
            self._seen.add(id(value))
            kept = dict(value) if isinstance(value, dict) else list(value)
            self._contents.append((value, kept, frozenset()))
            for item in kept.values() if isinstance(kept, dict) else kept:
                self._keep(item, tensors, objects)
        elif type(value) in _GENERATORS:
            self._seen.add(id(value))
            self._generators.append((value, _GENERATORS[type(value)][0](value)))
        elif objects and isinstance(getattr(value, "__dict__", None), dict) and not _closed(value):
            self._keep_attributes(value, tensors=False, objects=False)

    def _keep_of_hook(self, hook: Any) -> None:
        """What a hook may write to: itself, what it is a method of, is given, closes over, or names. Kept is what has a name or key
        there: one that counts passes, by appending to a list, counts all of them."""
        function = getattr(hook, "func", hook)  # in a functools.partial
        if _of_framework(function):
            return
        code, named = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        found = [named[name] for name in (() if code is None else code.co_names) if name in named]
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # an empty one
                found.append(cell.cell_contents)
                self._contents.append((cell, cell.cell_contents, frozenset()))
        for value in (hook, getattr(function, "__self__", None), *getattr(hook, "args", ()), *found):
            contents = value if isinstance(value, dict) else getattr(value, "__dict__", None)
            if isinstance(contents, dict) and not _closed(value) and id(value) not in self._seen:
                self._contents.append((contents, {k: v for k, v in contents.items() if k not in _OF_ALL}, _OF_ALL))

    def restore(self) -> None:
        """Put them back. What has not changed is not written to."""
        for value, kept, others in self._contents:
            if isinstance(value, CellType):
                if value.cell_contents is not kept:
                    value.cell_contents = kept
            elif isinstance(value, dict):
                for key in [k for k in value if k not in kept and k not in others]:
                    del value[key]
                for key, item in kept.items():
                    if key not in value or value[key] is not item:
                        value[key] = item
            elif len(value) != len(kept) or any(a is not b for a, b in zip(value, kept, strict=True)):
                value.clear()
                value.update(kept) if isinstance(value, set) else value.extend(kept)
        for tensor, version, was in self._tensors:
            # Buffers always: writing past the version, by .data, is usual there. Other tensors may be views of parameters.
            if version is None or tensor._version != version:
                tensor.data.copy_(was)
        for generator, state in self._generators:
            _GENERATORS[type(generator)][1](generator, state)


def _of_framework(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in _FRAMEWORKS


def _closed(value: Any) -> bool:
    """What no pass leaves values in, or what sees to itself: functions, classes, Python's modules, the criterion, objects of frameworks
    (FSDP's state of a module)."""
    return (
        isinstance(value, (Guest, type))
        or inspect.isroutine(value)
        or inspect.ismodule(value)
        or _of_framework(type(value))
    )
