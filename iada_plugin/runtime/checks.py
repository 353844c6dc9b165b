"""What can be known to go wrong, said at the start."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..config import IADAConfig
from .precision import RELATIVE_STEP
from .processes import world_size
from .sharding import is_fsdp, is_sharded

#: What ``torch.compile(mode=...)`` calls the use of CUDA graphs.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def unwrap_model(model: nn.Module) -> tuple[nn.Module, bool, bool]:
    """The model inside DDP and ``torch.compile``, whether it was compiled, and whether with CUDA graphs."""
    compiled = graphs = False
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the nn.Module that is trained.")
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "nn.DataParallel copies the model in every step, which hides it from IADA. Use DistributedDataParallel"
                " (torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        for code in (model if hasattr(model, "_orig_mod") else None, getattr(model, "_compiled_call_impl", None)):
            if code is not None:
                compiled = True
                settings = getattr(code, "get_compiler_config", lambda: None)() or {}
                graphs = graphs or bool(settings.get("triton.cudagraphs"))
        if isinstance(model, nn.parallel.DistributedDataParallel):
            if model.static_graph:
                raise ValueError(
                    "DistributedDataParallel(static_graph=True) waits for its own outputs in the first step, which the loss of"
                    " the features passes by: ranks would part silently. Leave static_graph out."
                )
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens the parameters, which hides the classifier: use FSDP2 (fully_shard;"
                " in Accelerate and the Trainer fsdp_version=2) or DDP."
            )
        elif type(model).__name__ == "DeepSpeedEngine":
            model = model.module  # type: ignore[assignment]
        else:
            return model, compiled, graphs


def check_processes() -> None:
    """Accelerate, where it is in use, and torch.distributed count the same processes.

    Raises:
        ValueError: they do not.
    """
    states = sys.modules.get("accelerate.state")
    if states is None or not states.PartialState._shared_state:
        return
    counted = states.PartialState().num_processes
    if counted != world_size():
        raise ValueError(
            f"Accelerate counts {counted} processes and torch.distributed {world_size()}: each would train by itself. On CPUs"
            " tell Accelerate so, Accelerator(cpu=True) or TrainingArguments(use_cpu=True), and launch with torchrun."
        )


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in Accelerate's, DeepSpeed's or both wrappers."""
    inner = optimizer
    while getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return inner


def zero_groups(optimizer: Any) -> list[list[Tensor]] | None:
    """The model's parameters in each group of DeepSpeed's ZeRO optimizer (stage 1 and 2), which trains flat copies of parts
    in their place, with one ``step()`` of the torch optimizer for each group. ``None`` where it is none."""
    while optimizer is not None and not hasattr(optimizer, "bit16_groups"):
        optimizer = getattr(optimizer, "optimizer", None)
    return None if optimizer is None else optimizer.bit16_groups


