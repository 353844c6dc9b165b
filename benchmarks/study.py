"""The study behind the defaults: validation samples only, but for what cheaper meta steps lose, which is scored on test samples;
resumable.

    python benchmarks/study.py --data DATA                              # everything
    python benchmarks/study.py --data DATA --group gate --seeds 0 1 2   # one group
    python benchmarks/study.py --render                                 # tables and plots from what is there

Uses the scenarios of benchmarks/accuracy.py and some of its own. Appends to benchmarks/results/study_cpu.jsonl, and writes study.md,
steps.png, trusted_rows.png and sensitivity.png beside it. Several processes may share the work (--part 1/2, --part 2/2).
"""

from __future__ import annotations

import argparse
import functools
import itertools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
from compare import grid
from compare import scenarios as make
from compare.methods import PAPER, PAPER_STEP, iada_method, run_method, with_overrides


@dataclass
class Variant:
    """A form of the method: what differs from the defaults, and why one would try it."""

    what: str
    config: dict[str, Any] = field(default_factory=dict)
    method: str = "iada"
    settings: dict[str, Any] = field(default_factory=dict)


_FIXED = {"prior_in_warmup": False, "perturbation_size": 1.0}

FORM = {
    "ce": Variant("cross-entropy", method="ce"),
    "la": Variant("Logit Adjustment", method="la"),
    "isda_prior": Variant("ISDA + prior, no meta step", method="isda_prior"),
    "mwn": Variant("Meta-Weight-Net", method="mwn"),
    "group_dro": Variant("GroupDRO", method="group_dro"),
    "lisa": Variant("LISA", method="lisa"),
    "last_layer": Variant("CE, last layer on meta", method="last_layer"),
    "default": Variant("5 nats of margin, no training through delta, prior in the warm-up"),
    "paper": Variant("one unit in every feature, training through delta, CE warm-up", PAPER),
    "CE warm-up": Variant("default, but plain CE in the warm-up", {"prior_in_warmup": False}),
    "size 1": Variant("1 nat", {"perturbation_size": 1.0}),
    "size 3": Variant("3 nats", {"perturbation_size": 3.0}),
    "(-8, 1)": Variant("epsilon from -8 to 1 nat", {"perturbation_size": 1.0, "epsilon_range": (-8.0, 1.0)}),
    "size 1, CE": Variant("1 nat, CE warm-up", _FIXED),
    "size 3, CE": Variant("3 nats, CE warm-up", {**_FIXED, "perturbation_size": 3.0}),
    "size 8, CE": Variant("8 nats, CE warm-up", {**_FIXED, "perturbation_size": 8.0}),
    "(-8, 1), CE": Variant("epsilon from -8 to 1 nat, CE warm-up", {**_FIXED, "epsilon_range": (-8.0, 1.0)}),
    "(-8, 3), CE": Variant("epsilon from -8 to 3 nats, CE warm-up", {**_FIXED, "epsilon_range": (-8.0, 3.0)}),
    "meta_lr 3e-4, CE": Variant("default, CE warm-up, slower network", {"prior_in_warmup": False, "meta_lr": 3e-4}),
    "size 1, through": Variant("1 nat, training through delta, CE warm-up", {**_FIXED, "fixed_shift": False}),
    "size 3, through": Variant("3 nats, training through delta, CE warm-up",
                               {**_FIXED, "perturbation_size": 3.0, "fixed_shift": False}),
    "(-8, 1), through": Variant("-8 to 1 nat, training through delta, CE warm-up",
                                {**_FIXED, "epsilon_range": (-8.0, 1.0), "fixed_shift": False}),
    "(-8, 3), through": Variant("-8 to 3 nats, training through delta, CE warm-up",
                                {**_FIXED, "epsilon_range": (-8.0, 3.0), "fixed_shift": False}),
}  # fmt: skip
#: Meta steps from epoch 16 of 36 on, at the full learning rate: where a drift shows.
EARLY = {
    name: Variant(FORM[name].what, FORM[name].config, FORM[name].method, {"warmup_ratio": 16 / 36})
    for name in ("la", "(-8, 1)", "size 1, CE", "(-8, 1), CE", "size 1, through", "(-8, 1), through")
}
EARLY["isda_prior, CE"] = Variant(
    "ISDA + prior after CE", {"prior_in_warmup": False}, "isda_prior", {"warmup_ratio": 16 / 36}
)
_OFF = {"meta_lr": 0.0}
ABLATION = {
    "none (CE)": Variant("", method="ce"),
    "prior": Variant("", {**_OFF, "alpha": 0.0, "covariance_lr": 0.0}),
    "variance": Variant("", {**_OFF, "beta": 0.0, "covariance_lr": 0.0}),
    "perturbation": Variant("", {"alpha": 0.0, "beta": 0.0}),
    "prior + variance": Variant("", {**_OFF, "covariance_lr": 0.0}),
    "prior + variance, Sigma learned": Variant("", _OFF),
    "prior + perturbation": Variant("", {"alpha": 0.0}),
    "variance + perturbation": Variant("", {"beta": 0.0}),
    "all three": Variant(""),
}
ALPHA = {f"alpha = {a}": Variant("", {"alpha": a}) for a in (0.1, 0.25, 0.5, 0.75, 1.0)}
BETA = {f"beta = {b}": Variant("", {"beta": b}) for b in (0.5, 0.75, 1.0, 1.25, 1.5)}
_AVERAGED = {"schedule": "lookahead", "meta_every": 1}
_ONLINE = {"schedule": "online", "meta_every": 1}
_SMALL = {"meta_batch_size": 25}  # a quarter of the training batch
#: What cheaper meta steps lose.
COST = {
    "cross-entropy": Variant("", method="ce"),
    "lookahead": Variant("the paper's step in every step, M = N", PAPER_STEP),
    "lookahead M=N/4": Variant("", PAPER_STEP, settings=_SMALL),
    "lookahead M=N/4 K=5": Variant("five updates from one step", {**PAPER_STEP, "meta_every": 5}, settings=_SMALL),
    "lookahead, averaged": Variant("M = N, average of the meta gradient", _AVERAGED),
    "lookahead M=N/4 K=5, averaged": Variant("five updates, average", {**_AVERAGED, "meta_every": 5}, settings=_SMALL),
    "online": Variant("M = N", {**_ONLINE, "meta_momentum": 0.0}, settings={"meta_batch_size": 100}),
    "online M=N/4, averaged": Variant("", _ONLINE, settings=_SMALL),
    "online M=N/4 K=5": Variant("five updates", {**_ONLINE, "meta_every": 5, "meta_momentum": 0.0}, settings=_SMALL),
    "online M=N/4 K=5, averaged": Variant("five updates, average", {**_ONLINE, "meta_every": 5}, settings=_SMALL),
    "head": Variant("M = N", {**PAPER_STEP, "hypergradient": "head"}),
    "head M=N/4, averaged": Variant("", {**_AVERAGED, "hypergradient": "head"}, settings=_SMALL),
}
TASKS: dict[str, accuracy.Task] = {
    **accuracy.CPU,
    "cifar10_flip1_40": accuracy.Task(
        "CIFAR-10, pair-flip (flip1) noise 40 %, 5,000 images, 16 x 16, ResNet-8, no crops, 32 epochs",
        "cifar10",
        lambda data, seed: make.label_noise(
            data,
            kind="flip1",
            rate=0.4,
            samples_per_class=500,
            val_per_class=300,
            image_size=16,
            augment=False,
            seed=seed,
        ),
        [],
        {"model": "resnet8", "epochs": 32, "milestones": (22 / 32, 28 / 32)},
    ),
    "mnist_lt": accuracy.Task(
        "MNIST, long tail 100:1 (largest class 1,000), small convolutional network, 30 epochs",
        "mnist",
        lambda data, seed: make.long_tail(data, n_max=1000, val_per_class=300, seed=seed),
        [],
        {"model": "smallconv", "epochs": 30, "milestones": (0.6, 0.8), "gamma": 0.1, "warmup_ratio": 0.5, "lr": 0.05},
    ),
}

