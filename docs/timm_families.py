"""Try Meta-IADA's classifier search on one model of every timm family and write the table docs/timm_families.md.

    python docs/timm_families.py

Models are built and run on the meta device: no weights, no download, no memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from iada_plugin.head import convert_to_iada, find_classifier
from iada_plugin.runtime.capture import Capture, Forward


def smallest_model(module: str) -> str | None:
    """The first model of a family that the meta device can build."""
    names = timm.list_models(module=module)
    return names[0] if names else None


def _unless_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    def changed(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.is_meta else function(self, *args, **kwargs)

    return changed


@contextmanager
def shapes_only() -> Iterator[None]:
    """Without initial values, normalization, activations and recurrence, which leave shapes as they are.

    The meta device has no values, but takes most of the time to find out that.
    """

    def lstm(self: nn.LSTM, x: Tensor, hx: Any = None) -> tuple[Tensor, None]:
        return x.new_empty(*x.shape[:-1], self.hidden_size * (2 if self.bidirectional else 1)), None

    with ExitStack() as patches:
        for name in ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_"):
            patches.enter_context(patch.object(Tensor, name, _unless_meta(getattr(Tensor, name))))
        for name in ("batch_norm", "layer_norm", "gelu", "silu"):
            patches.enter_context(patch.object(nn.functional, name, lambda x, *args, **kwargs: x))
        patches.enter_context(patch.object(nn.LSTM, "forward", lstm))
        yield


def try_family(module: str) -> tuple[str, str, str]:
    """Model tried, its classifier or "-", and what came of it."""
    name = smallest_model(module)
    if name is None:
        return "-", "-", "no registered model"
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name, num_classes=10).train()
    except Exception as error:
        return name, "-", f"not checked: cannot be built on the meta device ({type(error).__name__})"
    try:
        classifier, linear = find_classifier(model)
    except (TypeError, ValueError) as error:
        return name, "-", f"refused: {error}"
    seen: list[Forward] = []
    capture = Capture(model, convert_to_iada(linear), seen.append, lambda: seen[-1] if seen else None)
    size = model.pretrained_cfg.get("input_size", (3, 224, 224))
    try:
        output = model(torch.empty(2, *size, device="meta"))
    except Exception as error:
        return name, classifier, f"found; its pass is not checked: fails on the meta device ({type(error).__name__})"
    try:
        capture.check(seen[-1], output[0] if isinstance(output, tuple) else output)
    except (RuntimeError, ValueError) as error:
        return name, classifier, f"refused: {error}"
    return name, classifier, "works"


def table() -> list[tuple[str, str, str, str]]:
    """Rows (family, model, classifier, outcome)."""
    set_fused_attn(False)
    with shapes_only():
        return [(module, *try_family(module)) for module in timm.list_modules()]


def main() -> None:
    """Write the table."""
    rows = table()
    works = sum(outcome == "works" for *_, outcome in rows)
    lines = [
        "# timm families",
        "",
        f"One model of each of timm {timm.__version__}'s {len(rows)} families, tried by `docs/timm_families.py` on the meta"
        f" device: {works} work. *Works* means that the classifier is found, is one `Linear` on features `[N, H]`, and that"
        " the model's output is its output. The others raise the error shown when training starts.",
        "",
        "| family | model tried | classifier | outcome |",
        "|---|---|---|---|",
        *(f"| {f} | {m} | {f'`{c}`' if c != '-' else c} | {o} |" for f, m, c, o in rows),
        "",
    ]
    path = Path(__file__).with_suffix(".md")
    path.write_text("\n".join(lines))
    print(f"{works} of {len(rows)} families work; wrote {path}")
    for family, model, _, outcome in rows:
        if outcome != "works":
            print(f"{family:<24}{model:<40}{outcome}")


if __name__ == "__main__":
    main()
