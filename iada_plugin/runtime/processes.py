"""The collectives of the meta step. Each is the identity in a single process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def refuse_join() -> None:
    """DDP's ``join``, in whose forward pass this is called, shadows its own collectives for a rank without batches, not ours.

    Raises:
        RuntimeError: it is on; the ranks would wait for each other for ever.
    """
    ddp = DistributedDataParallel._get_active_ddp_module() if world_size() > 1 else None
    if ddp is not None and ddp._join_config.enable:
        raise RuntimeError(
            "join_uneven_inputs (DDP's join) lets a rank run out of batches before the others, and a meta step needs all of them: give"
            " every rank as many batches (even_batches=True in Accelerate, drop_last or padding in a DistributedSampler)."
        )


def weighted_average_(tensors: Sequence[Tensor], weight: float) -> None:
    """Replace tensors by their average over processes, weighted by ``weight`` (a process's sample count), in place."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors] + [tensors[0].new_ones(1)]) * weight
    dist.all_reduce(flat)
    flat = flat[:-1] / flat[-1]
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """Concatenate ``[n_r, ...]`` of all processes in rank order, for several tensors at once; the numbers of rows n_r may
    differ between processes.

    Every process then computes on the same global batch, so results agree bit for bit on all ranks and equal those of
    one process with that batch. Whole numbers travel by themselves, exactly.
    """
    if world_size() == 1:
        return list(tensors)
    whole = [not t.is_floating_point() for t in tensors]
    if any(whole) and not all(whole):
        parts = {
            kind: iter(gather_rows(*(t for t, w in zip(tensors, whole, strict=True) if w is kind)))
            for kind in (True, False)
        }
        return [next(parts[w]) for w in whole]
    rows = tensors[0].shape[0]
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    packed = torch.cat([t.reshape(rows, -1).to(dtype) for t in tensors], dim=1)
    size = torch.tensor([rows], device=packed.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    counts = [int(s) for s in sizes]
    padded = packed.new_zeros((max(counts), packed.shape[1]))
    padded[:rows] = packed
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    whole = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    columns = whole.split([t[0].numel() for t in tensors], dim=1)
    return [c.reshape(-1, *t.shape[1:]).to(t.dtype) for c, t in zip(columns, tensors, strict=True)]


def global_mean(mean: Tensor, count: int) -> Tensor:
    """A mean over ``count`` samples, scaled so that its average over processes is the mean over all samples; unchanged
    where all processes have as many."""
    if world_size() == 1:
        return mean
    total = torch.tensor(float(count), device=mean.device)
    dist.all_reduce(total)
    return mean * (count * world_size() / total.to(mean.dtype))


def on_any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on some process: decisions that lead to collectives have to be common ones."""
    if world_size() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)
