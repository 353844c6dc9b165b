"""Finding the linear layer that gives a model's logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def find_classifier(model: nn.Module, name: str | nn.Module | None = None) -> tuple[str, nn.Linear]:
    """Find the linear layer that gives a model's logits.

    Looked up in this order: ``name``; timm's ``pretrained_cfg["classifier"]``; the ``Linear`` layers with as many
    outputs as ``config.num_labels``, those under a usual name ("classifier", "score", "head", "fc") first, the last one
    where several remain. The first training step checks that the layer found gives the logits.

    Args:
        model: a transformers, timm or any other model.
        name: the layer's name in ``model.named_modules()``, or the layer itself, where the search needs help.

    Returns:
        Name and layer.

    Raises:
        TypeError: the layer is no plain ``nn.Linear``.
        ValueError: no layer, or several that all count.
    """
    title = type(model).__name__
    modules = dict(_live_modules(model))
    if isinstance(name, nn.Module):
        found = next((key for key, module in modules.items() if module is name), None)
        if found is None:
            raise ValueError(f"the classifier given is not a module of {title}.")
        name = found
    elif name is None:
        name = _timm_classifier(model, modules) or _linear_classifier(model, modules)
    if name not in modules:
        raise ValueError(f"{title} has no module {name!r}; its last ones are {', '.join(list(modules)[-5:])}.")
    module = modules[name]
    require_linear(module, f"{title}: the classifier {name!r}")
    return name, module  # type: ignore[return-value]


def _live_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules, without the inactive copies that peft keeps and the insides of its adapted layers."""
    passed_over: list[str] = []
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(prefix) for prefix in passed_over):
            continue
        if hasattr(module, "base_layer"):
            passed_over.append(f"{name}.")
        elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            active = getattr(module, "active_adapters", None) or [module.active_adapter]  # peft < 0.14 has one
            idle = [adapter for adapter in module.modules_to_save if adapter not in active]
            passed_over += [f"{name}.original_module.", *(f"{name}.modules_to_save.{adapter}." for adapter in idle)]
        yield name, module


def _timm_classifier(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    cfg = getattr(model, "pretrained_cfg", None)
    name = cfg.get("classifier") if isinstance(cfg, dict) else None
    if isinstance(name, (tuple, list)):
        title = cfg.get("architecture") or type(model).__name__  # type: ignore[union-attr]
        raise ValueError(
            f"{title} has several classifiers, {', '.join(name)}, whose logits are combined: IADA needs one linear"
            " layer. Choose a variant of the model with a single head (for DeiT and LeViT the one that is not distilled)."
        )
    if name and isinstance(modules.get(name), nn.Identity):
        raise ValueError(f"{type(model).__name__} has no classifier: create it with num_classes >= 2.")
    if name and not isinstance(modules.get(name), nn.Linear):
        # Some families name a wrapper; take its one Linear. Inside of peft's wrapper the name is the end of a longer one.
        inside = [key for key, m in modules.items() if f".{name}." in f".{key}." and isinstance(m, nn.Linear)]
        if len(inside) == 1:
            return inside[0]
    return name if name in modules else None


def _linear_classifier(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    # A layer that peft adapts counts, so that it is refused by name rather than passed over.
    linear = [key for key, m in modules.items() if isinstance(getattr(m, "base_layer", m), nn.Linear)]
    if num_labels is not None:
        linear = [key for key in linear if modules[key].out_features == num_labels]
    usual = [key for key in linear if {"classifier", "score", "head", "fc"} & set(key.split("."))]
    candidates = usual or linear
    if not candidates and isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"a TorchScript model ({type(model).__name__}) cannot have its classifier exchanged: train the eager one, and script or trace"
            " it afterwards."
        )
    if not candidates:
        wanted = "" if num_labels is None else f" with {num_labels} outputs (config.num_labels)"
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear{wanted}, so there is no classifier to augment. IADA needs logits"
            " from one linear layer; name it with classifier='...' if the search missed it."
        )
    return candidates[-1]


def require_linear(module: nn.Module, what: str) -> None:
    """Refuse what is no plain ``nn.Linear`` with a weight.

    Raises:
        TypeError: another kind of module, or a weight that is computed from others, with what to do about it.
        ValueError: a ``LazyLinear`` that has not seen a batch.
    """
    # timm's Linear differs from nn.Linear under torch.jit only.
    plain = type(module).forward is nn.Linear.forward or type(module).__module__ == "timm.layers.linear"
    if isinstance(module, nn.LazyLinear):
        raise ValueError(f"{what} is lazy, without a weight yet: run one batch through the model first.")
    if isinstance(module, nn.Linear) and plain:
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None and name not in module._parameters:
                # weight_norm, spectral_norm, pruning and parametrize put an attribute in its place; it would not be trained.
                others = ", ".join(own for own, _ in module.named_parameters() if name in own)
                raise TypeError(
                    f"{what} computes its {name} from {others} (weight_norm, spectral_norm, pruning, parametrize): IADA trains the"
                    f" {name} itself. Make it plain before, by remove_weight_norm, remove_spectral_norm, prune.remove or"
                    " remove_parametrizations of torch.nn.utils."
                )
        return
    kind = type(module).__name__
    hint = "IADA needs the logits of one nn.Linear on [N, H] features"
    if isinstance(module, nn.Conv2d):
        hint += "; replace the 1x1 convolution after pooling by a Linear with the same weights, or pick another model"
    elif hasattr(module, "base_layer"):
        hint += "; take it out of LoRA's target_modules and put it into modules_to_save"
    else:
        hint += "; pass classifier='name.of.the.linear' if there is one"
    raise TypeError(f"{what} is a {kind}. {hint}.")
