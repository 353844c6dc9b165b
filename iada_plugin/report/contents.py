"""What stands on the page of a report."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..runtime.samples import content_of
from . import figures
from .analysis import explain
from .page import Page
from .recorder import Recorder

#: Rows of the list of suspects in the HTML page; the CSV has all of them.
_SHOWN = 48
#: Of samples.csv, where they are known.
_COLUMNS = ("id", "label", "predicted", "true_label", "suspicion", "contradicted", "epsilon", "loss", "epochs")
#: Below this suspicion no label stands out: a sample that is contradicted half of the time, at an epsilon of 0, has 0.5.
_CLEAR = 0.6
_NOTHING_STANDS_OUT = (
    "No label stands out here: the highest suspicion is {highest:.2f}. The network contradicts hardly any label that it is trained on. Either"
    " there are no wrong ones, or it had learned them by heart before the warm-up was over (a shorter one, such as warmup_ratio=0.25, leaves"
    " it less time to), or there were too few meta steps to learn from."
)


def write_contents(
    page: Page,
    recorder: Recorder,
    now: Any,
    table: dict[str, np.ndarray] | None,
    *,
    names: Sequence[str],
    limits: tuple[float, float],
    samples: Any,
) -> None:
    """Sections from what was recorded, and ``samples.csv``.

    Args:
        page: to write to.
        recorder: what all processes have seen.
        now: what is kept of the engine.
        table: columns of the samples with ids, the most suspect first; ``None`` without ids.
        names: ``[C]`` of the classes.
        limits: range of epsilon.
        samples: to show suspects, see :class:`~iada_plugin.Report`.
    """
    counts = np.max([c[:, 0] for c in recorder.by_class.values()], axis=0)  # of a whole epoch, where there was one
    rows = recorder.rows()
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
            rankings = {
                "suspicion": table["suspicion"],
                "epsilon alone": -table["epsilon"],
                "loss (of this run)": table["loss"],
            }
            page.section("finding", figures.finding_wrong_labels(rankings, wrong))
    if table is not None:
        _write_suspects(page, table, names, samples)
    if len(rows["f"]):
        page.section("drivers", figures.drivers(now.characteristics, *explain(now.network, rows["f"])))
    if now.eigenvalues:
        page.section("spectra", figures.spectra(now.eigenvalues, names, counts))
    x, y = recorder.meta_loss.points()
    if len(y):
        page.section("meta_loss", figures.curve(x + 1, y, "meta step", "cross-entropy on the meta batch"))
    if recorder.seconds:
        page.section("step_time", figures.step_seconds(recorder.seconds))
    _write_csv(page, rows if table is None else table)


def _write_suspects(page: Page, table: dict[str, np.ndarray], name: Sequence[str], samples: Any) -> None:
    shown = {k: v[:_SHOWN].tolist() for k, v in table.items()}
    contents = [] if samples is None else [content_or_none(samples, i) for i in shown["id"]]
    cells = {
        "id": shown["id"],
        "label": [name[y] for y in shown["label"]],
        "predicted": [name[y] for y in shown["predicted"]],
        **({"true label": [name[y] for y in shown["true_label"]]} if "true_label" in shown else {}),
        "suspicion": [f"{v:.3f}" for v in shown["suspicion"]],
        "contradicted": [f"{100 * v:.0f} %" for v in shown["contradicted"]],
        "epsilon": [f"{e:+.3f}" for e in shown["epsilon"]],
        "loss": [f"{v:.2f}" for v in shown["loss"]],
    }
    texts = [c if isinstance(c, str) else "" for c in contents]
    if any(texts):
        cells["sample"] = [c if len(c) <= 200 else c[:199] + "…" for c in texts]
    pictures = [None if isinstance(c, str) else c for c in contents]
    figure = None
    if any(p is not None for p in pictures):
        lines = zip(cells["id"], cells["label"], cells["predicted"], strict=True)
        figure = figures.images(pictures, [f"{i}\n{a}\n→ {b}" for i, a, b in lines])
    highest = table["suspicion"][0]
    note = "" if highest >= _CLEAR else _NOTHING_STANDS_OUT.format(highest=highest)
    page.section("suspects", figure, cells, note)


def _write_csv(page: Page, table: dict[str, np.ndarray]) -> None:
    columns = [k for k in _COLUMNS if k in table]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(np.round(table[k], 6).tolist() for k in columns), strict=True))
    page.file("samples.csv", buffer.getvalue().encode())


def content_or_none(samples: Any, index: int) -> Any:
    """A sample that cannot be read must not cost the page."""
    try:
        return content_of(samples, index)
    except Exception:
        return None
