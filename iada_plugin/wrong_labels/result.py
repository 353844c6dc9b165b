"""`WrongLabels`: the labels of a data set with their p-values, the list of wrong ones, and what is estimated from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .estimates import Share, transition_matrix, wrong_share
from .page import write_page

#: Above so many classes there is no transition matrix.
_MANY_CLASSES = 200


@dataclass(frozen=True, eq=False)
class WrongLabels:
    """The labels of a data set, each with its p-value; the smallest ones are on a list of which at most ``false_alarms`` are right,
    on average over draws of the trusted rows.

    Attributes:
        label: ``[R]`` as given.
        suggested: ``[R]`` what it most likely is if it is wrong: the class of the largest other logit.
        margin: ``[R]`` own logit less the largest other one, in nats; NaN of a row that was never seen.
        p_value: ``[R]`` share of right labels that look as bad or worse; 1 where a row was never seen.
        trusted: ``[R]`` bool, rows drawn at random whose label was checked and found right: the reference.
        checked: ``[R]`` bool, rows that were looked at, trusted ones among them; never on the list.
        false_alarms: level of the list.
        adaptive: whether the list makes use of the estimated share of right labels.
        compared: "pooled": with all trusted rows; "weighted": these weighted by class shares; "class": with those of its class.
        pooled_classes: of "class": those with too few trusted rows of their own, compared with all such.
        class_names: ``[C]``.
    """

    label: np.ndarray
    suggested: np.ndarray
    margin: np.ndarray
    p_value: np.ndarray
    trusted: np.ndarray
    checked: np.ndarray
    false_alarms: float
    adaptive: bool
    compared: str
    pooled_classes: tuple[int, ...]
    class_names: tuple[str, ...]

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The rows that were not checked, the most suspect first."""
        rows = np.flatnonzero(~self.checked)
        margin = np.nan_to_num(self.margin[rows], nan=np.inf)
        return rows[np.lexsort((margin, self.p_value[rows]))]

    @property
    def ranking(self) -> np.ndarray:
        """All rows, the most suspect first, checked ones last: ``[R]`` row numbers."""
        return np.concatenate([self.order, np.flatnonzero(self.checked)])

    @property
    def predicted(self) -> np.ndarray:
        """``[R]`` class of the largest logit."""
        return np.where(self.margin > 0, self.label, self.suggested)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The list: row numbers, the most suspect first (Benjamini and Hochberg, 1995; with ``adaptive`` Storey et al., 2004)."""
        p = self.p_value[self.order]
        right = 1.0 if not self.adaptive else min(1.0, 2 * (p > 0.5).sum() / max(len(p), 1) + 2 / max(len(p), 1))
        passed = np.flatnonzero(p * right * len(p) <= self.false_alarms * np.arange(1, len(p) + 1) * (1 + 1e-9))
        return self.order[: passed[-1] + 1] if len(passed) else self.order[:0]

    @functools.cached_property
    def listed(self) -> np.ndarray:
        """``[R]`` bool: whether the row is on the list."""
        found = np.zeros(len(self.label), dtype=bool)
        found[self.rows] = True
        return found

    def __len__(self) -> int:
        """Length of the list."""
        return len(self.rows)

    def at(self, false_alarms: float, adaptive: bool | None = None) -> WrongLabels:
        """The same with a list of another level.

        Raises:
            ValueError: a level outside (0, 1).
        """
        check_level(false_alarms)
        return replace(self, false_alarms=false_alarms, adaptive=self.adaptive if adaptive is None else adaptive)

    # -------------------------------------------------------------------------------------------------------- estimates

    @functools.cached_property
    def wrong_share(self) -> Share:
        """Share of wrong labels among the rows that were not checked: an estimate from below, since a wrong label that looks right
        is counted as right."""
        return self._share(np.ones(len(self.label), dtype=bool))

    @functools.cached_property
    def class_wrong_shares(self) -> tuple[Share, ...]:
        """The same for the rows of each label ``[C]``; NaN for one without rows or without trusted rows."""
        return tuple(self._share(self.label == c) for c in range(len(self.class_names)))

    def _share(self, rows: np.ndarray) -> Share:
        seen = np.isfinite(self.margin) & rows
        others, own = seen & ~self.checked, seen & self.trusted
        return wrong_share(self.margin[others], self.label[others], self.margin[own], self.label[own])

    @functools.cached_property
    def transition(self) -> np.ndarray | None:
        """``[C, C]`` estimated share of samples of each true class (row) that carry each label (column); ``None`` above 200 classes.

        Maximum likelihood, given what the model predicts of trusted rows of each class. Meant for out-of-sample logits: a network
        that has learned wrong labels by heart hides them.
        """
        num_classes = len(self.class_names)
        if num_classes > _MANY_CLASSES:
            return None
        seen, predicted = np.isfinite(self.margin), self.predicted
        own, others = seen & self.trusted, seen & ~self.trusted
        return transition_matrix(predicted[own], self.label[own], predicted[others], self.label[others], num_classes)

    @property
    def share_needed(self) -> float:
        """At least this share of all rows must be as extreme as the most extreme p-value before anything is listed."""
        return float(1 / ((self.trusted & np.isfinite(self.margin)).sum() + 1) / self.false_alarms)

    # --------------------------------------------------------------------------------------------------------- exchange

    def columns(self) -> dict[str, np.ndarray]:
        """``[R]`` columns in row order, as for ``Dataset.add_column`` or a `pandas.DataFrame`."""
        return {
            "label": self.label,
            "suggested_label": self.suggested,
            "margin": self.margin,
            "p_value": self.p_value,
            "listed": self.listed,
            "trusted": self.trusted,
            "checked": self.checked,
        }

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` by row number, in the order of ``ranking``."""
        import pandas

        frame = pandas.DataFrame(self.columns())
        frame.index.name = "row"
        return frame.iloc[self.ranking]

    def add_to(self, dataset: Any) -> Any:
        """A `datasets.Dataset`, or a `pandas.DataFrame`, with the columns ``suggested_label``, ``p_value`` and ``listed``, in the place of
        earlier ones.

        Raises:
            ValueError: it has another number of rows.
        """
        if len(dataset) != len(self.label):
            raise ValueError(f"the data set has {len(dataset)} rows, and {len(self.label)} labels were judged.")
        found = {name: v for name, v in self.columns().items() if name in ("suggested_label", "p_value", "listed")}
        if hasattr(dataset, "assign"):
            return dataset.assign(**found)
        dataset = dataset.remove_columns([name for name in found if name in dataset.column_names])
        for name, values in found.items():
            dataset = dataset.add_column(name, values.tolist())
        return dataset

    def to_cleanlab(self) -> Any:
        """A `pandas.DataFrame` as cleanlab's ``CleanLearning.find_label_issues`` gives it: ``is_label_issue``, ``label_quality``
        (the p-value), ``given_label``, ``predicted_label``."""
        import pandas

        return pandas.DataFrame(
            {
                "is_label_issue": self.listed,
                "label_quality": self.p_value,
                "given_label": self.label,
                "predicted_label": self.predicted,
            }
        )

    def write(self, folder: str | Path, *, samples: Any = None, title: str = "Wrong labels", limit: int = 1000) -> Path:
        """Write ``wrong_labels.html``, a page on which one can tick what one has looked at, and ``wrong_labels.csv``, all rows.

        Args:
            folder: to write to.
            samples: ``samples[row]``, or ``samples(row)`` of a function, is an image, a text, or a row with one.
            title: of the page.
            limit: rows on the page.

        Returns:
            Path of the page.

        Raises:
            ValueError: samples that cannot be shown.
        """
        return write_page(self, Path(folder), samples=samples, title=title, limit=limit)

    def __str__(self) -> str:
        share, n = self.wrong_share, int((~self.checked).sum())
        return (
            f"{len(self)} of {n} labels are listed as wrong, at most {100 * self.false_alarms:g} % of them right (on average over draws of"
            f" the trusted rows); about {100 * share.estimate:.1f} % of all look wrong ({100 * share.low:.1f} to {100 * share.high:.1f} %)"
        )


def check_level(false_alarms: float) -> None:
    """Raises:
    ValueError: it is no share between 0 and 1.
    """
    if not 0 < false_alarms < 1:
        raise ValueError(
            f"false_alarms={false_alarms} must be between 0 and 1, such as 0.1 for at most 10 % of the list."
        )