#: Trusted rows: what is let go.
_GATE_ONLY = {"alpha": 0.0, "meta_lr": 0.0, "covariance_lr": 0.0}
GATE = {
    "nothing let go (LA)": Variant("Logit Adjustment", method="la"),
    "default": Variant("local false discovery rate, and the p-value below 0.2", _GATE_ONLY),
    "level 0.1": Variant("and the p-value below 0.1", {**_GATE_ONLY, "gate_level": 0.1}),
    "level 0.4": Variant("and the p-value below 0.4", {**_GATE_ONLY, "gate_level": 0.4}),
    "hard, 0.1": Variant("the p-value below 0.1 and nothing else", {**_GATE_ONLY, "gate": "hard", "gate_level": 0.1}),
    "hard, 0.2": Variant("the p-value below 0.2 and nothing else", {**_GATE_ONLY, "gate": "hard", "gate_level": 0.2}),
    "told": Variant("which labels are wrong", method="oracle"),
}
#: Trusted rows: the perturbations.
OMEGA = {
    "gate only": Variant("no perturbations", _GATE_ONLY),
    "default": Variant("once the learning rate has fallen and the rows that are kept are fitted"),
    "fitted or not": Variant("from three quarters of the run", {"warmup_ratio": 0.75}),
    "from half of the run": Variant("fitted or not", {"warmup_ratio": 0.5}),
    "loss": Variant("the published meta gradient, not per unit of pull", {"objective": "loss"}),
    "alpha 0": Variant("without the variance term", {"alpha": 0.0}),
    "nothing learned": Variant("the variance term alone", {"meta_lr": 0.0, "covariance_lr": 0.0}),
    "5 nats": Variant("size in nats of the margin, not trained through", {"perturbation_scale": "margin"}),
    "5 nats, from half": Variant(
        "the same from half of the run", {"perturbation_scale": "margin", "warmup_ratio": 0.5, "alpha": 0.0}
    ),
    "lookahead": Variant("the published step in each step", {"schedule": "lookahead", "meta_every": 1}),
    "head": Variant("hypergradient of the head alone", {"hypergradient": "head"}),
}
_PUBLISHED = {k: v for k, v in PAPER.items() if k != "epsilon_range"}
#: And the method with trusted rows as a meta set, beside the training set in which they are trained as well.
_METHODS = {**accuracy.METHODS, "meta_set": iada_method("Meta-IADA, trusted rows as a meta set", False)}
#: From the published form to the default, each step on top of the one before; then the default less one thing at a time.
STEPS = {
    "Logit Adjustment": Variant("no meta step, nothing let go", method="la"),
    "published": Variant("trusted rows as a meta set", _PUBLISHED, "meta_set"),
    "+ prior in the warm-up": Variant("", {**_PUBLISHED, "prior_in_warmup": True}, "meta_set"),
    "+ per unit of pull": Variant("", {**_PUBLISHED, "prior_in_warmup": True, "objective": "pull"}, "meta_set"),
    "+ begun once fitted, at a low rate": Variant("", {**PAPER_STEP, "gate": "none"}),
    "+ wrong labels let go": Variant("", {**PAPER_STEP, "gate": "local_fdr"}),
    "+ rows weighed": Variant("", PAPER_STEP),
    "default (+ cheap meta step)": Variant(""),
    "default, nothing let go": Variant("", {"gate": "none"}),
    "default, no perturbations": Variant("", _GATE_ONLY),
    "default, gradient of the loss": Variant("", {"objective": "loss"}),
    "default, no variance term": Variant("", {"alpha": 0.0}),
    "default, no prior": Variant("", {"beta": 0.0}),
    "default, from half of the run": Variant("", {"warmup_ratio": 0.5}),
    "told which labels are wrong": Variant("", method="oracle"),
}
_FOUR = ["flip", "long_tail", "comments", "colored_mnist"]
_NINE = [
    "flip",
    "cifar10n",
    "long_tail",
    "long_tail_flip",
    "balanced",
    "balanced_small",
    "reuters_uniform",
    "comments",
    "comments_flip",
]


