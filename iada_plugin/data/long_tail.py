"""Long-tailed subsampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .meta import as_labels, class_counts


def long_tail_counts(num_classes: int, n_max: int, imbalance_ratio: float) -> list[int]:
    """``n_j = int(n_max * IR^(-j / (C - 1)))``: class 0 keeps ``n_max`` samples, the last one ``n_max / IR``.

    The protocol of Cao et al. (2019). CIFAR-10 at ratio 100 with 10 meta samples a class taken out first
    (``n_max`` = 4990): 4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49.

    Args:
        num_classes: C, at least 2.
        n_max: samples of class 0.
        imbalance_ratio: IR, at least 1.

    Returns:
        ``[C]`` counts.

    Raises:
        ValueError: an argument out of range, or a class left without a sample.
    """
    if not (num_classes >= 2 and n_max >= 1 and imbalance_ratio >= 1):  # NaN is neither
        raise ValueError(f"need num_classes >= 2, n_max >= 1 and imbalance_ratio >= 1, got {num_classes}, {n_max},"
                         f" {imbalance_ratio}.")  # fmt: skip
    counts = [int(n_max * imbalance_ratio ** (-j / (num_classes - 1))) for j in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(f"n_max={n_max} at imbalance_ratio={imbalance_ratio} leaves class {num_classes - 1} empty.")
    return counts


def long_tail_subset(labels: Sequence[int] | Any, counts: Sequence[int], seed: int = 0) -> list[int]:
    """Rows of a subset with ``counts[j]`` samples of class j, drawn at random.

    Args:
        labels: ``[N]``, or a data set that has them.
        counts: ``[C]``, see :func:`long_tail_counts`.
        seed: of the draw.

    Returns:
        Sorted row indices.

    Raises:
        ValueError: a class has fewer rows than asked for, or no count; a count that is no whole number from 0 on.
    """
    labels = as_labels(labels)
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    for j, count in enumerate(class_counts(counts, labels)):
        own = np.flatnonzero(labels == j)
        if len(own) < count:
            raise ValueError(f"class {j} has {len(own)} rows, {count} are asked for: lower n_max.")
        rows.append(rng.choice(own, count, replace=False))
    return np.sort(np.concatenate(rows)).tolist()
