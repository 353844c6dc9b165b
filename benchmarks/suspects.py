"""Finding wrong labels: Meta-IADA's suspects against the loss of a plain run and against cleanlab, in the same run.

    pip install cleanlab  # for its own cut; its scores are computed here
    python benchmarks/suspects.py --data DATA --json benchmarks/results/suspects_cpu.json [--task flip1] [--seed 1]
    python benchmarks/suspects.py --render benchmarks/results/suspects_cpu.json

DATA is a folder with CIFAR-10's Parquet files, with cifar10n.npz beside them. All contenders train the same network with the same
optimizer for as many epochs:

- cross-entropy: each sample's loss, a mean over the last five epochs;
- Meta-IADA: `Report.suspects()`; epsilon alone; and the loss in that run, all over the last five epochs;
- cleanlab (Northcutt et al., 2021): predicted probabilities out of sample, from three folds. Its AUROC is that of its label quality
  score (self-confidence, and normalized margin); `find_label_issues` cuts by itself.

"+ meta set" trains on the clean meta samples too, which Meta-IADA has. Nothing here was chosen on these figures but the weight of
the two parts of a suspicion, on flip1 noise with a smaller network and seed 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import scenarios as make
from compare.methods import METHODS, CrossEntropy, Method, Run, run_method, with_overrides
from compare.networks import WideResNet
from compare.scenarios import Scenario, Settings
from meter import environment, table, write
from torch import Tensor, nn

from iada_plugin import metrics
from iada_plugin.report import figures

LAST, FOLDS = 5, 3


@dataclass
class Task:
    """What is trained: noise, and settings of the run."""

    title: str
    options: dict[str, Any]
    settings: dict[str, Any]


_SCHEDULE = {"milestones": (22 / 32, 28 / 32), "warmup_ratio": 0.25}
TASKS = {
    "cpu": {
        "flip1": Task("CIFAR-10, flip1 noise 40 %, 49,000 images, WRN-10-2 on 2 x 2 pixel blocks", {"kind": "flip1", "rate": 0.4},
                      {"model": "blocks", "epochs": 16, **_SCHEDULE}),
        "cifar10n": Task("CIFAR-10N worst labels (40 % human noise), 49,000 images, 16 x 16, ResNet-8", {"kind": "worse_label", "image_size": 16},
                         {"model": "resnet8", "epochs": 12, **_SCHEDULE}),
    },
    "gpu": {
        "flip1": Task("CIFAR-10, flip1 noise 40 %, ResNet-32, 60 epochs", {"kind": "flip1", "rate": 0.4}, {}),
        "cifar10n": Task("CIFAR-10N worst labels, ResNet-32, 60 epochs", {"kind": "worse_label"}, {}),
    },
    "tiny": {  # for the tests: digits
        "flip1": Task("digits, flip1 noise 30 %", {"kind": "flip1", "rate": 0.3}, {"epochs": 8}),
    },
}  # fmt: skip


def build(task: Task, data: str | None, seed: int) -> tuple[Scenario, Settings]:
    scenario = make.label_noise(data, seed=seed, **task.options)
    if task.settings.get("model") == "blocks":
        # As good as the usual stem on 32 x 32 pixels, at a quarter of the cost.
        scenario.network = lambda _: nn.Sequential(
            nn.PixelUnshuffle(2), WideResNet(10, 2, scenario.num_classes, in_chans=12)
        )
    return scenario, with_overrides(scenario.settings, **task.settings)


class LastLosses(CrossEntropy):
    """Keeps each sample's mean loss over the last epochs."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.total, self.first, self.epoch = torch.zeros_like(self.signal), run.settings.epochs - LAST, 0

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        loss = super().__call__(output, y, rows)
        if self.epoch >= self.first:
            self.total[rows] += self.signal[rows] / LAST
        return loss