def _features(title: str, **options: Any) -> accuracy.Task:
    return accuracy.Task(
        f"CIFAR-10 under EfficientNet-Lite0, {title}", "cifar10",
        lambda data, seed: make.cifar_features(data, **{"seed": seed, **options}), [],
    )  # fmt: skip


#: Curves: how many trusted rows, how many of them wrong, how much noise.
CURVES = {
    "trusted": {f"{10 * n} trusted": (10 * n, {"noise": "flip", "trusted_per_class": n}) for n in (1, 2, 5, 10, 20, 50, 100)},
    "wrong": {f"{w} % of the trusted wrong": (w, {"noise": "flip", "trusted_wrong": w / 100}) for w in (0, 5, 10, 20)},
    "noise": {f"{w} % wrong": (w, {"noise": "flip2", "rate": w / 100}) for w in (0, 10, 20, 30, 40, 50, 60)},
    "classes": {f"trusted rows of {c} classes": (c, {"noise": "flip", "trusted_classes": c}) for c in (2, 5, 8, 10)},
}  # fmt: skip
TASKS |= accuracy.PRETRAINED
TASKS |= {
    f"{group}: {name}": _features(name, **options)
    for group, tasks in CURVES.items()
    for name, (_, options) in tasks.items()
}
RIVALS = {
    "Logit Adjustment": Variant("", method="la"),
    "last layer on trusted rows": Variant("after Logit Adjustment", method="la_last_layer"),
    "area under the margin, 20 %": Variant("", method="aum20"),
    "gate only": Variant("", _GATE_ONLY),
    "default": Variant(""),
    "told": Variant("which labels are wrong", method="oracle"),
}
TITLES = {
    "steps": "From the published form to the default",
    "gate": "Trusted rows: what is let go", "omega": "Trusted rows: perturbations", "trusted": "Number of trusted rows",
    "wrong": "Wrong labels among the trusted rows", "noise": "Share of wrong labels", "classes": "Classes without trusted rows",
    "cost": "Cheaper meta steps (test samples)", "form": "Form", "early": "Meta steps from epoch 16 on", "ablation": "Terms of the loss", "alpha": "Weight of the variance term",
    "beta": "Weight of the prior term",
}  # fmt: skip
_WITH_WRONG_LABELS = [
    t
    for t in TASKS
    if t not in ("balanced", "balanced_small", "long_tail", "comments", "colored_mnist", "noise: 0 % wrong")
]


