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


def step_cost_widths(file: str = "step_cost_widths") -> str:
    """benchmarks/step_cost.py at usual widths: a model a row, a setting a column."""
    result = json.loads((RESULTS / f"{file}.json").read_text())
    rows = [r for r in result["rows"] if r["setting"] != "plain"]
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    found = {(r["model"], r["setting"]): r for r in rows}
    lines = [f"| model | plain step, ms | {' | '.join(settings)} |", "|---|---|" + "---|" * len(settings)]
    for plain in (r for r in result["rows"] if r["setting"] == "plain"):
        own = (found.get((plain["model"], s), {}) for s in settings)
        cells = (f"{r['time_ratio']:.2f} / {r['memory_ratio']:.2f}" if "time_ratio" in r else "failed" for r in own)
        lines.append(f"| {plain['model']} | {1e3 * plain['seconds']:.0f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _made_by(result)])


def step_cost_classes() -> str:
    """The same by the number of classes."""
    return step_cost_widths("step_cost_classes")


def trusted_cost() -> str:
    """benchmarks/trusted_cost.py."""
    result = json.loads((RESULTS / "trusted_cost_cpu.json").read_text())
    return f"{_benchmark('trusted_cost').render(result)}\n\n{_made_by(result)}"


def whole_runs() -> str:
    """Seconds of whole runs in benchmarks/accuracy.py's tables, the default with trusted rows against cross-entropy."""
    accuracy = _benchmark("accuracy")
    runs = accuracy.grid.read(RESULTS / "accuracy_pretrained.jsonl")
    seconds = {(r["scenario"], r["method"], r["seed"]): r["seconds"] for r in runs if "seconds" in r}
    lines = ["| task | a run / the same by cross-entropy (median) | a run by cross-entropy, s |", "|---|---|---|"]
    for name, task in accuracy.PRETRAINED.items():
        pairs = [
            (s, seconds.get((name, "iada", seed))) for (n, m, seed), s in seconds.items() if (n, m) == (name, "ce")
        ]
        ratios = [own / plain for plain, own in pairs if own]
        if ratios:
            plain = statistics.median(s for s, _ in pairs)
            lines.append(f"| {task.title} | {statistics.median(ratios):.2f} | {plain:.0f} |")
    return "\n".join(lines)


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
    kills = json.loads((RESULTS / "soak_kills.json").read_text())
    same = sum(row["bit_identical"] for row in kills["rows"])
    killed = (
        f"With trusted rows: {kills['kills']} kills at random moments of {len(kills['rows'])} short runs, of which {same} ended with"
        f" all {kills['tensors']} tensors (parameters and state) of an undisturbed run, bit for bit. {_made_by(kills['environment'])}"
    )
    return "\n".join([*lines, "", made, f"On the GPU {gpu['note']}.", "", killed])


def logits_cost() -> str:
    """benchmarks/logits_cost.py."""
    result = json.loads((RESULTS / "logits_cost_cpu.json").read_text())
    return f"{_benchmark('logits_cost').render(result)}\n\n{_made_by(result)}"


def approximations() -> str:
    """The group "cost" of benchmarks/study.py."""
    study = _benchmark("study")
    runs = [r for r in study.grid.read(RESULTS / "study_cpu.jsonl") if r["group"] == "cost"]
    text = []
    for task in study.GROUPS["cost"][1]:
        own = [r for r in runs if r["scenario"] == task]
        text += [f"{study.TASKS[task].title}:", "", *study.table(own, "cost", task), ""]
    return "\n".join(text).rstrip()


def wrong_labels() -> str:
    """benchmarks/suspects.py: the promise, rankings, and where it bends."""
    suspects = _benchmark("suspects")
    return suspects.summary(suspects.grid.read(RESULTS / "suspects_cpu.jsonl"))


Seeds = dict[int, float]


def _cells(methods: dict[str, Seeds]) -> dict[str, str]:
    """Mean and standard deviation over the seeds of each method. Bold: the best, where it leads the second by more than two standard
    errors of the difference, paired over at least three seeds."""
    mean = {m: statistics.mean(v.values()) for m, v in methods.items()}
    ranked = sorted(mean, key=lambda m: mean[m], reverse=True)
    cells = {}
    for m, v in methods.items():
        spread = f"±{statistics.stdev(v.values()):.1f}" if len(v) > 1 else " (one seed)"
        cells[m] = f"{mean[m]:.1f}{spread}"
    if len(ranked) > 1:
        first, second = (methods[m] for m in ranked[:2])
        gaps = [first[s] - second[s] for s in sorted(first.keys() & second.keys())]
        if len(gaps) >= 3 and statistics.mean(gaps) > 2 * statistics.stdev(gaps) / len(gaps) ** 0.5:
            cells[ranked[0]] = f"**{cells[ranked[0]]}**"
    return cells


def _line(cells: list[str]) -> str:
    """Without spaces at the bars, which README's count of words would take for words."""
    return f"|{'|'.join(cells)}|"


def results() -> str:
    """README's results, with trusted rows."""
    shown = ["ce", "la", "iada"]
    return _compared(
        "pretrained", _TRUSTED_TASKS, "trusted rows, trained along by all", shown, "told which labels are wrong"
    )


def _compared(preset: str, tasks: dict[str, tuple[str, str]], head: str, shown: list[str], oracle: str) -> str:
    """benchmarks/accuracy.py: a task a row; some methods, whichever other one is best on the test samples, and the oracle."""
    accuracy = _benchmark("accuracy")
    runs = [r for r in accuracy.grid.read(RESULTS / f"accuracy_{preset}.jsonl") if "error" not in r]
    titles = [head, *(accuracy.METHODS[m].title for m in shown), "best other method", oracle]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for task, (title, metric) in tasks.items():
        found: dict[str, Seeds] = {}
        for run in accuracy.grid.of_one_version([r for r in runs if r["scenario"] == task]):
            if run.get("metrics", {}).get(metric) is not None:
                found.setdefault(run["method"], {})[run["seed"]] = 100 * run["metrics"][metric]
        told = found.pop("oracle", None)
        # Other forms of ours are in the tables that README links.
        found = {m: seeds for m, seeds in found.items() if m in shown or not m.startswith("iada")}
        cells = _cells(found)
        best = max((m for m in found if m not in shown), key=lambda m: statistics.mean(found[m].values()), default=None)
        other = "" if best is None else f"{cells[best]} ({accuracy.METHODS[best].title})"
        told_cell = "" if told is None else _cells({"oracle": told})["oracle"]
        lines.append(_line([title, *(cells.get(m, "") for m in shown), other, told_cell]))
    return "\n".join(lines)


#: Tasks of README's table, and what they are measured by.
_TRUSTED_TASKS = {
    "flip": ("CIFAR-10, 40 % wrong: next class", "accuracy"),
    "flip2": ("two other classes", "accuracy"),
    "uniform": ("any class", "accuracy"),
    "cifar10n": ("CIFAR-10N", "accuracy"),
    "reuters_uniform": ("Reuters, 40 % any class, mean of classes", "macro_accuracy"),
    "comments_flip": ("HateXplain, 30 % turned over", "average"),
    "long_tail_flip": ("CIFAR10-LT, 20 % wrong", "accuracy"),
    "long_tail": ("CIFAR10-LT 100:1", "accuracy"),
    "reuters": ("Reuters, mean of classes", "macro_accuracy"),
    "comments": ("HateXplain, worst group", "worst_group"),
    "colored_mnist": ("Colored MNIST, worst group", "worst_group"),
    "balanced": ("CIFAR-10, clean", "accuracy"),
    "balanced_small": ("clean, network too small", "accuracy"),
    "resnet_flip2": ("ResNet-8 from scratch: two other classes", "accuracy"),
    "resnet_cifar10n": ("CIFAR-10N", "accuracy"),
    "resnet_long_tail": ("CIFAR10-LT 100:1", "accuracy"),
    "resnet_balanced": ("clean", "accuracy"),
}

BLOCKS = {
    ROOT / "README.md": [results],
    ROOT / "docs" / "settings.md": [settings],
    ROOT / "docs" / "cost_measured.md": [
        step_cost,
        step_cost_gpu,
        step_cost_widths,
        step_cost_classes,
        trusted_cost,
        whole_runs,
        logits_cost,
        report_cost,
        approximations,
    ],
    ROOT / "docs" / "long_runs.md": [soak],
    ROOT / "docs" / "wrong_labels.md": [wrong_labels],
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


def stale() -> list[str]:
    """Pages whose tables are not up to date."""
    return [page.name for page in BLOCKS if page.read_text() != filled(page)]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        if found := stale():
            raise SystemExit(f"not up to date: {', '.join(found)}. Run: python docs/tables.py")
    else:
        for page in BLOCKS:
            page.write_text(filled(page))