def plain(
    scenario: Scenario, settings: Settings, seed: int, device: str, add_meta: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Cross-entropy: mean losses ``[N]`` of the training samples, and the run."""
    kept: list[Tensor] = []
    method = Method("cross-entropy", LastLosses, add_meta, lambda run, criterion: kept.append(criterion.total))
    found = run_method(scenario, method, settings=settings, seed=seed, device=device)
    return kept[0][: len(scenario.train)].cpu().numpy(), found


def out_of_sample(scenario: Scenario, settings: Settings, seed: int, device: str, add_meta: bool) -> np.ndarray:
    """Probabilities ``[N, C]`` of each training sample by a network that was not trained on it."""
    train = scenario.train
    found = np.full((len(train), scenario.num_classes), np.nan)
    folds = np.array_split(np.random.default_rng(seed).permutation(len(train)), FOLDS)

    for number, held in enumerate(folds):

        def predict(run: Run, criterion: Any, held: np.ndarray = held) -> None:
            run.model.eval()
            with torch.no_grad():
                parts = [
                    run.model(x.to(device)).softmax(dim=1).cpu() for x in train.x[torch.as_tensor(held)].split(500)
                ]  # type: ignore[index]
            found[held] = torch.cat(parts).double().numpy()

        own = replace(scenario, train=train.select(np.setdiff1d(np.arange(len(train)), held)), val=None)
        method = Method(f"fold {number + 1} of {FOLDS}", CrossEntropy, add_meta, predict)
        run_method(own, method, settings=settings, seed=seed, device=device, test=False)
    return found


def label_quality(y: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """cleanlab's label quality scores ``[N]``, low for suspects: p_y, and ``(p_y - max_{j != y} p_j + 1) / 2``."""
    own = probabilities[np.arange(len(y)), y]
    others = np.where(np.arange(probabilities.shape[1]) == y[:, None], -np.inf, probabilities).max(axis=1)
    return {"self confidence": own, "normalized margin": (own - others + 1) / 2}


def cleanlab_issues(y: np.ndarray, probabilities: np.ndarray) -> np.ndarray | None:
    """The rows that cleanlab flags; ``None`` where it is not installed."""
    if importlib.util.find_spec("cleanlab") is None:
        print("cleanlab is not installed: its own cut is left out", file=sys.stderr)
        return None
    from cleanlab.filter import find_label_issues

    return find_label_issues(y, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)


def run(name: str, task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All contenders on one task: a row each."""
    scenario, settings = build(task, args.data, args.seed)
    train = scenario.train
    assert train.clean is not None
    y, wrong = train.y.numpy(), (train.clean != train.y).numpy()
    rankings: dict[str, np.ndarray] = {}
    accuracy: dict[str, float] = {}
    flagged: dict[str, np.ndarray | None] = {}
    iada = run_method(scenario, METHODS["iada"], settings=settings, seed=args.seed, device=args.device, report=True)
    report = iada.pop("report")
    suspects = sorted(report.suspects())  # by id
    assert [s.id for s in suspects] == list(range(len(train)))
    for title, scores in {
        "Meta-IADA, suspects()": [s.suspicion for s in suspects],
        "Meta-IADA, epsilon alone": [-s.epsilon for s in suspects],
        "Meta-IADA, loss of that run": [s.loss for s in suspects],
    }.items():
        rankings[title], accuracy[title] = np.array(scores), iada["metrics"]["accuracy"]
    predictions = {"Meta-IADA": iada["predictions"]}
    for title, add_meta in (("", False), (" + meta set", True)):
        losses, found = plain(scenario, settings, args.seed, args.device, add_meta)
        rankings[f"loss of cross-entropy{title}"] = losses
        accuracy[f"loss of cross-entropy{title}"] = found["metrics"]["accuracy"]
        predictions[f"cross-entropy{title}"] = found["predictions"]
        probabilities = out_of_sample(scenario, settings, args.seed, args.device, add_meta)
        rows = cleanlab_issues(y, probabilities)
        for score, quality in label_quality(y, probabilities).items():
            rankings[f"cleanlab, {score}{title}"], flagged[f"cleanlab, {score}{title}"] = -quality, rows
    if args.report:
        for title in ("cross-entropy", "Meta-IADA"):
            report.add_evaluation(title, predictions[title], scenario.test.y)
        report.write(args.report / name)
    return [
        {
            "task": name, "title": task.title, "seed": args.seed, "ranking": title, "settings": asdict(settings), "samples": len(train),
            "wrong": int(wrong.sum()), "test_accuracy": accuracy.get(title), **measured(scores, wrong, flagged.get(title)),
        }
        for title, scores in rankings.items()
    ]  # fmt: skip


def measured(scores: np.ndarray, wrong: np.ndarray, flagged: np.ndarray | None) -> dict[str, Any]:
    """How well scores find wrong labels."""
    precision, recall = metrics.precision_recall(scores, wrong)
    top = np.argsort(-scores, kind="stable")
    some = np.searchsorted(recall, np.linspace(0.02, 1, 50)).clip(max=len(recall) - 1)
    found: dict[str, Any] = {
        "auroc": round(metrics.auroc(scores, wrong), 4),
        "precision_at_1000": round(float(wrong[top[:1000]].mean()), 4),
        "precision_at_number_of_wrong": round(float(wrong[top[: wrong.sum()]].mean()), 4),
        "precision": precision[some].round(4).tolist(), "recall": recall[some].round(4).tolist(),
    }  # fmt: skip
    if flagged is not None:
        hits = int(wrong[flagged].sum())
        found |= {"flagged": len(flagged), "flagged_precision": round(hits / max(len(flagged), 1), 4),
                  "flagged_recall": round(hits / int(wrong.sum()), 4)}  # fmt: skip
    return found


def render(result: dict[str, Any], picture: Path | None) -> str:
    """A table a task, and precision against recall as a picture."""
    text = []
    tasks = list(dict.fromkeys((r["task"], r["title"], r["seed"]) for r in result["rows"]))
    for task, title, seed in tasks:
        rows = [r for r in result["rows"] if (r["task"], r["seed"]) == (task, seed)]
        shown = [
            {
                "ranking": r["ranking"], "auroc": f"{100 * r['auroc']:.1f}", "thousand": f"{100 * r['precision_at_1000']:.1f}",
                "k": f"{100 * r['precision_at_number_of_wrong']:.1f}",
                "cut": "" if "flagged" not in r else f"{r['flagged']:,}: {100 * r['flagged_precision']:.1f} / {100 * r['flagged_recall']:.1f}",
                "test": "" if r["test_accuracy"] is None else f"{100 * r['test_accuracy']:.1f}",
            }
            for r in rows
        ]  # fmt: skip
        columns = {"ranking": "ranking", "auroc": "AUROC", "thousand": "precision of the first 1,000", "k": "precision at k = number of wrong",
                   "cut": "its own cut: rows, precision / recall", "test": "test accuracy of that network"}  # fmt: skip
        wrong = f"{rows[0]['wrong']:,} of {rows[0]['samples']:,} labels wrong"
        text += [
            f"{title}, {rows[0]['settings']['epochs']} epochs, seed {seed}; {wrong}, figures in %:",
            "",
            table(shown, columns),
            "",
        ]
    if picture is not None:
        shown = [r for r in result["rows"] if "self confidence" not in r["ranking"]]  # the weaker of the two
        curves = {
            f"{t[1].split(',')[0]}, {t[1].split(',')[1].strip()}" if t[0] == "flip1" else t[1].split(",")[0]: {
                f"{r['ranking']} ({100 * r['auroc']:.1f})": (r["recall"], r["precision"])
                for r in shown
                if (r["task"], r["seed"]) == (t[0], t[2])
            }
            for t in tasks
        }
        figures.recall_curves(curves).savefig(picture)
    return "\n".join(text).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with CIFAR-10's Parquet files")
    parser.add_argument("--size", choices=list(TASKS), default="cpu")
    parser.add_argument("--task", nargs="+", help="default: all of the size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="results; those of other tasks and seeds that are there stay")
    parser.add_argument("--report", type=Path, help="folder for Meta-IADA's report of each task")
    parser.add_argument("--render", type=Path, help="table and picture of results that are there")
    args = parser.parse_args()
    if args.render:
        print(render(json.loads(args.render.read_text()), args.render.with_suffix(".png")))
        return
    warnings.filterwarnings("ignore", message=".*n_jobs.*")
    tasks = TASKS[args.size]
    for name in args.task or tasks:
        if name not in tasks:
            parser.error(f"--task {name}: size {args.size!r} has {', '.join(tasks)}.")
        rows = run(name, tasks[name], args)
        result = {**environment(args.device), "rows": rows}
        print("\n" + render(result, None), flush=True)
        if args.json:
            before = json.loads(args.json.read_text())["rows"] if args.json.is_file() else []
            kept = [r for r in before if (r["task"], r["seed"]) != (name, args.seed)]
            write(args.json, {**result, "rows": kept + rows})
            render({**result, "rows": kept + rows}, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
