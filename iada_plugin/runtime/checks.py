"""What can be known to go wrong, said at the start."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .processes import world_size

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


def check_types(model: nn.Module, layer: nn.Linear) -> None:
    """Types that the passes of a meta step do not have.

    Raises:
        ValueError: complex parameters, parameters that a pass makes or writes, or a default type that is not the one that IADA
            computes in.
    """
    for name, module in model.named_modules():
        if any(map(nn.parameter.is_lazy, module.parameters(recurse=False))):
            raise ValueError(f"{name} is lazy, without parameters yet: run one batch through the model first.")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ValueError(
                f"{name} writes its weight in each pass (max_norm={module.max_norm}), also in those of meta steps: use max_norm=None, and"
                " scale the rows of the weight after optimizer.step()."
            )
    found = next((name for name, p in model.named_parameters() if p.is_complex()), None)
    if found is not None:
        raise ValueError(f"the parameter {found} is complex: the virtual step is taken along real parameters only. Keep it as two"
                         " real ones (torch.view_as_complex in the forward pass).")  # fmt: skip
    wanted = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    if torch.get_default_dtype() not in (torch.float32, wanted):
        raise ValueError(
            f"torch's default type is {torch.get_default_dtype()}, and IADA computes in {wanted} for a classifier in"
            f" {layer.weight.dtype}: call torch.set_default_dtype({wanted}), and give the model its type by model.to(...)."
        )


def check_rates(optimizer: torch.optim.Optimizer) -> None:
    """A learning rate that the virtual step, or the end of the warm-up, can go by.

    Raises:
        ValueError: it is ``None``, as Adafactor's with ``relative_step=True``.
    """
    if any(group.get("lr", 0) is None for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} has lr=None (relative_step): pass IADAConfig(virtual_lr=..., warmup_epochs=...), or give the"
            " optimizer a learning rate."
        )


def check_last_batch(model: nn.Module, loader: Any) -> None:
    """BatchNorm cannot take a last meta batch of one sample.

    Raises:
        ValueError: the loader's batch size leaves one over.
    """
    size, data = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
    if not size or getattr(loader, "drop_last", True) or not hasattr(data, "__len__") or len(data) % size != 1:
        return
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ValueError(
            f"{len(data)} meta samples in batches of {size} leave a last batch of one, which BatchNorm cannot take: choose another"
            " batch_size, or drop_last=True."
        )


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
    """The torch optimizer in Accelerate's, DeepSpeed's, both or fastai's wrappers."""
    inner = optimizer
    while (wrapped := getattr(inner, "optimizer", None) or getattr(inner, "opt", None)) is not None:
        inner = wrapped
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


def is_number(value: Any) -> bool:
    """Whether this is a finite real number."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_denominator(denominator: Any) -> None:
    """A loss is divided by one positive number; on an accelerator only its shape is looked at.

    Raises:
        ValueError: naming it.
    """
    if denominator is None:
        return
    single = denominator.numel() == 1 if isinstance(denominator, Tensor) else is_number(denominator)
    known = not isinstance(denominator, Tensor) or denominator.device.type == "cpu"
    if not single or (known and not 0 < float(denominator) < math.inf):
        raise ValueError(
            f"denominator={denominator!r} must be one positive number: the samples that the loss is a mean over."
        )


REENTRANT = (
    "reentrant gradient checkpointing cannot give the gradient of the virtual step. Use the non-reentrant kind"
    " (TrainingArguments(gradient_checkpointing_kwargs={'use_reentrant': False})), or hypergradient='head'."
)
