"""`Report`: what Meta-IADA did to the samples, as pictures, tables and a list of suspect labels."""

from __future__ import annotations

import base64
import copy
import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import __version__, figures, metrics
from .covariance import Covariance, LowRank, take
from .distributed import rank
from .engine import MetaIADA
from .perturbation import PerturbationNetwork
from .recorder import Recorder

#: Rows of the list of suspects in the HTML page; the CSV has all of them.
_SHOWN = 48
#: Classes whose covariance spectrum is drawn.
_SPECTRA = 10


class Suspect(NamedTuple):
    """A sample whose label looks wrong.

    Attributes:
        id: row number in the training set.
        label: it was trained with.
        predicted: class that the model gave when it was last trained on.
        epsilon: mean over the last epochs; low is suspect.
        loss: mean cross-entropy over the last epochs.
        epochs: how many of the last epochs it was seen in.
    """

    id: int
    label: int
    predicted: int
    epsilon: float
    loss: float
    epochs: int


@dataclass
class Evaluation:
    """Predictions of one model on one labelled set."""

    predictions: np.ndarray  # [N]
    labels: np.ndarray  # [N]
    groups: dict[str, np.ndarray]  # name -> [N] memberships


class Report:
    """Collects what a :class:`MetaIADA` does from now on, and writes it as one HTML page with PNGs and a CSV.

    In several processes :meth:`suspects` and :meth:`write` gather what each of them has seen, and have to be called in all; the
    first one writes.

    Args:
        iada: the criterion. Pass it ``ids=`` with each batch, or there are histograms but no list of suspects.
        class_names: ``[C]``.
        true_labels: ``[n]`` true label of each row of the training set where it is known (simulated noise, or a corrected set):
            adds what is known about right and wrong labels.
        samples: ``samples[id]`` is an image, a text, or a row with one, to show suspects.
        epochs: samples are followed over this many of the last epochs.
        capacity: samples kept with their characteristics.
        max_id: ids are below this; about ``8 epochs + 8`` bytes for each.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: lengths that do not fit the classifier.

    Example:
        >>> from torch import nn
        >>> from iada_plugin import IADAConfig
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(16, 4), torch.arange(16) % 2
        >>> iada = MetaIADA(model, optimizer, meta_loader=[(x, y)], steps_per_epoch=1, epochs=3, config=IADAConfig(warmup_epochs=1))
        >>> report = Report(iada)
        >>> for _ in range(3):
        ...     loss = iada(model(x), y, ids=torch.arange(16))
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> len(report.suspects()), report.suspects(1)[0].epochs
        (16, 2)
    """

    def __init__(
        self,
        iada: MetaIADA,
        *,
        class_names: Sequence[str] | None = None,
        true_labels: Any = None,
        samples: Any = None,
        epochs: int = 5,
        capacity: int = 10_000,
        max_id: int = 2_000_000,
    ) -> None:
        num_classes = iada.head.out_features
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names; the classifier has {num_classes} classes.")
        for name, value in (("epochs", epochs), ("capacity", capacity), ("max_id", max_id)):
            if value < 1 or value != int(value):
                raise ValueError(f"{name}={value!r} must be a whole number >= 1.")
        self.class_names = [str(n) for n in (range(num_classes) if class_names is None else class_names)]
        self.samples = samples
        self.evaluations: dict[str, Evaluation] = {}
        self._recorder = Recorder(
            num_classes, len(iada.statistics.characteristics), iada.steps_per_epoch, epochs=int(epochs), capacity=int(capacity),
            max_id=int(max_id), true_labels=None if true_labels is None else metrics.as_integers(true_labels, "true_labels"),
        )  # fmt: skip
        self._iada = iada
        self._kept: _Kept | None = None
        self._last: Recorder | None = None  # of all processes, once there is nothing more to come
        iada.recorder = self._recorder
        iada.before_close.append(self._keep)

    # ---------------------------------------------------------------------------------------------------- what is known

    def add_evaluation(
        self, name: str, predictions: Any, labels: Any, groups: Any = None, group_names: Sequence[str] | None = None
    ) -> None:
        """A model's predictions on a test set, for confusion matrices and accuracies side by side.

        Args:
            name: of the model, such as "cross-entropy" or "Meta-IADA"; an earlier one of this name is replaced.
            predictions, labels: ``[N]``.
            groups: ``[N]`` group of each row, or ``[N, G]`` memberships.
            group_names: ``[G]``.

        Raises:
            ValueError: lengths or values that do not fit.
        """
        predictions, labels = (metrics.as_integers(v, n) for v, n in ((predictions, "predictions"), (labels, "labels")))
        if len(predictions) != len(labels) or not len(labels):
            raise ValueError(f"evaluation {name!r}: {len(predictions)} predictions for {len(labels)} labels.")
        for what, values in (("predictions", predictions), ("labels", labels)):
            if values.min() < 0 or values.max() >= len(self.class_names):
                raise ValueError(
                    f"evaluation {name!r}: {what} run from {values.min()} to {values.max()}; there are"
                    f" {len(self.class_names)} classes."
                )
        members: dict[str, np.ndarray] = {}
        if groups is not None:
            values = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
            if len(values) != len(labels):
                raise ValueError(f"evaluation {name!r}: groups of {len(values)} rows for {len(labels)} labels.")
            matrix = (
                metrics.group_memberships(values, int(values.max()) + 1) if values.ndim == 1 else values.astype(bool)
            )
            names = (
                [f"group {g}" for g in range(matrix.shape[1])] if group_names is None else list(map(str, group_names))
            )
            if len(names) != matrix.shape[1]:
                raise ValueError(f"evaluation {name!r}: {len(names)} group_names for {matrix.shape[1]} groups.")
            members = dict(zip(names, matrix.T, strict=True))
        self.evaluations[name] = Evaluation(predictions, labels, members)

    def suspects(self, n: int | None = None) -> list[Suspect]:
        """Samples in the order of suspicion of their labels: lowest mean epsilon first, then highest loss.

        Args:
            n: how many; all by default.

        Raises:
            RuntimeError: nothing was trained after the warm-up, or the batches had no ids.
        """
        table = self._table(self._merged())
        rows = [table[field].tolist() for field in Suspect._fields]
        return [Suspect(*row) for row in zip(*rows, strict=True)][:n]

    @property
    def empty(self) -> bool:
        """Whether this process has seen no batch after the warm-up."""
        self._recorder.drain()
        return not self._recorder.by_class

    def _table(self, recorder: Recorder) -> dict[str, np.ndarray]:
        """Samples with ids, the most suspect first."""
        if not recorder.by_class:
            raise RuntimeError(
                "nothing is recorded: no batch was trained after the warm-up since this Report was made. Make it before training,"
                " and see to it that the warm-up ends (warmup_epochs, epochs)."
            )
        if not recorder.with_ids:
            raise RuntimeError(
                "the batches had no sample ids, so that suspects cannot be named: call iada(output, target, ids=ids) with the row"
                " numbers of the batch in the training set."
            )
        table = recorder.samples()
        order = np.lexsort((-table["loss"], table["epsilon"]))
        return {k: v[order] for k, v in table.items()}

    def _merged(self) -> Recorder:
        if self._kept is None:
            return self._recorder.merged()
        if self._last is None:
            self._last = self._recorder.merged()
        return self._last

    def _keep(self) -> None:
        """The engine is being closed: keep what its classifier will forget."""
        self._recorder.drain()
        self._kept = _Kept.of(self._iada)

    # --------------------------------------------------------------------------------------------------------- writing

    def write(self, folder: str | Path) -> Path:
        """Write ``report.html`` (self-contained), its pictures as PNGs, and ``samples.csv``, the most suspect sample first.

        Returns:
            Path of the page.

        Raises:
            RuntimeError: nothing was trained after the warm-up.
        """
        now, folder = self._kept or _Kept.of(self._iada), Path(folder)
        recorder, limits = self._merged(), now.limits
        if not recorder.by_class:
            self._table(recorder)  # says so
        page = _Page(folder, rank() == 0)
        names, counts = self.class_names, now.counts
        rows = recorder.rows()
        table = self._table(recorder) if recorder.with_ids else None
        epsilon, labels = (table["epsilon"], table["label"]) if table is not None else (rows["epsilon"], rows["label"])
        first, last = min(recorder.by_class) + 1, max(recorder.by_class) + 1
        page.facts(
            {
                "Epochs": f"{first} to {last}",
                "Optimizer steps": f"{recorder.last_step + 1:,}; the first without warm-up is number {(recorder.first_step or 0) + 1:,}",
                "Samples followed": f"{len(epsilon):,}"
                + ("" if table is not None else " (drawn at random: the batches had no ids)"),
                "Mean epsilon": f"{epsilon.mean():+.3f}",
                "Adversarial (epsilon > 0)": f"{100 * (epsilon > 0).mean():.1f} %",
                **now.facts,
            }
        )
        page.section("adversarial_share", figures.adversarial_share(recorder.by_class, names, counts))
        page.section("epsilon", figures.epsilon_histograms(epsilon, labels, names, limits))
        if table is not None and "true_label" in table:
            wrong = table["true_label"] != table["label"]
            page.section("clean_and_wrong", figures.clean_and_wrong(recorder.by_truth, table["epsilon"], wrong, limits))
            if 0 < wrong.sum() < len(wrong):
                rankings = {"epsilon": -table["epsilon"], "loss (of this run)": table["loss"]}
                page.section("finding", figures.finding_wrong_labels(rankings, wrong))
        if table is not None:
            self._write_suspects(page, table)
        if len(rows["f"]):
            page.section("drivers", figures.drivers(now.characteristics, *explain(now.network, rows["f"])))
        if now.eigenvalues:
            page.section("spectra", figures.spectra(now.eigenvalues, names, counts))
        self._write_evaluations(page)
        x, y = recorder.meta_loss.points()
        if len(y):
            page.section("meta_loss", figures.curve(x + 1, y, "meta step", "cross-entropy on the meta batch"))
        if recorder.seconds:
            page.section("step_time", figures.step_seconds(recorder.seconds))
        self._write_csv(page, rows if table is None else table)
        return page.finish()

    def _write_suspects(self, page: _Page, table: dict[str, np.ndarray]) -> None:
        shown = {k: v[:_SHOWN].tolist() for k, v in table.items()}
        contents = [] if self.samples is None else [_content(self.samples, i) for i in shown["id"]]
        name = self.class_names
        cells = {
            "id": shown["id"],
            "label": [name[y] for y in shown["label"]],
            "predicted": [name[y] for y in shown["predicted"]],
            **({"true label": [name[y] for y in shown["true_label"]]} if "true_label" in shown else {}),
            "epsilon": [f"{e:+.3f}" for e in shown["epsilon"]],
            "loss": [f"{v:.2f}" for v in shown["loss"]],
        }
        if contents and all(isinstance(c, str) for c in contents):
            cells["sample"] = [c if len(c) <= 200 else c[:199] + "…" for c in contents]
            contents = []
        if contents:
            titles = [
                f"{i}\n{a}\n→ {b}" for i, a, b in zip(cells["id"], cells["label"], cells["predicted"], strict=True)
            ]
            page.section("suspects", figures.images(contents, titles), cells)
        else:
            page.section("suspects", None, cells)

    def _write_evaluations(self, page: _Page) -> None:
        found = {}
        for key, e in self.evaluations.items():
            found[key] = metrics.confusion_matrix(e.predictions, e.labels, len(self.class_names))
        if not found:
            return
        if len(self.class_names) <= 200:
            page.section("confusion", figures.confusions(found, self.class_names))
        values = {k: m.diagonal() / np.where(m.sum(axis=1) > 0, m.sum(axis=1), np.nan) for k, m in found.items()}
        page.section("class_accuracy", figures.accuracies(values, self.class_names))
        grouped = {k: e for k, e in self.evaluations.items() if e.groups}
        names = list(next(iter(grouped.values())).groups) if grouped else []
        grouped = {k: e for k, e in grouped.items() if list(e.groups) == names}
        if names:
            values = {
                k: metrics.group_accuracies(e.predictions == e.labels, np.stack(list(e.groups.values()), 1))
                for k, e in grouped.items()
            }
            sizes = np.stack(list(next(iter(grouped.values())).groups.values()), 1).sum(axis=0)
            page.section("group_accuracy", figures.accuracies(values, names, sizes))

    def _write_csv(self, page: _Page, table: dict[str, np.ndarray]) -> None:
        columns = [k for k in ("id", "label", "predicted", "true_label", "epsilon", "loss", "epochs") if k in table]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(np.round(table[k], 6).tolist() for k in columns), strict=True))
        page.file("samples.csv", buffer.getvalue().encode())


