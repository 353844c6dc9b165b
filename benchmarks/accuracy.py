"""Accuracy of every method on every scenario, over seeds; resumable.

    python benchmarks/accuracy.py --data DATA --preset pretrained --missing --processes 2   # trusted rows; lists and runs what is absent
    python benchmarks/accuracy.py --data DATA --preset cpu --scenario cifar10_lt --method ce iada --seeds 0 1 2
    python benchmarks/accuracy.py --preset pretrained --render                   # tables from what is there

DATA holds cifar10/ (Parquet files, and cifar10n.npz), mnist/ (IDX files), hatexplain/all_data_with_identities.csv and
reuters52/reuters52.parquet; what is missing is skipped by name. Each run appends one line to
benchmarks/results/accuracy_PRESET.jsonl; a run that is there already, of the same RESULTS_VERSION (compare/grid.py), is not repeated,
so that a killed grid goes on where it was. Settings were chosen on validation samples
(benchmarks/results/study.md); this script is where the test samples are used.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import baselines
import numpy as np
import torch
from compare import grid
from compare import scenarios as make
from compare.methods import Method, run_method, with_overrides
from compare.scenarios import Scenario, Settings
from scipy.stats import ttest_rel

from iada_plugin import metrics
from iada_plugin.data.civilcomments import GROUPS

METHODS: dict[str, Method] = baselines.METHODS


@dataclass
class Task:
    """One row of the grid.

    Attributes:
        title: for the table.
        file: what it needs, below DATA.
        build: makes the scenario from that file and a seed.
        methods: names in ``METHODS``.
        settings: overrides, the same for every method.
    """

    title: str
    file: str
    build: Callable[[str, int], Scenario]
    methods: list[str]
    settings: dict[str, Any] = field(default_factory=dict)


_LONG_TAIL = ["ce", "focal", "cb_ce", "cb_focal", "ldam_drw", "la", "isda", "isda_prior", "metasaug", "mwn", "ce_meta",
              "last_layer", "la_meta", "iada_paper", "iada_online", "iada"]  # fmt: skip
_NOISE = ["ce", "gce", "mwn", "ce_meta", "last_layer", "iada_paper", "iada_online", "iada"]
_GROUPS = ["ce", "la", "group_dro", "mwn", "ce_meta", "last_layer", "iada_paper", "iada_online", "iada"]

#: Two CPU cores: CIFAR-10 at 16 x 16 pixels, ResNet-8, 5,000 training images.
CPU: dict[str, Task] = {
    "cifar10_lt": Task(
        "CIFAR10-LT 100:1 (largest class 2,000), 16 x 16, ResNet-8, 36 epochs", "cifar10",
        lambda data, seed: make.long_tail(data, n_max=2000, val_per_class=500, image_size=16, seed=seed), _LONG_TAIL,
        {"model": "resnet8", "epochs": 36, "milestones": (28 / 36, 32 / 36), "gamma": 0.1, "warmup_ratio": 28 / 36},
    ),
    "cifar10_flip2_40": Task(
        "CIFAR-10, flip2 noise 40 %, 5,000 images, 16 x 16, ResNet-8, no crops, 32 epochs", "cifar10",
        lambda data, seed: make.label_noise(data, kind="flip2", rate=0.4, samples_per_class=500, val_per_class=300,
                                            image_size=16, augment=False, seed=seed), _NOISE,
        {"model": "resnet8", "epochs": 32, "milestones": (22 / 32, 28 / 32)},
    ),
    "cifar10n_worst": Task(
        "CIFAR-10N worst labels (40 % human noise), 5,000 images, 16 x 16, ResNet-8, no crops, 32 epochs", "cifar10",
        lambda data, seed: make.label_noise(data, kind="worse_label", samples_per_class=500, val_per_class=300,
                                            image_size=16, augment=False, seed=seed), _NOISE,
        {"model": "resnet8", "epochs": 32, "milestones": (22 / 32, 28 / 32)},
    ),
    "cifar10_balanced": Task(
        "Balanced clean CIFAR-10 (no harm), 5,000 images, 16 x 16, ResNet-8, 32 epochs", "cifar10",
        lambda data, seed: make.label_noise(data, kind="none", samples_per_class=500, val_per_class=300,
                                            meta_per_class=10, image_size=16, seed=seed),
        ["ce", "iada_paper", "iada_online", "iada"],
        {"model": "resnet8", "epochs": 32, "milestones": (22 / 32, 28 / 32)},
    ),
    "cifar10_glt": Task(
        "CIFAR-10 generalized long tail (classes 20:1, six pixel clusters a class), 16 x 16, ResNet-8, 36 epochs", "cifar10",
        lambda data, seed: make.generalized_long_tail(data, imbalance_ratio=20, n_max=1200, image_size=16, seed=seed),
        ["ce", "la", "metasaug", "la_meta", "iada_paper", "iada_online", "iada"],
        {"model": "resnet8", "epochs": 36, "milestones": (28 / 36, 32 / 36), "gamma": 0.1, "warmup_ratio": 28 / 36},
    ),
    "colored_mnist": Task(
        "Colored MNIST, 6,000 training images, small convolutional network, 20 epochs", "mnist",
        lambda data, seed: make.colored_mnist(data, rows=12000, seed=seed), [m for m in _GROUPS if m != "la"] + ["lisa"],
        {"epochs": 20},
    ),
    "hatexplain": Task(
        "HateXplain in CivilComments' layout, two-layer DistilBERT from scratch, 3 epochs", "hatexplain/all_data_with_identities.csv",
        lambda data, seed: make.comments(data, seed=seed), ["ce", "la", "group_dro", "last_layer", "iada_online", "iada"], {"epochs": 3},
    ),
    "reuters52": Task(
        "Reuters R52 (natural long tail), averaging network, 15 epochs", "reuters52/reuters52.parquet",
        lambda data, seed: make.long_tail(data, seed=seed, meta_per_class=5),
        ["ce", "cb_ce", "la", "isda_prior", "metasaug", "mwn", "ce_meta", "la_meta", "iada_paper", "iada_online", "iada"],
        {"epochs": 15},
    ),
}  # fmt: skip

#: One GPU: the published sizes.
GPU: dict[str, Task] = {
    "cifar10_lt": Task("CIFAR10-LT 100:1, ResNet-32, 200 epochs", "cifar10",
                       lambda data, seed: make.long_tail(data, seed=seed), ["ce", "la", "metasaug", "iada_paper", "iada"]),
    "cifar10_flip2_40": Task("CIFAR-10, flip2 noise 40 %, ResNet-32, 60 epochs", "cifar10",
                             lambda data, seed: make.label_noise(data, rate=0.4, seed=seed), ["ce", "mwn", "iada_paper", "iada"]),
    "cifar10n_worst": Task("CIFAR-10N worst labels, ResNet-32, 60 epochs", "cifar10",
                           lambda data, seed: make.label_noise(data, kind="worse_label", seed=seed), ["ce", "mwn", "iada"]),
    "cifar10_lt_10": Task("CIFAR10-LT 10:1, ResNet-32, 200 epochs", "cifar10",
                          lambda data, seed: make.long_tail(data, imbalance_ratio=10, seed=seed), ["ce", "la", "metasaug", "iada"]),
    "cifar10_flip2_20": Task("CIFAR-10, flip2 noise 20 %, ResNet-32, 60 epochs", "cifar10",
                             lambda data, seed: make.label_noise(data, rate=0.2, seed=seed), ["ce", "mwn", "iada"]),
    "cifar10_balanced": Task("Balanced clean CIFAR-10, ResNet-32, 60 epochs", "cifar10",
                             lambda data, seed: make.label_noise(data, kind="none", meta_per_class=10, seed=seed), ["ce", "iada"]),
    "colored_mnist": Task("Colored MNIST, small convolutional network", "mnist",
                          lambda data, seed: make.colored_mnist(data, seed=seed), [*_GROUPS, "lisa"]),
    "hatexplain": Task("HateXplain, two-layer DistilBERT from scratch", "hatexplain/all_data_with_identities.csv",
                       lambda data, seed: make.comments(data, seed=seed), _GROUPS),
}  # fmt: skip

_TRUSTED = ["ce", "la", "last_layer", "la_last_layer", "gce", "gce_prior", "glc", "aum10", "aum20", "mwn", "mwn_prior"]
_TRUSTED_IADA = ["iada_paper", "iada_early", "iada_gate", "iada"]
_TRUSTED_NOISE = [*_TRUSTED, *_TRUSTED_IADA, "oracle"]
_FEW_IMAGES = {"n_max": 300, "trusted_per_class": 30, "val_per_class": 200}
#: At minutes a run.
_FINE_TUNED = ["ce", "last_layer", "gce", "glc", "aum20", "iada", "oracle"]
_TRUSTED_TAIL = [*_TRUSTED, "isda_prior", "metasaug", *_TRUSTED_IADA]
_IMAGES = "CIFAR-10 under EfficientNet-Lite0"
_COMMENTS, _REUTERS = "hatexplain/all_data_with_identities.csv", "reuters52/reuters52.parquet"


#: Trusted rows, trained along by every method: on frozen features of pretrained networks, and on small networks from scratch.
PRETRAINED: dict[str, Task] = {
    "flip": Task(f"{_IMAGES}, 40 % wrong: the next class", "cifar10",
                 lambda data, seed: make.cifar_features(data, noise="flip", seed=seed), _TRUSTED_NOISE),
    "flip2": Task(f"{_IMAGES}, 40 % wrong: two other classes", "cifar10",
                  lambda data, seed: make.cifar_features(data, noise="flip2", seed=seed), _TRUSTED_NOISE),
    "uniform": Task(f"{_IMAGES}, 40 % drawn anew", "cifar10",
                    lambda data, seed: make.cifar_features(data, noise="uniform", seed=seed), _TRUSTED_NOISE),
    "cifar10n": Task(f"{_IMAGES}, CIFAR-10N's worst labels", "cifar10",
                     lambda data, seed: make.cifar_features(data, noise="worse_label", seed=seed), _TRUSTED_NOISE),
    "balanced": Task(f"{_IMAGES}, balanced and clean", "cifar10",
                     lambda data, seed: make.cifar_features(data, trusted_per_class=10, seed=seed), [*_TRUSTED, *_TRUSTED_IADA]),
    "balanced_small": Task(f"{_IMAGES}, balanced and clean, 8 hidden units", "cifar10",
                           lambda data, seed: make.cifar_features(data, trusted_per_class=10, small=True, seed=seed),
                           [*_TRUSTED, *_TRUSTED_IADA]),
    "long_tail": Task(f"{_IMAGES}, long tail 100:1", "cifar10",
                      lambda data, seed: make.cifar_features(data, imbalance_ratio=100, n_max=2000, trusted_per_class=10, epochs=40, seed=seed),
                      _TRUSTED_TAIL, {"milestones": (0.75, 0.9), "warmup_ratio": 0.75}),
    "long_tail_flip": Task(f"{_IMAGES}, long tail 100:1, 20 % wrong: the next class", "cifar10",
                           lambda data, seed: make.cifar_features(data, noise="flip", rate=0.2, imbalance_ratio=100, n_max=2000,
                                                                  trusted_per_class=10, epochs=40, seed=seed),
                           [*_TRUSTED_TAIL, "oracle"], {"milestones": (0.75, 0.9), "warmup_ratio": 0.75}),
    "reuters": Task("Reuters R52 under MiniLM", _REUTERS, lambda data, seed: make.reuters_features(data, seed=seed), _TRUSTED_TAIL),
    "reuters_uniform": Task("Reuters R52 under MiniLM, 40 % drawn anew", _REUTERS,
                            lambda data, seed: make.reuters_features(data, uniform=0.4, seed=seed), [*_TRUSTED_TAIL, "oracle"]),
    "comments": Task("HateXplain under MiniLM", _COMMENTS, lambda data, seed: make.comment_features(data, seed=seed),
                     [*_TRUSTED, "group_dro", *_TRUSTED_IADA]),
    "comments_flip": Task("HateXplain under MiniLM, 30 % turned over", _COMMENTS,
                          lambda data, seed: make.comment_features(data, flipped=0.3, seed=seed),
                          [*_TRUSTED, "group_dro", *_TRUSTED_IADA, "oracle"]),
    "colored_mnist": Task("Colored MNIST, 6,000 training images, small convolutional network", "mnist",
                          lambda data, seed: make.train_along(make.colored_mnist(data, rows=12000, seed=seed)),
                          [m for m in _TRUSTED if m not in ("gce_prior", "mwn_prior")] + ["group_dro", *_TRUSTED_IADA], {"epochs": 20}),
    "minilm": Task("HateXplain, MiniLM fine-tuned, 1,500 comments", _COMMENTS,
                   lambda data, seed: make.comments_finetuned(data, seed=seed), _FINE_TUNED[:-1]),
    "minilm_flip": Task("HateXplain, MiniLM fine-tuned, 1,500 comments, 30 % turned over", _COMMENTS,
                        lambda data, seed: make.comments_finetuned(data, flipped=0.3, seed=seed), _FINE_TUNED),
    "efficientnet": Task("CIFAR-10, EfficientNet-Lite0 fine-tuned, 3,000 images", "cifar10",
                         lambda data, seed: make.cifar_finetuned(data, **_FEW_IMAGES, seed=seed), _FINE_TUNED[:-1]),
    "efficientnet_flip": Task("CIFAR-10, EfficientNet-Lite0 fine-tuned, 3,000 images, 40 % wrong: the next class", "cifar10",
                              lambda data, seed: make.cifar_finetuned(data, noise="flip", **_FEW_IMAGES, seed=seed), _FINE_TUNED),
    "resnet_flip2": Task("CIFAR-10 at 16 x 16, ResNet-8, 40 % wrong: two other classes", "cifar10",
                         lambda data, seed: make.train_along(CPU["cifar10_flip2_40"].build(data, seed)), _TRUSTED_NOISE,
                         CPU["cifar10_flip2_40"].settings),
    "resnet_cifar10n": Task("CIFAR-10 at 16 x 16, ResNet-8, CIFAR-10N's worst labels", "cifar10",
                            lambda data, seed: make.train_along(CPU["cifar10n_worst"].build(data, seed)), _TRUSTED_NOISE,
                            CPU["cifar10n_worst"].settings),
    "resnet_long_tail": Task("CIFAR10-LT 100:1 at 16 x 16, ResNet-8", "cifar10",
                             lambda data, seed: make.train_along(CPU["cifar10_lt"].build(data, seed)), _TRUSTED_TAIL,
                             CPU["cifar10_lt"].settings),
    "resnet_balanced": Task("CIFAR-10 at 16 x 16, ResNet-8, balanced and clean", "cifar10",
                            lambda data, seed: make.train_along(CPU["cifar10_balanced"].build(data, seed)),
                            [*_TRUSTED, *_TRUSTED_IADA], CPU["cifar10_balanced"].settings),
}  # fmt: skip
PRESETS = {"cpu": CPU, "gpu": GPU, "pretrained": PRETRAINED}


#: What is kept of each fifth epoch.
_CURVE = ("epoch", "loss", "train_accuracy", "validation", "iada/let_go")


def run_one(wanted: dict[str, Any], preset: str, data: str, device: str) -> dict[str, Any]:
    """One method on one scenario with one seed."""
    task, seed = PRESETS[preset][wanted["scenario"]], wanted["seed"]
    scenario = task.build(str(Path(data) / task.file), seed)
    settings = with_overrides(scenario.settings, **task.settings)
    found = run_method(scenario, METHODS[wanted["method"]], settings=settings, seed=seed, device=device)
    predictions = found.pop("predictions")
    curve = found["curve"]
    found["curve"] = [
        {k: v for k, v in epoch.items() if k in _CURVE}
        for epoch in curve
        if epoch["epoch"] % 5 == 0 or epoch is curve[-1]
    ]
    if scenario.test.groups is not None and scenario.test.groups.dim() == 2:
        correct = (predictions == scenario.test.y).numpy()
        found["worst_group_interval_95"] = metrics.worst_group_interval(
            correct, scenario.test.groups.numpy(), scenario.score.min_size
        )
    return {
        "title": task.title, "settings": asdict(settings),
        "rows": {"train": len(scenario.train), "meta": len(scenario.meta), "test": len(scenario.test)}, **found,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- tables

_COLUMNS = {
    "worst_group": "worst group", "average": "average", "weighted_average": "train-weighted average",
    "macro_accuracy": "macro accuracy", "accuracy": "accuracy", "many": "many", "medium": "medium", "few": "few",
    "macro_precision": "macro precision", "noise_auroc": "AUROC of wrong labels",
}  # fmt: skip


def table(runs: list[dict], task: Task) -> list[str]:
    """One scenario: mean and standard deviation over seeds; Meta-IADA's paired differences to each method."""
    by_method = {m: sorted((r for r in runs if r["method"] == m), key=lambda r: r["seed"]) for m in METHODS}
    by_method = {m: own for m, own in by_method.items() if own}
    columns = [c for c in _COLUMNS if any(_value(r, c) is not None for r in runs)]
    if "average" not in columns and "macro_accuracy" in columns and "accuracy" in columns:
        first = "macro_accuracy" if "reuters" in task.file else "accuracy"
        columns = [first, *(c for c in columns if c != first)]
        if first == "accuracy":  # balanced test set: the same figure
            columns.remove("macro_accuracy")
    main = columns[0]
    lines = [
        "| method | seeds | "
        + " | ".join(_COLUMNS[c] for c in columns)
        + f" | Meta-IADA less this ({_COLUMNS[main]}) | seconds |",
        "|---" * (len(columns) + 4) + "|",
    ]
    reference = {r["seed"]: _value(r, main) for r in by_method.get("iada", [])}
    for method, own in by_method.items():
        cells = []
        for c in columns:
            if any(_value(r, c) is None for r in own):
                cells.append("")
                continue
            text = mean_and_spread([_value(r, c) for r in own])
            cells.append(f"**{text}**" if _best(c, method, by_method) else text)
        pairs = [(reference[r["seed"]], _value(r, main)) for r in own if r["seed"] in reference]
        cells.append("" if method == "iada" or not pairs else _difference(np.array(pairs)))
        seconds = np.median([r["seconds"] for r in own])
        lines.append(f"| {METHODS[method].title} | {len(own)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return lines


def _best(column: str, method: str, by_method: dict[str, list[dict]]) -> bool:
    """Whether a method is above each other one (but the oracle) at p < 0.05, paired over the seeds that both have."""
    own = {r["seed"]: _value(r, column) for r in by_method[method]}
    for name, runs in by_method.items():
        pairs = np.array([(own[r["seed"]], _value(r, column)) for r in runs if r["seed"] in own], dtype=float)
        if name in (method, "oracle"):
            continue
        if len(pairs) < 3 or not pairs[:, 0].mean() > pairs[:, 1].mean() or not _p_value(pairs) < 0.05:
            return False
    return True


def mean_and_spread(values: list[float]) -> str:
    """Shares as percentages over seeds."""
    percent = 100 * np.array(values)
    return f"{percent.mean():.1f}" + (f" ± {percent.std(ddof=1):.1f}" if len(percent) > 1 else "")


def intervals(runs: list[dict]) -> list[str]:
    """The worst group of each run with overlapping groups: its name, size and 95 % bootstrap interval."""
    runs = [r for r in runs if "worst_group_interval_95" in r]
    if not runs:
        return []
    lines = [
        "",
        "| method | seed | worst group | rows | accuracy | 95 % bootstrap interval |",
        "|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda r: (list(METHODS).index(r["method"]), r["seed"])):
        m, (low, high) = run["metrics"], run["worst_group_interval_95"]
        lines.append(f"| {METHODS[run['method']].title} | {run['seed']} | {GROUPS[m['worst_group_index']]} |"
                     f" {m['worst_group_size']} | {100 * m['worst_group']:.1f} | {100 * low:.1f} to {100 * high:.1f} |")  # fmt: skip
    return lines


def _value(run: dict, column: str) -> float | None:
    value = run.get(column) if column == "noise_auroc" else run["metrics"].get(column)
    return None if value is None or value != value else value


def _difference(pairs: np.ndarray) -> str:
    difference = 100 * (pairs[:, 0] - pairs[:, 1])
    text = f"{difference.mean():+.1f} ({', '.join(f'{d:+.1f}' for d in difference)}"
    if len(difference) > 2 and difference.std() > 0:
        text += f"; p = {_p_value(pairs):.2g}"
    return text + ")"


def _p_value(pairs: np.ndarray) -> float:
    """Of a paired t-test, two-sided."""
    return float(ttest_rel(pairs[:, 0], pairs[:, 1]).pvalue)


_DATA = {
    False: "Methods with a meta step and those named after it use the meta set, the others do not.",
    True: "Every method trains on the trusted rows along with the rest; those with a meta step, a last layer on them, gold loss correction"
          " and area under the margin use them again. The last layer's penalty was chosen on validation samples for each run; of"
          " Meta-IADA nothing was set from task to task. Features are frozen, but for the small networks from scratch.",
}  # fmt: skip


def render(preset: str, folder: Path) -> str:
    runs = grid.read(folder / f"accuracy_{preset}.jsonl")
    tasks = PRESETS[preset]
    text = [f"# Accuracy, preset {preset}", "",
            "Test figures in %, mean and standard deviation over seeds; in bold what is above every other method at p < 0.05 (paired t-test)."
            " Every method of a table has the same weights at the start, the same epochs and the same optimizer. "
            f"{_DATA[preset == 'pretrained']} GroupDRO and LISA are told the groups"
            " of the training samples, the others are not. The last but one column gives Meta-IADA's difference on each seed"
            " and the p-value of a paired t-test (three seeds: read it with care). What the methods are:"
            " [docs/baselines.md](../../docs/baselines.md). Made by"
            f" `python benchmarks/accuracy.py --data DATA --preset {preset}`; every run is in"
            f" [accuracy_{preset}.jsonl](accuracy_{preset}.jsonl)."]  # fmt: skip
    for name, task in tasks.items():
        failed = [f"{METHODS[r['method']].title}, seed {r['seed']}: {r['error']}" for r in runs if r["scenario"] == name and "error" in r]  # fmt: skip
        every = [r for r in runs if r["scenario"] == name and "error" not in r]
        own = grid.of_one_version(every)
        if not own:
            continue
        older = f" {len(every) - len(own)} runs of earlier code are left out." if len(every) > len(own) else ""
        # A setting that has gone since a run was made (the loading of files) made no difference here.
        settings = [{f.name: r["settings"].get(f.name) for f in fields(Settings)} for r in own]
        if any(s != settings[0] for s in settings):
            raise SystemExit(f"error: the runs of {name} have different settings: repeat the older ones with --again.")
        rows = own[0]["rows"]
        text += ["", f"## {task.title}", "", *table(own, task), *intervals(own), "",
                 f"{rows['train']} training, {rows['meta']} meta and {rows['test']} test samples; {own[0]['machine']};"
                 f" torch {own[0]['versions']['torch']}, results version {grid.results_version(own[0])},"
                 f" commits {', '.join(sorted({str(r.get('commit', 'not recorded')) for r in own}))}.{older} Settings: `{_short(own[0]['settings'])}`.",
                 *([""] if failed else []), *(f"Failed: {line}." for line in failed)]  # fmt: skip
    return "\n".join(text) + "\n"


def _short(settings: dict) -> str:
    shown = {k: v for k, v in settings.items() if k != "config" and v is not None}
    return ", ".join(f"{k}={[round(x, 3) for x in v] if isinstance(v, list) else v}" for k, v in shown.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--scenario", nargs="+", help="default: all")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), help="default: those of the scenario")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    grid.add_arguments(parser)
    args = parser.parse_args()
    if not args.render:
        if not args.data:
            parser.error("--data is needed: the folder that holds cifar10/, mnist/, ...")
        tasks = PRESETS[args.preset]
        unknown = set(args.scenario or []) - set(tasks)
        if unknown:
            parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(tasks)}")
        wanted = []
        for name in args.scenario or tasks:
            if not (Path(args.data) / tasks[name].file).exists():
                print(f"skipped {name}: no {tasks[name].file} in {args.data}")
                continue
            wanted += [{"scenario": name, "method": method, "seed": seed}
                       for seed in args.seeds for method in args.method or tasks[name].methods]  # fmt: skip
        run = functools.partial(run_one, preset=args.preset, data=args.data, device=args.device)
        grid.run_absent(wanted, run, args.results / f"accuracy_{args.preset}.jsonl", args, args.device)
    text = render(args.preset, args.results)
    (args.results / f"accuracy_{args.preset}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
