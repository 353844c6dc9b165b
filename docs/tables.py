"""Write the tables of the pages in docs/: settings from `IADAConfig`, figures from benchmarks/results.

python docs/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from iada_plugin import IADAConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def settings() -> str:
    """`IADAConfig`, one setting a row."""
    rows = [
        f"| `{name}` | `{field.default!r}` | {field.metadata['help']} |"
        for name, field in IADAConfig.__dataclass_fields__.items()
    ]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def _benchmark(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


def _made_by(result: dict[str, Any]) -> str:
    return (
        f"Made by `{result['command']}`: {result['machine']}, {result['threads']} threads, torch {result['torch']}, Python"
        f" {result['python']}."
    )


def step_cost() -> str:
    """benchmarks/step_cost.py: one table a model."""
    result = json.loads((RESULTS / "step_cost_cpu.json").read_text())
    return f"{_benchmark('step_cost').render(result, None)}\n\n{_made_by(result)}"


def step_cost_gpu() -> str:
    """benchmarks/step_cost.py on a GPU."""
    result = json.loads((RESULTS / "step_cost_gpu.json").read_text())
    return f"{_benchmark('step_cost').render(result, None)}\n\n{_made_by(result)}"


def report_cost() -> str:
    """benchmarks/step_cost.py, the settings with and without a report."""
    result = json.loads((RESULTS / "report_cost_cpu.json").read_text())
    lines = ["| | with a report, against without (quartiles) | time in the recorder |", "|---|---|---|"]
    for row in result["rows"]:
        if "report_overhead" in row:
            middle, low, high = row["report_overhead"]
            name = row["setting"].removesuffix(", report")
            lines.append(
                f"| {row['model']}, {name} | {middle:.3f} ({low:.3f} to {high:.3f}) | {100 * row['recorder_share']:.2f} % |"
            )
    return "\n".join([*lines, "", _made_by(result)])


def soak() -> str:
    """benchmarks/soak.py."""
    lines = ["| | CPU, small DistilBERT | GPU, DistilBERT-base, bf16 |", "|---|---|---|"]
    cpu, gpu = (json.loads((RESULTS / f"soak_{size}.json").read_text()) for size in ("cpu", "gpu"))
    lines.append(
        f"| steps, killed after | {cpu['size']['steps']}, {cpu['killed_after']} | {gpu['size']['steps']}, {gpu['killed_after']} |"
    )
    for key in cpu["growth"]:
        cells = (" to ".join(f"{v:.4g}" for v in result["growth"][key]) for result in (cpu, gpu))
        lines.append(f"| {key} | {' | '.join(cells)} |")
    lines.append(
        f"| parameters at the end | {'bit-identical' if cpu['bit_identical'] else 'DIFFERENT'} to an undisturbed run | not compared |"
    )
    made = " ".join(_made_by(result["environment"]) for result in (cpu, gpu))
    return "\n".join([*lines, "", made, f"On the GPU {gpu['note']}."])


def logits_cost() -> str:
    """benchmarks/logits_cost.py."""
    result = json.loads((RESULTS / "logits_cost_cpu.json").read_text())
    return f"{_benchmark('logits_cost').render(result)}\n\n{_made_by(result)}"


def approximations() -> str:
    """The group "cost" of benchmarks/study.py."""
    study = _benchmark("study")
    runs = [r for r in study.accuracy.read(RESULTS / "study_cpu.jsonl") if r["group"] == "cost"]
    text = []
    for task in study.GROUPS["cost"][1]:
        own = [r for r in runs if r["scenario"] == task]
        text += [f"{study.TASKS[task].title}:", "", *study.table(own, "cost", task), ""]
    return "\n".join(text).rstrip()


def suspects() -> str:
    """benchmarks/suspects.py."""
    result = json.loads((RESULTS / "suspects_cpu.json").read_text())
    return f"{_benchmark('suspects').render(result, None)}\n\n{_made_by(result)}"


def results() -> str:
    """benchmarks/accuracy.py: a task a row. Bold: the best, where its difference to the second, paired over the seeds, is more than
    two standard errors."""
    accuracy = _benchmark("accuracy")
    runs = accuracy.read(RESULTS / "accuracy_cpu.jsonl")
    lines = ["| task | cross-entropy | Meta-IADA | best other method |", "|---|---|---|---|"]
    for task, (title, metric) in _TASKS.items():
        values: dict[str, dict[int, float]] = {}
        for run in runs:
            if run["scenario"] == task and run["metrics"].get(metric) is not None:
                values.setdefault(run["method"], {})[run["seed"]] = 100 * run["metrics"][metric]
        values = {m: v for m, v in values.items() if len(v) >= 3}
        mean = {m: statistics.mean(v.values()) for m, v in values.items()}
        ranked = sorted(mean, key=mean.get, reverse=True)  # type: ignore[arg-type]
        best, second = ranked[:2]
        seeds = sorted(values[best].keys() & values[second].keys())
        gaps = [values[best][s] - values[second][s] for s in seeds]
        clear = statistics.mean(gaps) > 2 * statistics.stdev(gaps) / len(gaps) ** 0.5
        other = max((m for m in mean if m != "ce" and not m.startswith("iada")), key=mean.get, default=None)  # type: ignore[arg-type]

        def cell(m: str | None, mean: dict[str, float] = mean, best: str = best, clear: bool = clear) -> str:
            if m is None or m not in mean:
                return ""
            name = "" if m in ("ce", "iada") else f" ({accuracy.METHODS[m].title})"
            return (f"**{mean[m]:.1f}**" if m == best and clear else f"{mean[m]:.1f}") + name

        lines.append(f"| {title} | {cell('ce')} | {cell('iada')} | {cell(other)} |")
    return "\n".join(lines)


#: Tasks of README's table, and what they are measured by.
_TASKS = {
    "cifar10_flip2_40": ("CIFAR-10, 40 % wrong labels in pairs of classes", "accuracy"),
    "cifar10n_worst": ("CIFAR-10N, 40 % human noise", "accuracy"),
    "cifar10_lt": ("CIFAR10-LT 100:1", "accuracy"),
    "reuters52": ("Reuters R52, mean of classes", "macro_accuracy"),
    "colored_mnist": ("Colored MNIST, worst group", "worst_group"),
    "hatexplain": ("HateXplain, worst group", "worst_group"),
    "cifar10_balanced": ("CIFAR-10, balanced and clean", "accuracy"),
}

BLOCKS = {
    ROOT / "README.md": [results],
    ROOT / "docs" / "settings.md": [settings],
    ROOT / "docs" / "cost.md": [step_cost, step_cost_gpu, logits_cost, report_cost, approximations],
    ROOT / "docs" / "long_runs.md": [soak],
    ROOT / "docs" / "report.md": [suspects],
}


def filled(page: Path) -> str:
    """The page's text with its tables as they should be."""
    text = page.read_text()
    for make in BLOCKS[page]:
        name = make.__name__
        block = re.compile(f"(?<=<!-- {name} -->\n).*(?=<!-- /{name} -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"{page.name} has no block <!-- {name} --> ... <!-- /{name} -->.")
        new = make() + "\n"
        text = block.sub(lambda _, new=new: new, text)
    return text


if __name__ == "__main__":
    for page in BLOCKS:
        if "--check" not in sys.argv:
            page.write_text(filled(page))
        elif page.read_text() != filled(page):
            raise SystemExit(f"{page.name} is not up to date: python docs/tables.py")
