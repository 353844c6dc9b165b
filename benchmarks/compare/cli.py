"""What the command lines of the examples have in common."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from iada_plugin.config import IADAConfig

from .methods import METHODS, run_method, versions, with_overrides
from .scenarios import Scenario

_LABELS = {
    "accuracy": "accuracy", "macro_accuracy": "mean of classes", "many": "  many-shot classes (> 100 samples)",
    "medium": "  medium-shot classes", "few": "  few-shot classes (< 20 samples)", "macro_precision": "macro precision",
    "worst_group": "worst group", "average": "average", "weighted_average": "average, weighted as in training",
}  # fmt: skip


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Options that every example has.

    Args:
        description: of the example.
        name: of its output folder.
    """
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument("--data", help="the real thing (see above); default: built-in samples, no download")
    found.add_argument("--method", nargs="+", choices=list(METHODS), default=["ce", "iada"], help="default: ce iada")
    found.add_argument("--model", help="resnet8 to resnet110 (CIFAR), wrn28_10, smallconv, or any timm model")
    found.add_argument("--epochs", type=int, help="passes over the training data")
    found.add_argument("--batch-size", type=int)
    found.add_argument("--lr", type=float, help="learning rate at the start")
    found.add_argument("--warmup-ratio", type=float, help="share of the run of warm-up")
    found.add_argument("--image-size", type=int, help="scale images to this many pixels")
    found.add_argument("--workers", type=int, default=0, help="processes that load image files")
    found.add_argument("--config", nargs="+", default=[], metavar="NAME=VALUE",
                       help="settings of IADAConfig, such as alpha=0.25 epsilon_range=-1,0")  # fmt: skip
    found.add_argument("--seed", type=int, default=0, help="of weights, draws and order")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--output", default=f"outputs/{name}", help="folder for results.json")
    return found


def parse_config(pairs: list[str]) -> dict[str, Any]:
    """``["alpha=0.25", "epsilon_range=-1,0"]`` as settings.

    Raises:
        ValueError: no such setting, or a value that it cannot take.
    """
    known = [f.name for f in fields(IADAConfig)]
    config: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in known or not text:
            raise ValueError(f"--config {pair}: give NAME=VALUE with NAME one of {', '.join(known)}.")
        try:
            config[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            config[name] = text
    IADAConfig(**config)
    return config


def main(args: argparse.Namespace, build: Callable[[], Scenario]) -> None:
    """Build the scenario, train the methods, print a table and write results.json; an error is one line."""
    try:
        config = parse_config(args.config)
        scenario = build()
        settings = with_overrides(
            scenario.settings, model=args.model, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
            warmup_ratio=args.warmup_ratio, workers=args.workers,
        )  # fmt: skip
        scenario.network(settings.model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.data is None:
        print("No --data: using built-in samples.")
    counts = scenario.counts
    shown = f"{counts[0]} ... {counts[-1]} ({len(counts)} classes)" if len(counts) > 20 else " ".join(map(str, counts))
    print(f"training samples per class: {shown}; meta {len(scenario.meta)}, test {len(scenario.test)}")
    print(f"{settings.model}, {settings.epochs} epochs, {args.device}")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    predictions, reports = {}, {}
    reported = importlib.util.find_spec("matplotlib") is not None
    for name in args.method:
        try:
            run = run_method(
                scenario,
                METHODS[name],
                settings=settings,
                seed=args.seed,
                device=args.device,
                config=config,
                report=reported,
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise SystemExit(f"error: {METHODS[name].title}: {error}") from error
        predictions[METHODS[name].title] = run.pop("predictions")
        reports[name] = run.pop("report", None)
        found[name] = run
        results = {"arguments": vars(args), "settings": asdict(settings), "counts": counts, "versions": versions(), "methods": found}  # fmt: skip
        (folder / "results.json").write_text(json.dumps(without_nan(results), indent=2))
    _print_table(found, len(scenario.test))
    print(f"\nWrote {folder / 'results.json'}.")
    groups = None if scenario.test.groups is None else scenario.test.groups.cpu()
    for name, report in reports.items():
        if report is not None and not report.empty:
            for title, values in predictions.items():
                report.add_evaluation(title, values, scenario.test.y.cpu(), groups, scenario.group_names)
            print(f"What {METHODS[name].title} did to the samples: {report.write(folder / f'report_{name}')}")


def without_nan(value: Any) -> Any:
    """The same with ``None`` for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def _print_table(found: dict[str, dict[str, Any]], rows: int) -> None:
    titles = [METHODS[name].title for name in found]
    width = max(16, *(len(title) + 2 for title in titles))

    def line(label: str, values: list[str]) -> None:
        print(f"{label:<40}" + "".join(f"{value:>{width}}" for value in values))

    print()
    line(f"{rows} test samples, in %", titles)
    for key, label in _LABELS.items():
        values = [run["metrics"].get(key) for run in found.values()]
        if all(v is not None and v == v for v in values):
            line(label, [f"{100 * v:.1f}" for v in values])  # type: ignore[operator]
    detection = [run["noise_auroc"] for run in found.values()]
    if any(v is not None for v in detection):
        line("AUROC of wrong labels (loss, epsilon)", ["-" if v is None else f"{100 * v:.1f}" for v in detection])
    line("seconds", [f"{run['seconds']:.0f}" for run in found.values()])
