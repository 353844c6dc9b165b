"""How many labels are wrong, and which classes are taken for which: estimates from trusted rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: Draws of a Beta distribution that make an interval; as many give its ends to about a hundredth of its width.
_DRAWS = 2000
#: Trusted rows of a class that it takes to look at it by itself.
_LEAST = 4
_STEPS = 300


class Share(NamedTuple):
    """A share with a 90 % interval: its low end is a 95 % lower bound."""

    estimate: float
    low: float
    high: float


def drawn_share(wrong: int, checked: int) -> Share:
    """Share of wrong labels of which ``checked`` were drawn at random and ``wrong`` were found wrong, those included that look right:
    Jeffreys' 90 % interval.

    Raises:
        ValueError: no row was checked, or more were wrong than were checked.
    """
    if not 0 <= wrong <= checked or not checked or wrong != int(wrong):
        raise ValueError(
            f"{wrong} of {checked} checked labels cannot be wrong: count all that were drawn and looked at."
        )
    low, high = np.quantile(
        np.random.default_rng(0).beta(wrong + 0.5, checked - wrong + 0.5, 50 * _DRAWS), [0.05, 0.95]
    )
    return Share(wrong / checked, float(low) if wrong else 0.0, float(high) if wrong < checked else 1.0)


def wrong_share(
    margins: np.ndarray, labels: np.ndarray, trusted_margins: np.ndarray, trusted_labels: np.ndarray
) -> Share:
    """Share of wrong labels among rows ``[R]``: one less the share of rows above the median of their class's trusted rows ``[T]``,
    over the share of right labels above it (Storey, 2002, at 1/2).

    Of right labels the share above a class's median is a Beta variable, whose draws give the interval. Wrong labels that look right
    count as right: it is the share of wrong labels, or less. Classes with fewer than four trusted rows are judged together; NaN
    without rows, or with fewer than four trusted ones in all.
    """
    enough = (
        np.bincount(trusted_labels, minlength=int(max(labels.max(initial=0), trusted_labels.max(initial=0))) + 1)
        >= _LEAST
    )
    stratum, own = (np.where(enough[c], c, -1) for c in (labels, trusted_labels))
    above, right, drawn, n = 0.0, 0.0, np.zeros((2, _DRAWS)), 0
    draw = np.random.default_rng(0)
    for c in np.unique(stratum):
        rows, reference = margins[stratum == c], np.sort(trusted_margins[own == c])
        if len(reference) < _LEAST:
            continue
        place = len(reference) // 2
        cut = reference[place - 1]
        # Of values equal to the cut as large a share lies above it as of the trusted rows'.
        tied = reference == cut
        share = (rows > cut).mean() + (rows == cut).mean() * tied[place:].sum() / tied.sum()
        n += len(rows)
        above += len(rows) * share
        right += len(rows) * (len(reference) - place + 1) / (len(reference) + 1)
        drawn[0] += draw.binomial(len(rows), share, _DRAWS)
        drawn[1] += len(rows) * draw.beta(len(reference) - place + 1, place, _DRAWS)
    if not n:
        return Share(np.nan, np.nan, np.nan)
    low, high = np.quantile(1 - drawn[0] / drawn[1], [0.05, 0.95])
    return Share(*(float(np.clip(v, 0, 1)) for v in (1 - above / right, low, high)))


def transition_matrix(
    trusted_predicted: np.ndarray, trusted_label: np.ndarray, predicted: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:
    """``[C, C]`` share of the samples of each true class (row) that carry each label (column).

    Given the true class a model's prediction does not depend on the label, if it has not been trained on it. The predictions on
    rows with a label are then a mixture of those on each true class, known from trusted rows; its weights are found by maximum
    likelihood (expectation maximisation; Saerens et al., 2002, for a new prior).

    Args:
        trusted_predicted, trusted_label: ``[T]`` predictions on trusted rows, and their labels.
        predicted, label: ``[R]`` of the other rows.
        num_classes: C.
    """
    by_truth = _counts(trusted_label, trusted_predicted, num_classes)  # [true, predicted]
    total = by_truth.sum()
    right = (np.trace(by_truth) + 1) / (total + 2)
    prior = np.full((num_classes, num_classes), (1 - right) / max(num_classes - 1, 1))
    np.fill_diagonal(prior, right)  # of a class with few trusted rows: as good as the others
    by_truth = by_truth + 2 * prior
    by_truth /= by_truth.sum(axis=1, keepdims=True)
    found = _counts(label, predicted, num_classes)  # [label, predicted]
    weights = np.full((num_classes, num_classes), 0.5 / max(num_classes - 1, 1))  # [label, true], of each label
    np.fill_diagonal(weights, 0.5)
    for _ in range(_STEPS):
        weights *= (found / np.maximum(weights @ by_truth, 1e-12)) @ by_truth.T
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    joint = (weights * found.sum(axis=1, keepdims=True)).T  # [true, label]
    size = joint.sum(axis=1, keepdims=True)
    return np.where(size > 0, joint / np.maximum(size, 1e-12), np.eye(num_classes))


def _counts(rows: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(rows * size + columns, minlength=size * size).reshape(size, size).astype(float)
