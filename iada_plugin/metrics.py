"""Accuracy over groups and classes."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_integers(values: Any, name: str) -> np.ndarray:
    """``[N]`` whole numbers, from a tensor, an array or a list.

    Raises:
        ValueError: naming ``name``, for anything else.
    """
    found = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole numbers [N], got {found.dtype} {list(found.shape)}.")
    return found.astype(np.int64)


def group_accuracies(correct: Any, groups: Any) -> np.ndarray:
    """Accuracy of each group.

    Args:
        correct: ``[N]`` whether a prediction is right.
        groups: ``[N, G]`` memberships; groups may overlap.

    Returns:
        ``[G]`` shares in 0..1, NaN for a group without rows.
    """
    correct, groups = np.asarray(correct, dtype=float), np.asarray(groups, dtype=float)
    size = groups.sum(axis=0)
    return np.divide(correct @ groups, size, out=np.full(groups.shape[1], np.nan), where=size > 0)


def worst_group_accuracy(correct: Any, groups: Any, min_size: int = 1) -> tuple[float, int]:
    """Lowest accuracy over the groups of at least ``min_size`` rows, and which group it is.

    Args:
        correct: ``[N]``.
        groups: ``[N, G]``.
        min_size: smaller groups are left out: a few rows say little.

    Raises:
        ValueError: no group is that large.
    """
    accuracy = group_accuracies(correct, groups)
    accuracy[np.asarray(groups).sum(axis=0) < max(min_size, 1)] = np.nan
    if np.isnan(accuracy).all():
        raise ValueError(f"no group has {min_size} rows: lower min_size.")
    worst = int(np.nanargmin(accuracy))
    return float(accuracy[worst]), worst


def worst_group_interval(
    correct: Any, groups: Any, min_size: int = 1, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the worst group's accuracy; rows are drawn again with replacement.

    The groups compared are those of at least ``min_size`` rows in the data itself. The minimum over groups is biased
    downward under resampling, so the interval may lie below the estimate.

    Args:
        correct: ``[N]``.
        groups: ``[N, G]``.
        min_size: as :func:`worst_group_accuracy`.
        level: coverage in 0..1.
        draws: number of bootstrap samples.
        seed: of the draws.
    """
    correct, groups = np.asarray(correct, dtype=float), np.asarray(groups, dtype=float)
    groups = groups[:, groups.sum(axis=0) >= max(min_size, 1)]
    if groups.shape[1] == 0:
        raise ValueError(f"no group has {min_size} rows: lower min_size.")
    rng = np.random.default_rng(seed)
    n = len(correct)
    worst = np.empty(draws)
    for i in range(draws):
        weight = np.bincount(rng.integers(0, n, n), minlength=n)
        size = weight @ groups
        share = np.divide((weight * correct) @ groups, size, out=np.ones_like(size), where=size > 0)
        worst[i] = share.min()
    low, high = np.quantile(worst, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def weighted_group_accuracy(correct: Any, groups: Any, train_sizes: Any) -> float:
    """Average of the groups' accuracies, weighted by the groups' shares of the training set (Sagawa et al., 2020): the
    average accuracy on a test set that is distributed as the training set.

    Args:
        correct: ``[N]``.
        groups: ``[N, G]`` memberships.
        train_sizes: ``[G]`` training samples of each group.

    Raises:
        ValueError: a group that was trained has no test row.
    """
    accuracy, sizes = group_accuracies(correct, groups), np.asarray(train_sizes, dtype=float)
    if sizes.shape != accuracy.shape:
        raise ValueError(
            f"train_sizes must hold one count for each of the {len(accuracy)} groups, got {sizes.tolist()}."
        )
    trained = sizes > 0
    if np.isnan(accuracy[trained]).any():
        raise ValueError(f"no test row of group {np.flatnonzero(trained & np.isnan(accuracy))[0]}, which was trained.")
    return float(np.average(accuracy[trained], weights=sizes[trained]))


def group_memberships(groups: Any, num_groups: int) -> np.ndarray:
    """Group indices ``[N]`` as memberships ``[N, G]``."""
    return np.eye(num_groups, dtype=bool)[np.asarray(groups)]


def confusion_matrix(predictions: Any, labels: Any, num_classes: int) -> np.ndarray:
    """``[C, C]`` counts: row the label, column the prediction; ``predictions`` and ``labels`` are ``[N]``."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.size and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(f"{name} must be in 0..{num_classes - 1}, got {values.min()} to {values.max()}.")
    cells = labels * num_classes + predictions
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def macro_precision(predictions: Any, labels: Any, num_classes: int) -> float:
    """Mean over classes of the share of right predictions among those of the class; 0 for a class never predicted.

    Classes without a row in ``labels`` are left out.
    """
    matrix = confusion_matrix(predictions, labels, num_classes)
    precision = matrix.diagonal() / matrix.sum(axis=0).clip(min=1)
    return float(precision[matrix.sum(axis=1) > 0].mean())


def class_accuracies(predictions: Any, labels: Any, num_classes: int) -> np.ndarray:
    """Accuracy of each class, ``[C]``, NaN for a class without rows; ``predictions`` and ``labels`` are ``[N]``."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    rows, right = (np.bincount(part, minlength=num_classes) for part in (labels, labels[predictions == labels]))
    return np.divide(right, rows, out=np.full(num_classes, np.nan), where=rows > 0)


def shot_accuracies(class_accuracy: Any, train_counts: Any, *, many: int = 100, few: int = 20) -> dict[str, float]:
    """Mean class accuracy over many-shot (> ``many`` training samples), medium and few-shot (< ``few``) classes.

    The bounds of Liu et al. (2019), "Large-Scale Long-Tailed Recognition in an Open World".

    Args:
        class_accuracy: ``[C]``.
        train_counts: ``[C]`` training samples of each class.

    Returns:
        Keys "many", "medium" and "few"; NaN where no class falls into one.
    """
    accuracy, counts = np.asarray(class_accuracy, dtype=float), np.asarray(train_counts)
    parts = {"many": counts > many, "medium": (counts <= many) & (counts >= few), "few": counts < few}
    return {name: float(np.nanmean(accuracy[part])) if part.any() else float("nan") for name, part in parts.items()}


def auroc(scores: Any, positive: Any) -> float:
    """Area under the ROC curve of ``scores`` ``[N]`` as a detector of ``positive`` ``[N]``: the probability that a positive
    sample has the higher score, ties counted half. NaN where there is only one kind."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[inverse.ravel()]  # mean rank of equal scores, from 1
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def precision_recall(scores: Any, positive: Any) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of taking the samples with the k highest ``scores`` ``[N]`` for ``positive`` ``[N]``, at each k where
    the score changes: ``[K]`` and ``[K]``, recall rising."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    order = np.argsort(-scores, kind="stable")
    hits = positive[order].cumsum()
    ranked = scores[order]
    last = np.flatnonzero(
        np.append(ranked[1:] != ranked[:-1], np.ones(min(len(ranked), 1), bool))
    )  # of each run of equal scores
    return hits[last] / (last + 1), hits[last] / max(int(positive.sum()), 1)
