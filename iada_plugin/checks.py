"""What can be known to go wrong, said at the start."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .config import IADAConfig
from .hypergradient import RELATIVE_STEP


def unwrap_model(model: nn.Module) -> tuple[nn.Module, bool]:
    """The model inside DDP and ``torch.compile``, and whether it was compiled."""
    compiled = False
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "nn.DataParallel copies the model in every step, which hides it from IADA. Use DistributedDataParallel"
                " (torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        compiled = compiled or hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
        if isinstance(model, nn.parallel.DistributedDataParallel):
            if model.static_graph:
                raise ValueError(
                    "DistributedDataParallel(static_graph=True) waits for its own outputs in the first step, which the loss of"
                    " the features passes by: ranks would part silently. Leave static_graph out."
                )
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise ValueError(f"{type(model).__name__} shards the parameters: not supported yet; train with DDP.")
        else:
            return model, compiled


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return inner


def plan_warmup(config: IADAConfig, steps_per_epoch: int, epochs: float | None) -> tuple[int, int]:
    """First optimizer step with augmentation, and first one whose samples enter the class statistics."""
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch={steps_per_epoch} must be at least 1: the number of optimizer steps.")
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


def is_soft(target: Tensor, output: Tensor) -> bool:
    """Whether targets are class probabilities, as mixup gives them."""
    return target.is_floating_point() and target.shape == output.shape


def check_labels(labels: Tensor, n: int, num_classes: int, *, always: bool) -> None:
    """Labels are ``[n]`` class indices below ``num_classes``.

    On an accelerator reading their range costs a wait: it is done where ``always`` is set, else the indexing by labels
    asserts it on the device.

    Raises:
        ValueError: naming what is wrong.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: IADA needs class indices, one per sample: labels.long() where they are whole"
                         " numbers, labels.argmax(1) where they are one-hot.")  # fmt: skip
    if labels.dim() != 1 or labels.shape[0] != n:
        raise ValueError(f"labels have shape {list(labels.shape)}: IADA needs class indices [N], one per sample"
                         " (squeeze(1) a column; argmax(1) one-hot rows; give a loader of batches, not of samples).")  # fmt: skip
    if n == 0:
        raise ValueError("a batch has no sample.")
    if labels.device.type == "cpu" or always:
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if wrong.numel():
            raise ValueError(
                f"label {int(wrong[0])} is out of range: the classifier has {num_classes} classes,"
                f" 0 to {num_classes - 1}."
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
    if any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("parameters are sharded (FSDP, DeepSpeed ZeRO-3): not supported yet; train with DDP.")
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