def _rivals(group: str) -> dict[str, Variant]:
    """A last layer on trusted rows would not know a class without any."""
    return {name: v for name, v in RIVALS.items() if group != "classes" or v.method != "la_last_layer"}


TRUSTED_GROUPS = ("steps", "gate", "omega", *CURVES)
GROUPS: dict[str, tuple[dict[str, Variant], list[str]]] = {
    "steps": (STEPS, _FOUR),
    "gate": (GATE, _NINE),
    "omega": (OMEGA, _NINE),
    **{group: (_rivals(group), [f"{group}: {name}" for name in tasks]) for group, tasks in CURVES.items()},
    "cost": (COST, ["cifar10_flip1_40", "mnist_lt"]),
    "form": (FORM, ["cifar10_lt", "cifar10_flip2_40", "colored_mnist"]),
    "early": (EARLY, ["cifar10_lt"]),
    "ablation": (ABLATION, ["cifar10_lt"]),
    "alpha": (ALPHA, ["cifar10_lt"]),
    "beta": (BETA, ["cifar10_lt"]),
}


def run_one(wanted: dict[str, Any], data: str, device: str) -> dict[str, Any]:
    """One form on one task with one seed, measured on validation samples."""
    group, seed = wanted["group"], wanted["seed"]
    variant, chosen = GROUPS[group][0][wanted["variant"]], TASKS[wanted["scenario"]]
    scenario = chosen.build(str(Path(data) / chosen.file), seed)
    settings = with_overrides(scenario.settings, **{**chosen.settings, **variant.settings})
    # Without trusted rows, everything but the cost was studied with the paper's meta step.
    published = variant.method == "iada" and group not in TRUSTED_GROUPS
    config = {**PAPER_STEP, **variant.config} if published else variant.config
    found = run_method(scenario, _METHODS[variant.method], settings=settings, seed=seed, device=device,
                       config=config, test=group == "cost")  # fmt: skip
    found.pop("predictions", None)
    return {**found, "config": variant.config, "settings": asdict(settings)}


