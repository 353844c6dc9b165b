"""Put the results.json files of one example, a file a seed, into one table.

    python benchmarks/summarize.py --name hatexplain --note "..." run0/results.json run1/results.json ...

Writes benchmarks/results/NAME.json (every run, without folders of the machine) and NAME.md (mean and standard deviation
over seeds, and each seed's difference).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np

NAMES = {"ce": "cross-entropy", "iada": "Meta-IADA"}
ROWS = {
    "average": "average accuracy",
    "worst_group": "worst-group accuracy",
    "accuracy": "accuracy",
    "many": "many-shot classes",
    "medium": "medium-shot classes",
    "few": "few-shot classes",
}


def load(path: str) -> dict:
    run = json.loads(Path(path).read_text())
    settings = run["settings"]
    settings.pop("output", None)
    if settings.get("data"):
        settings["data"] = Path(settings["data"]).name
    return run


def table(runs: list[dict]) -> list[str]:
    methods = list(runs[0]["methods"])
    lines = [
        "| | " + " | ".join(NAMES[m] for m in methods) + " | difference, each seed |",
        "|---" * (len(methods) + 2) + "|",
    ]
    for key, label in ROWS.items():
        if key not in runs[0]["methods"][methods[0]]:
            continue
        values = np.array([[run["methods"][m][key] for run in runs] for m in methods], dtype=float) * 100
        if np.isnan(values).any():
            continue
        spread = values.std(axis=1, ddof=1) if len(runs) > 1 else np.zeros(len(methods))
        cells = [f"{mean:.1f} +- {sd:.1f}" for mean, sd in zip(values.mean(axis=1), spread, strict=True)]
        differences = ", ".join(f"{d:+.1f}" for d in values[-1] - values[0])
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {differences} |")
    return lines


def intervals(runs: list[dict]) -> list[str]:
    if "worst_group_interval_95" not in next(iter(runs[0]["methods"].values())):
        return []
    lines = ["", "Worst group of each seed, with its 95 % bootstrap interval:", "", "| seed | method | worst group | accuracy | interval |",
             "|---|---|---|---|---|"]  # fmt: skip
    for run in runs:
        for method, found in run["methods"].items():
            low, high = found["worst_group_interval_95"]
            size = found["groups"][found["worst_group_name"]]["size"]
            lines.append(f"| {run['settings']['seed']} | {NAMES[method]} | {found['worst_group_name']} ({size} rows) |"
                         f" {100 * found['worst_group']:.1f} | {100 * low:.1f} to {100 * high:.1f} |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--title", required=True)
    parser.add_argument("--command", required=True, help="what was run, for the record")
    parser.add_argument("--note", default="", help="what the table shows, in a sentence or two")
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    runs = sorted((load(path) for path in args.files), key=lambda run: run["settings"]["seed"])
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
    (folder / f"{args.name}.json").write_text(
        json.dumps({"command": args.command, "machine": machine, "runs": runs}, indent=1)
    )
    versions = ", ".join(f"{k} {v}" for k, v in runs[0]["versions"].items())
    text = [f"# {args.title}", "", args.note, "", f"`{args.command}`", "",
            f"Seeds {', '.join(str(r['settings']['seed']) for r in runs)}; {versions}; {machine}. Accuracies in %, mean and"
            " standard deviation over seeds; the last column is Meta-IADA less cross-entropy. Every run, with its settings:"
            f" [{args.name}.json]({args.name}.json).", "", *table(runs), *intervals(runs), ""]  # fmt: skip
    (folder / f"{args.name}.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