def optimizer_groups(optimizer: Any) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Parameter groups, and the model's parameters in each."""
    groups = unwrap_optimizer(optimizer).param_groups
    members = zero_groups(optimizer) or [group["params"] for group in groups]
    return list(zip(groups, members, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_denominator(denominator: Any) -> None:
    """A loss is divided by one positive number; on an accelerator only its shape is looked at.

    Raises:
        ValueError: naming it.
    """
    if denominator is None:
        return
    single = denominator.numel() == 1 if isinstance(denominator, Tensor) else _is_number(denominator)
    known = not isinstance(denominator, Tensor) or denominator.device.type == "cpu"
    if not single or (known and not 0 < float(denominator) < math.inf):
        raise ValueError(
            f"denominator={denominator!r} must be one positive number: the samples that the loss is a mean over."
        )


def plan_warmup(config: IADAConfig, steps_per_epoch: int, epochs: float | None) -> tuple[int, int]:
    """First optimizer step with augmentation, and first one whose samples enter the class statistics."""
    if not _is_number(steps_per_epoch) or steps_per_epoch < 1 or steps_per_epoch % 1:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch!r} must be a whole number >= 1: the optimizer steps in an epoch."
        )
    if epochs is not None and (not _is_number(epochs) or epochs <= 0):
        raise ValueError(f"epochs={epochs!r} must be a positive number, the length of the run, or None.")
    total = None if epochs is None else round(epochs * steps_per_epoch)
    if config.warmup_epochs is not None:
        warmup = round(config.warmup_epochs * steps_per_epoch)
    elif total is not None:
        warmup = round(config.warmup_ratio * total)
    else:
        warmup = steps_per_epoch
        warnings.warn(
            "MetaIADA does not know how long the run is: the warm-up is one epoch, instead of warmup_ratio of the run. Pass"
            " epochs=..., or IADAConfig(warmup_epochs=...), to choose it."
        )
    epochs_set = config.warmup_epochs is not None
    setting = f"warmup_epochs (={config.warmup_epochs})" if epochs_set else f"warmup_ratio (={config.warmup_ratio})"
    if total is not None and warmup >= total:
        raise ValueError(
            f"the warm-up of {warmup} steps leaves no meta step in a run of {total} steps: lower {setting}, or train longer."
        )
    return warmup, max(0, warmup - max(1, round(config.statistics_epochs * steps_per_epoch)))


def refuse_reentrant_checkpointing(model: nn.Module, config: IADAConfig) -> None:
    """Refuse transformers' reentrant gradient checkpointing, which cannot do ``torch.autograd.grad``."""
    if config.hypergradient == "head":
        return
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(REENTRANT)


REENTRANT = (
    "reentrant gradient checkpointing cannot give the gradient of the virtual step. Use the non-reentrant kind"
    " (TrainingArguments(gradient_checkpointing_kwargs={'use_reentrant': False})), or hypergradient='head'."
)


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def check_parameters(model: nn.Module, head: nn.Linear, config: IADAConfig) -> dict[str, nn.Parameter]:
    """The trainable parameters of the virtual step, by name: all of the model's, or the head's in mode "head".

    Raises:
        ValueError: there are none, they are sharded, or too coarse for finite differences.
    """
    mode = config.hypergradient
    own = {id(head.weight), id(head.bias)}
    parameters = {
        name: p for name, p in model.named_parameters() if p.requires_grad and (mode != "head" or id(p) in own)
    }
    if not parameters:
        what = "the classifier" if mode == "head" else "the model"
        raise ValueError(f"{what} has no trainable parameter (requires_grad): there is nothing to augment for.")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("DeepSpeed ZeRO-3 shards the parameters: use stage 1 or 2, or FSDP2 (fully_shard).")
    if any(map(is_sharded, model.parameters())):
        if not is_fsdp(model):
            raise ValueError(
                f"{type(model).__name__} has parameters that are spread over processes, but not by fully_shard on the model"
                " itself (torch >= 2.6): tensor parallelism is not supported; call fully_shard(model) last."
            )
        if mode != "head" and (config.schedule == "lookahead" or mode == "forward"):
            raise ValueError(
                f"schedule={config.schedule!r} with hypergradient={mode!r} needs whole parameters, and FSDP shards them: use"
                " IADAConfig(schedule='online'), or hypergradient='head'."
            )
    sparse = [n for n, m in model.named_modules() if getattr(m, "sparse", False) and isinstance(m, _EMBEDDINGS)]
    if mode != "head" and sparse:
        raise ValueError(f"{sparse[0]} has sparse gradients, which cannot be a displacement: use sparse=False.")
    coarse = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype not in RELATIVE_STEP}
    if mode == "finite_difference" and coarse:
        raise ValueError(
            f"hypergradient='finite_difference' needs float32 weights, got {', '.join(map(str, coarse))}: a difference"
            " of half-precision features is noise. Keep float32 weights under autocast (bf16=True in the Trainer), or"
            " use hypergradient='forward' or 'head'."
        )
    return parameters


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device."""
    signs = ("out of memory", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in signs))
