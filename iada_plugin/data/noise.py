"""Label noise with a known transition matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .meta import as_labels, check_share

NOISE_KINDS = ("uniform", "flip1", "flip2")


def transition_matrix(kind: str, rate: float, num_classes: int, seed: int = 0) -> np.ndarray:
    """Probability that a label of class i (row) becomes class j (column).

    The protocols of Shu et al. (2019, Meta-Weight-Net): "uniform" keeps a label with ``1 - rate`` and otherwise draws one
    of all C classes, ``(1 - p) I + p / C``; "flip1" sends the share ``rate`` of each class to one other class ("pair
    flip" in much of the literature); "flip2" sends half of it to each of two other classes.

    Args:
        kind: one of those three.
        rate: p in [0, 1].
        num_classes: C, at least 2; at least 3 for "flip2".
        seed: of the draw of the other classes.

    Returns:
        ``[C, C]``, rows sum to one.

    Raises:
        ValueError: an argument out of range.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"noise {kind!r} is unknown: use one of {', '.join(map(repr, NOISE_KINDS))}.")
    check_share("rate", rate)
    others = {"uniform": 0, "flip1": 1, "flip2": 2}[kind]
    if num_classes < max(2, others + 1):
        raise ValueError(f"noise {kind!r} needs at least {max(2, others + 1)} classes, got {num_classes}.")
    matrix = (1 - rate) * np.eye(num_classes)
    if kind == "uniform":
        return matrix + rate / num_classes
    rng = np.random.default_rng(seed)
    for i in range(num_classes):
        targets = rng.choice(np.delete(np.arange(num_classes), i), others, replace=False)
        matrix[i, targets] += rate / others
    return matrix


def noisy_labels(
    labels: Sequence[int] | Any, kind: str, rate: float, *, num_classes: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt labels at random.

    Args:
        labels: ``[N]`` true labels, or a data set that has them.
        kind: see :func:`transition_matrix`.
        rate: share of noise.
        num_classes: C; by default the largest label and one.
        seed: of the matrix and of the draws.

    Returns:
        ``[N]`` noisy labels, and the ``[C, C]`` transition matrix they were drawn from.

    Raises:
        ValueError: an argument out of range, or a label that is not below ``num_classes``.

    Example:
        >>> noisy, matrix = noisy_labels([0, 1, 2] * 1000, "flip1", 0.4)
        >>> round(float((noisy == [0, 1, 2] * 1000).mean()), 1), matrix.diagonal().tolist()
        (0.6, [0.6, 0.6, 0.6])
    """
    true = as_labels(labels)
    num_classes = int(true.max()) + 1 if num_classes is None else num_classes
    if true.max() >= num_classes:
        raise ValueError(f"label {true.max()} does not fit num_classes={num_classes}.")
    matrix = transition_matrix(kind, rate, num_classes, seed)
    # One uniform number a row, looked up in the row's cumulative distribution.
    edges = matrix.cumsum(axis=1)[true]
    draws = np.random.default_rng([seed, 1]).random(len(true))[:, None]
    return np.minimum((draws >= edges).sum(axis=1), num_classes - 1).astype(np.int64), matrix