class _Kept(NamedTuple):
    """What a report needs of an engine, which forgets it when it is closed."""

    network: PerturbationNetwork
    characteristics: list[str]
    limits: tuple[float, float]
    counts: np.ndarray
    eigenvalues: dict[int, np.ndarray]
    facts: dict[str, str]

    @classmethod
    def of(cls, iada: MetaIADA) -> _Kept:
        head, config = iada.head, iada.config
        seen = head.class_count.cpu().numpy()
        present = np.argsort(-seen, kind="stable")[: int((seen > 0).sum())]
        picked = (
            present[np.unique(np.linspace(0, len(present) - 1, min(_SPECTRA, len(present))).round().astype(int))]
            if len(present)
            else []
        )
        names = [getattr(f, "__name__", repr(f)) for f in iada.statistics.characteristics]
        facts = {
            "Classifier": f"{iada.classifier_name} of {type(iada.model).__name__}, {head.in_features} features, {head.out_features} classes",
            "Settings other than the defaults": ", ".join(f"{k}={v!r}" for k, v in config.changed().items()) or "none",
            "Meta steps left out": str(iada.meta.skipped),
        }
        return cls(
            copy.deepcopy(iada.meta.perturbation).cpu(), names, config.epsilon_range, seen,
            {int(c): _eigenvalues(head.class_covariance, int(c)) for c in picked}, facts,
        )  # fmt: skip


