"""The engine's state as a flat dictionary of tensors, fit for safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .runtime.sharding import part_like, whole_like

if TYPE_CHECKING:
    from .criterion import MetaIADA


def collect(engine: MetaIADA) -> dict[str, Tensor]:
    """Everything a resumed run needs; copies.

    Raises:
        RuntimeError: the engine was closed and its statistics are gone.
    """
    if not hasattr(engine.head, "covariance"):
        raise RuntimeError("this MetaIADA was closed: take its state_dict() before close().")
    found = {f"perturbation.{k}": v for k, v in engine.meta.perturbation.state_dict().items()}
    for index, entry in engine.meta.meta_optimizer.state_dict()["state"].items():
        found |= {f"meta_optimizer.{index}.{k}": torch.as_tensor(v) for k, v in entry.items()}
    if engine.meta.passes.average is not None:
        found |= {
            f"meta_gradient.{k}": whole_like(v, p)
            for (k, p), v in zip(engine.meta.passes.parameters.items(), engine.meta.passes.average, strict=True)
        }
    if (counted := engine.meta.passes.counted) is not None:
        step, loss, fine = counted
        found["meta_counted"] = torch.stack([torch.full_like(loss, step), loss, fine.to(loss.dtype)]).double()
    found |= {f"means.{k}": v for k, v in engine.statistics.means.state_dict().items()}
    found |= {f"head.{k}": v for k, v in engine.head.named_buffers()}
    found["label_count"] = engine.statistics.label_count
    plan = (engine.warmup_steps, engine.statistics_start)  # a longer run goes on with the warm-up it began with
    counters = (engine.step, engine.meta.skipped, int(engine.statistics.prior_known), *plan)
    found["counters"] = torch.tensor(counters)
    found["meta_position"] = torch.tensor(engine.meta_batches.position)
    found["loss_scale"] = torch.stack([engine.meta.passes.scaling.scale, engine.meta.passes.scaling.streak])
    return {k: v.detach().clone().contiguous() for k, v in found.items()}


def restore(engine: MetaIADA, state: dict[str, Tensor]) -> None:
    """Undo :func:`collect`; nothing is changed unless everything fits.

    Raises:
        ValueError: missing or unknown entries, or other shapes.
    """
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"a Meta-IADA state is a dict of tensors, as state_dict() gives it, not {type(state).__name__}."
        )
    # Adam's state and the average exist from the first meta step on.
    later = ("meta_optimizer.", "meta_gradient.", "meta_counted")
    own = {k: v for k, v in collect(engine).items() if not k.startswith(later)}
    adam, average = (_with_prefix(state, prefix) for prefix in later[:2])
    given = dict(state)
    parameters, kept = engine.meta.passes.parameters, engine.config.momentum > 0
    if "meta_counted" in state:
        own["meta_counted"] = torch.zeros(3)
    if average:
        own |= {f"meta_gradient.{k}": p for k, p in parameters.items()}
    if adam:
        for index, p in enumerate(engine.meta.perturbation.parameters()):
            shapes = {"exp_avg": p, "exp_avg_sq": p, "step": torch.zeros(())}
            own |= {f"meta_optimizer.{index}.{k}": t for k, t in shapes.items()}
    problems = [f"{k} is missing" for k in own if k not in given]
    problems += [f"{k} is unknown" for k in given if k not in own]
    problems += [
        f"{k} is {list(given[k].shape)}, not {list(v.shape)}"
        for k, v in own.items()
        if k in given and given[k].shape != v.shape
    ]
    problems += [f"{k} is not finite" for k, v in given.items() if k in own and not bool(torch.isfinite(v).all())]
    problems += [f"{k} is negative" for k in ("counters", "meta_position") if k in given and bool((given[k] < 0).any())]
    if problems:
        more = f" ({len(problems)} differences)" if len(problems) > 3 else ""
        raise ValueError(
            f"this Meta-IADA state is damaged, or of another model or setting: {'; '.join(problems[:3])}{more}."
        )
    engine.meta_batches.move_to(given["meta_position"].tolist())
    engine.meta.perturbation.load_state_dict(_with_prefix(given, "perturbation."))
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in adam.items():
        index, name = key.split(".")
        entries.setdefault(int(index), {})[name] = value.clone()
    groups = engine.meta.meta_optimizer.state_dict()["param_groups"]
    engine.meta.meta_optimizer.load_state_dict({"state": entries, "param_groups": groups})
    engine.statistics.means.load_state_dict(_with_prefix(given, "means."))
    for key, buffer in engine.head.named_buffers():
        buffer.copy_(given[f"head.{key}"])
    engine.statistics.label_count.copy_(given["label_count"])
    engine.step, engine.meta.skipped, prior_known, *plan = given["counters"].tolist()
    engine.warmup_steps, engine.statistics_start = plan
    engine.statistics.reset(bool(prior_known))
    engine.meta.passes.forget()
    engine.start_step()
    engine.meta.passes.counted = None
    if "meta_counted" in given and kept:
        step, loss, fine = given["meta_counted"].to(engine.capture.device)
        engine.meta.passes.counted = int(step), loss.to(engine.head.covariance.dtype), fine > 0
    engine.meta.passes.average = [part_like(average[k], p) for k, p in parameters.items()] if average and kept else None
    engine.meta.passes.scaling.scale, engine.meta.passes.scaling.streak = given["loss_scale"].to(
        engine.capture.device, copy=True
    )


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
