"""Parameters spread over processes by FSDP2 (``torch.distributed.fsdp.fully_shard``): whole ones, own parts, gradients.

Whatever here takes a parameter is the identity for one that is not sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # torch < 2.6
    FSDPModule = None  # type: ignore[assignment, misc]


def is_sharded(tensor: Any) -> bool:
    """Whether this is a `DTensor`."""
    return hasattr(tensor, "full_tensor")


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    return FSDPModule is not None and isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter. Its gradient is averaged over processes, as FSDP does with those of its own passes."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    full: Tensor = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # type: ignore[attr-defined]
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same storage."""
    return tensor.data.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def whole_like(part: Tensor, parameter: Tensor) -> Tensor:
    """All of a tensor of which each process holds the part that it holds of ``parameter``."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    shape = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, mesh, placements, run_check=False, **shape).full_tensor()


def part_like(full: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of :func:`whole_like`; a copy."""
    if not is_sharded(parameter):
        return full.to(parameter, copy=True)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(full.to(local(parameter)), mesh, placements).to_local().clone()


def norm(tensors: Sequence[Tensor], sharded: bool) -> Tensor:
    """Euclidean norm ``[]`` of all entries of tensors, or of their parts on all processes."""
    size = torch.stack(torch._foreach_norm(list(tensors))).norm()
    if sharded:
        size = size.square()
        dist.all_reduce(size)
        size = size.sqrt()
    return size


def reshard(model: nn.Module) -> None:
    """Give gathered parameters back: a gathered copy does not see a displacement, nor its end."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(t) for t in ctx.saved_tensors)


def tie(loss: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """``loss``, whose backward pass goes through ``outputs`` too, with zeros: FSDP gathers what the backward pass needs when
    it reaches a module's output, and the loss of the features passes the model's by."""
    return _Tie.apply(loss, *(t for t in outputs if t.requires_grad))  # type: ignore[no-any-return]


def backward_gradient(loss: Tensor, parameters: Sequence[nn.Parameter], model: nn.Module) -> list[Tensor]:
    """Gradient of ``loss`` by a backward pass, in which FSDP's hooks gather parameters and reduce gradients: own parts of the
    average over processes. What is accumulated in ``.grad`` stays."""
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        with _reducing(model):
            loss.backward()
        return [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in parameters]
    finally:
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient
        reshard(model)


@contextmanager
def _reducing(model: nn.Module) -> Iterator[None]:
    """Reduce gradients in this backward pass, also while the caller accumulates them unreduced."""
    groups = []
    for module in model.modules():
        if is_fsdp(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            groups += getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    before = [(group, group.reduce_grads) for group in groups if group is not None]
    try:
        for group, _ in before:
            group.reduce_grads = True
        yield
    finally:
        for group, value in before:
            group.reduce_grads = value