@torch.no_grad()
def _eigenvalues(covariance: Covariance, c: int) -> np.ndarray:
    row = take(covariance, torch.tensor([c], device=covariance[0].device))
    if isinstance(row, LowRank):
        matrix = torch.diag(row.diagonal[0]) + row.factor[0] @ row.factor[0].T
        values = torch.linalg.eigvalsh(matrix)
    else:
        values = torch.linalg.eigvalsh(row[0]) if row.dim() == 3 else row[0].sort().values
    return values.flip(0).clamp_min(0).cpu().double().numpy()


def explain(
    network: PerturbationNetwork, characteristics: np.ndarray, strongest: int = 6, points: int = 25
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """What drives epsilon.

    Args:
        network: the perturbation network.
        characteristics: ``[R, K]`` of samples.
        strongest: how many characteristics get a curve.
        points: of a curve.

    Returns:
        Gradient x input ``[R, K]``, the input being the standardised characteristic (Shrikumar et al., 2017); and for the strongest
        ones by its mean size, from 5th to 95th percentile, the mean epsilon of all samples where this characteristic is set to a
        value (partial dependence; Friedman, 2001): index to values ``[points]`` and epsilon ``[points]``.
    """
    f = torch.tensor(characteristics, dtype=network.mean.dtype, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(network(f).sum(), f)
    signed = (gradient * (f - network.mean)).detach().numpy()
    curves = {}
    some = f.detach()[torch.linspace(0, len(f) - 1, min(len(f), 1000)).long()]
    for k in np.argsort(-np.abs(signed).mean(axis=0), kind="stable")[:strongest]:
        values = torch.linspace(*np.quantile(characteristics[:, k], [0.05, 0.95]).tolist(), points)
        rows = some.repeat(points, 1, 1)
        rows[:, :, k] = values[:, None].to(rows.dtype)
        with torch.no_grad():
            epsilon = network(rows.flatten(0, 1)).view(points, -1).mean(dim=1)
        curves[int(k)] = values.numpy(), epsilon.numpy()
    return signed, curves


def _content(samples: Any, index: int) -> Any:
    """The image or text of a sample."""
    row = samples(index) if isinstance(samples, Callable) and not hasattr(samples, "__getitem__") else samples[index]  # type: ignore[arg-type]
    if isinstance(row, Mapping):
        texts = [v for v in row.values() if isinstance(v, str)]
        pictures = [v for v in row.values() if hasattr(v, "convert") or getattr(v, "ndim", 0) >= 2]
        row = (pictures or texts or [str(dict(row))])[0]
    elif isinstance(row, (tuple, list)):
        row = row[0]
    return row if isinstance(row, str) else figures.as_image(row)


# --------------------------------------------------------------------------------------------------------------- page

_TEXTS = {
    "adversarial_share": ("Share of adversarial samples", "Of each class, the share of samples with epsilon > 0 in each epoch. Where it is high the training pulls the class towards the boundary; where it is low it lets the class go."),
    "epsilon": ("Epsilon by class", "Right of zero (orange): adversarial, the sample is moved towards the other classes, so that training pulls it back harder. Left (blue): anti-adversarial, training lets it go. A second hump on the left is often wrong labels."),
    "clean_and_wrong": ("Right and wrong labels", "The same for samples whose label is right, and whose label is known to be wrong. The further apart, the better epsilon tells them from each other."),
    "finding": ("Finding wrong labels", "Taking the samples with the lowest epsilon, or the highest loss, for wrong: precision against recall over all cut-offs."),
    "suspects": ("Suspect labels", "The samples with the lowest epsilon, a mean over the last epochs. Look at them before you delete them: rare and hard samples are let go, too. All samples are in samples.csv."),
    "drivers": ("What drives epsilon", "Left: how strongly each training characteristic moves epsilon (mean size of gradient x input over samples). Right: mean epsilon over samples when one characteristic is set to a value and the others stay as they are."),
    "spectra": ("Class covariances", "Eigenvalues of the feature covariance of classes (samples in brackets), largest first. A steep line: the class varies in few directions. Of a class with few samples the small ones are not known."),
    "confusion": ("Confusion matrices", "Rows are true classes, columns predictions, in percent of the row."),
    "class_accuracy": ("Accuracy of each class", "Test accuracy, with each model's worst class in the legend."),
    "group_accuracy": ("Accuracy of each group", "Test accuracy, with each model's worst group in the legend; rows of the group in brackets."),
    "meta_loss": ("Meta loss", "Cross-entropy on the meta batches, after the virtual step. It should fall, or stay low; a rise means that the model drifts away from what the meta set asks for."),
    "step_time": ("Time of a step", "Median and quartiles of the wall time from one optimizer step to the next, data loading included."),
}  # fmt: skip

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin:2.2rem 0 .3rem}p{margin:.3rem 0 .8rem;color:#444}
img{max-width:100%;height:auto}table{border-collapse:collapse;font-size:.85rem}
td,th{padding:.2rem .7rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top;overflow-wrap:anywhere}
nav{font-size:.9rem}nav a{margin-right:.9rem;white-space:nowrap}.wide{overflow-x:auto}footer{margin:3rem 0;color:#777;font-size:.85rem}
"""


class _Page:
    """An HTML page with its pictures inside; nothing is written before the end, and only by the first process."""

    def __init__(self, folder: Path, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.parts: list[str] = []
        self.links: list[str] = []
        self.files: dict[str, bytes] = {}

    def facts(self, values: dict[str, str]) -> None:
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in values.items())
        self.parts.append(f'<table id="facts">{rows}</table>')

    def section(self, key: str, figure: Any, cells: dict[str, list[Any]] | None = None) -> None:
        title, text = _TEXTS[key]
        self.links.append(f'<a href="#{key}">{title}</a>')
        parts = [f'<section id="{key}"><h2>{title}</h2><p>{text}</p>']
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            self.files[f"{key}.png"] = buffer.getvalue()
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
        if cells:
            head = "".join(f"<th>{html.escape(k)}</th>" for k in cells)
            rows = zip(*cells.values(), strict=True)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
            parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')
        self.parts.append("".join(parts) + "</section>")

    def file(self, name: str, content: bytes) -> None:
        self.files[name] = content

    def finish(self) -> Path:
        title = "Meta-IADA report"
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1><nav>{' '.join(self.links)}</nav>"
            f"{''.join(self.parts)}<footer>Written by iada_plugin {__version__}.</footer></body></html>\n"
        )
        path = self.folder / "report.html"
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, content in {**self.files, "report.html": page.encode()}.items():
                (self.folder / name).write_bytes(content)
        return path
