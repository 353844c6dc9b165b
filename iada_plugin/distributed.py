"""The collectives of the meta step. Each is the identity in a single process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def weighted_average_(tensors: Sequence[Tensor], weight: float) -> None:
    """Replace tensors by their average over processes, weighted by ``weight`` (a process's sample count), in place."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors] + [tensors[0].new_ones(1)]) * weight
    dist.all_reduce(flat)
    flat = flat[:-1] / flat[-1]
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate ``[n_r, ...]`` of all processes in rank order; the numbers of rows may differ.

    Every process then computes on the same global batch, so results agree bit for bit on all ranks and equal those of
    one process with that batch.
    """
    if world_size() == 1:
        return tensor
    size = torch.tensor([tensor.shape[0]], device=tensor.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    rows = [int(s) for s in sizes]
    padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.zeros_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])