def _cell(runs: list[dict], column: str) -> str:
    values = [r[column] if column == "noise_auroc" else r.get("metrics", r["validation"]).get(column) for r in runs]
    values = [v for v in values if v is not None and v == v]
    return accuracy.mean_and_spread(values) if values else ""


def table(runs: list[dict], group: str, task: str) -> list[str]:
    variants = GROUPS[group][0]
    columns = (
        ["worst_group", "average"] if task == "colored_mnist" else ["accuracy", "many", "medium", "few", "noise_auroc"]
    )
    columns = [c for c in columns if any(_cell([r], c) for r in runs)]
    titles = {"noise_auroc": "AUROC of wrong labels", "worst_group": "worst group"}
    lines = [
        "| form | what | seeds | " + " | ".join(titles.get(c, c) for c in columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for name, variant in variants.items():
        own = [r for r in runs if r["variant"] == name]
        if own:
            cells = [_cell(own, c) for c in columns]
            lines.append(f"| {name} | {variant.what} | {len(own)} | " + " | ".join(cells) + " |")
    return lines


def wide_table(runs: list[dict], group: str) -> list[str]:
    """A form a row, a task a column: the figure that is optimised there (worst group, mean of classes, or accuracy)."""
    variants, tasks = GROUPS[group]
    tasks = [t for t in tasks if any(r["scenario"] == t for r in runs)]
    lines = [
        "| form | what | " + " | ".join(t.removeprefix(f"{group}: ") for t in tasks) + " |",
        "|---" * (2 + len(tasks)) + "|",
    ]
    for name, variant in variants.items():
        cells = []
        for task in tasks:
            values = [_main(r) for r in runs if r["variant"] == name and r["scenario"] == task]
            cells.append(accuracy.mean_and_spread(values) if values else "")
        lines.append(f"| {name} | {variant.what} | " + " | ".join(cells) + " |")
    seeds = sorted({r["seed"] for r in runs})
    return [*lines, "", f"Seeds {', '.join(map(str, seeds))}."]


def _main(run: dict) -> float:
    return next(iter(run["validation"].values()))


def plot_curves(runs: list[dict], path: Path) -> None:
    """Accuracy against the number of trusted rows, the wrong ones among them, the noise, and the classes that have any."""
    plt = _pyplot()
    titles = {"trusted": "trusted rows", "wrong": "% of the trusted rows wrong", "noise": "% of the labels wrong", "classes": "classes with trusted rows"}  # fmt: skip
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained", sharey=True)
    for ax, (group, points) in zip(axes.flat, CURVES.items(), strict=True):
        for name in RIVALS:
            found = {x: [100 * _main(r) for r in runs if r["variant"] == name and r["scenario"] == f"{group}: {task}"]
                     for task, (x, _) in points.items()}  # fmt: skip
            found = {x: values for x, values in found.items() if values}
            if not any(run["variant"] == name for run in runs):
                continue
            style = {
                "default": dict(color="tab:red", lw=2.2),
                "gate only": dict(color="tab:red", ls="--"),
                "told": dict(color="black", ls=":"),
            }
            ax.plot(
                list(found), [np.mean(v) for v in found.values()], marker="o", ms=4, label=name, **style.get(name, {})
            )
        ax.set_xlabel(titles[group])
        if group == "trusted":
            ax.set_xscale("log")
        ax.grid(alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("validation accuracy in %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_steps(runs: list[dict], path: Path) -> None:
    """A bar for each form, its runs as points; a task a column."""
    plt = _pyplot()
    names = [name for name in STEPS if any(r["variant"] == name for r in runs)]
    fig, axes = plt.subplots(1, len(_FOUR), figsize=(11, 4.4), layout="constrained", sharey=True)
    titles = ("40 % wrong", "long tail", "comments, worst group", "Colored MNIST, worst group")
    for ax, task, title in zip(axes, _FOUR, titles, strict=True):
        for place, name in enumerate(names):
            values = [100 * _main(r) for r in runs if r["variant"] == name and r["scenario"] == task]
            if values:
                colour = (
                    "tab:red" if name.startswith("default (") else "0.6" if name.startswith("default") else "tab:blue"
                )
                ax.barh(place, np.mean(values), color=colour, alpha=0.6)
                ax.plot(values, [place] * len(values), "k.", ms=4)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("validation, %")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(runs: list[dict], path: Path) -> None:
    """Accuracy against alpha and beta."""
    plt = _pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
    for ax, group in zip(axes, ("alpha", "beta"), strict=True):
        points: dict[float, list[float]] = {}
        for run in runs:
            if run["group"] == group:
                points.setdefault(run["config"][group], []).append(100 * run["validation"]["accuracy"])
        x = sorted(points)
        ax.errorbar(x, [np.mean(points[v]) for v in x], [np.std(points[v], ddof=1) if len(points[v]) > 1 else 0 for v in x],
                    marker="o", capsize=3)  # fmt: skip
        ax.set_xlabel(group)
    axes[0].set_ylabel("validation accuracy in %")
    fig.suptitle("CIFAR10-LT 100:1, CPU size", x=0.01, ha="left", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def render(folder: Path) -> str:
    runs = [r for r in grid.read(folder / "study_cpu.jsonl") if "error" not in r]
    notes = folder / "study_notes.md"
    text = [notes.read_text().rstrip() if notes.is_file() else "# The study behind the defaults"]
    for group, (_, tasks) in GROUPS.items():
        in_group = [r for r in runs if r["group"] == group]
        if group in TRUSTED_GROUPS:
            if in_group:
                text += ["", f"## {TITLES[group]}", "", *wide_table(in_group, group)]
            continue
        for task in tasks:
            own = [r for r in runs if r["group"] == group and r["scenario"] == task]
            if own:
                text += ["", f"## {TITLES[group]}: {TASKS[task].title}", "", *table(own, group, task)]
    if steps := [r for r in runs if r["group"] == "steps"]:
        plot_steps(steps, folder / "steps.png")
        text += ["", "![What each step from the published form to the default does](steps.png)"]
    if curves := [r for r in runs if r["group"] in CURVES]:
        plot_curves(curves, folder / "trusted_rows.png")
        text += ["", "![Accuracy against the number of trusted rows and the share of wrong labels](trusted_rows.png)"]
    if any(r["group"] == "alpha" for r in runs):
        plot(runs, folder / "sensitivity.png")
        text += ["", "![Validation accuracy against alpha and beta](sensitivity.png)"]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the data sets, as for benchmarks/accuracy.py")
    parser.add_argument("--group", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--scenario", nargs="+", choices=list(TASKS))
    parser.add_argument("--variant", nargs="+", help="forms of the group; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    grid.add_arguments(parser)
    args = parser.parse_args()
    if not args.render:
        if not args.data:
            parser.error("--data is needed: the folder that holds cifar10/ and mnist/")
        wanted = [
            {"group": group, "variant": name, "scenario": task, "seed": seed}
            for group in args.group
            for seed, task in itertools.product(args.seeds, GROUPS[group][1])
            for name in GROUPS[group][0]
            if (not args.scenario or task in args.scenario) and (not args.variant or name in args.variant)
            if GROUPS[group][0][name].method != "oracle" or task in _WITH_WRONG_LABELS
        ]
        run = functools.partial(run_one, data=args.data, device=args.device)
        grid.run_absent(wanted, run, args.results / "study_cpu.jsonl", args, args.device)
    text = render(args.results)
    (args.results / "study.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
