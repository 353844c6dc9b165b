"""What a model predicted on a test set: confusion matrices and accuracies side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .. import metrics
from . import figures
from .page import Page


@dataclass
class Evaluation:
    """Predictions of one model on one labelled set."""

    predictions: np.ndarray  # [N]
    labels: np.ndarray  # [N]
    groups: dict[str, np.ndarray]  # name -> [N] memberships

    @classmethod
    def of(
        cls, name: str, predictions: Any, labels: Any, groups: Any, group_names: Sequence[str] | None, num_classes: int
    ) -> Evaluation:
        """Of these arrays, see :meth:`~iada_plugin.Report.add_evaluation`.

        Raises:
            ValueError: lengths or values that do not fit.
        """
        predictions, labels = (metrics.as_integers(v, n) for v, n in ((predictions, "predictions"), (labels, "labels")))
        if len(predictions) != len(labels) or not len(labels):
            raise ValueError(f"evaluation {name!r}: {len(predictions)} predictions for {len(labels)} labels.")
        for what, values in (("predictions", predictions), ("labels", labels)):
            if values.min() < 0 or values.max() >= num_classes:
                raise ValueError(
                    f"evaluation {name!r}: {what} run from {values.min()} to {values.max()}; there are"
                    f" {num_classes} classes."
                )
        members: dict[str, np.ndarray] = {}
        if groups is not None:
            values = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
            if values.ndim == 1:
                indices = metrics.as_integers(values, "groups")
                if indices.size and indices.min() < 0:
                    raise ValueError(f"evaluation {name!r}: group {indices.min()} is negative.")
                values = metrics.group_memberships(indices, int(indices.max(initial=0)) + 1)
            if values.ndim != 2 or len(values) != len(labels):
                raise ValueError(f"evaluation {name!r}: groups {list(values.shape)} for {len(labels)} labels.")
            names = (
                [f"group {g}" for g in range(values.shape[1])] if group_names is None else [str(n) for n in group_names]
            )
            if len(set(names)) != values.shape[1]:
                raise ValueError(f"evaluation {name!r}: {len(set(names))} group_names for {values.shape[1]} groups.")
            members = dict(zip(names, values.astype(bool).T, strict=True))
        return cls(predictions, labels, members)


def write_evaluations(page: Page, evaluations: Mapping[str, Evaluation], class_names: Sequence[str]) -> None:
    """Sections of the page; none without evaluations."""
    num_classes = len(class_names)
    if not evaluations:
        return
    if num_classes <= 200:
        found = {k: metrics.confusion_matrix(e.predictions, e.labels, num_classes) for k, e in evaluations.items()}
        page.section("confusion", figures.confusions(found, class_names))
    values = {k: metrics.class_accuracies(e.predictions, e.labels, num_classes) for k, e in evaluations.items()}
    page.section("class_accuracy", figures.accuracies(values, class_names))
    grouped = {k: e for k, e in evaluations.items() if e.groups}
    names = list(next(iter(grouped.values())).groups) if grouped else []
    grouped = {k: e for k, e in grouped.items() if list(e.groups) == names}
    if names:
        values = {
            k: metrics.group_accuracies(e.predictions == e.labels, np.stack(list(e.groups.values()), 1))
            for k, e in grouped.items()
        }
        sizes = np.stack(list(next(iter(grouped.values())).groups.values()), 1).sum(axis=0)
        page.section("group_accuracy", figures.accuracies(values, names, sizes))
