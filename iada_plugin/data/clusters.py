"""Attribute clusters and the splits of generalized long-tailed classification (Tang et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .meta import as_labels, class_counts, whole_numbers


def attribute_clusters(features: Any, labels: Sequence[int] | Any, num_clusters: int = 6, seed: int = 0) -> np.ndarray:
    """Stand-ins for unknown attributes: KMeans clusters of each class's features.

    Args:
        features: ``[N, D]`` features of a model that was not trained on the long tail (the paper: a pretrained
            ResNet-50).
        labels: ``[N]``, or a data set that has them.
        num_clusters: clusters a class (6 in the paper).
        seed: of KMeans.

    Returns:
        ``[N]`` cluster of each row within its class, numbered by size: 0 is the class's largest.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, or a class with fewer rows than clusters.
    """
    from sklearn.cluster import KMeans

    labels, features = as_labels(labels), np.asarray(features)
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(f"features must be [N, D] with N = {len(labels)}, got {list(features.shape)}.")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or Inf.")
    clusters = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < num_clusters:
            raise ValueError(f"class {label} has {len(rows)} rows: too few for {num_clusters} clusters.")
        found = KMeans(num_clusters, n_init=4, random_state=seed).fit_predict(features[rows])
        size = np.bincount(found, minlength=num_clusters)
        rank = np.empty(num_clusters, dtype=np.int64)
        rank[np.argsort(-size, kind="stable")] = np.arange(num_clusters)
        clusters[rows] = rank[found]
    return clusters


@dataclass
class GLTSplits:
    """Rows of the splits of one data set; all disjoint but the two training sets.

    Attributes:
        train: long-tailed over classes and over attributes ("Train-GLT").
        train_balanced: balanced over classes, long-tailed over attributes ("Train-CBL").
        test_class_balanced: balanced over classes, attributes as in training ("Test-CBL").
        test_balanced: balanced over classes and attributes ("Test-GBL").
        attributes: ``[N]`` attribute of every row, 0 the most frequent of its class.
    """

    train: list[int]
    train_balanced: list[int]
    test_class_balanced: list[int]
    test_balanced: list[int]
    attributes: np.ndarray

    def protocol(self, name: str) -> tuple[list[int], list[int]]:
        """Train and test rows of "CLT" (class-wise long tail), "GLT" (both) or "ALT" (attribute-wise long tail)."""
        pairs = {
            "CLT": (self.train, self.test_class_balanced),
            "GLT": (self.train, self.test_balanced),
            "ALT": (self.train_balanced, self.test_balanced),
        }
        if name not in pairs:
            raise ValueError(f"protocol {name!r} is none of {', '.join(pairs)}.")
        return pairs[name]


def glt_splits(
    labels: Sequence[int] | Any,
    clusters: Sequence[int] | Any,
    counts: Sequence[int],
    *,
    shares: Sequence[float] = (7, 2, 1),
    test_per_cell: int = 20,
    seed: int = 0,
) -> GLTSplits:
    """Training and test sets that are long-tailed over classes, over attributes within a class, or over neither.

    As Tang et al. (2022) make ImageNet-GLT: the clusters of a class, largest first, are merged into as many attributes as
    there are ``shares`` (6 clusters, 3 attributes); the balanced test sets are drawn first, at most a quarter of a
    cell; then attributes are cut to ``shares`` and classes to ``counts``.

    Args:
        labels: ``[N]``, or a data set that has them.
        clusters: ``[N]`` from :func:`attribute_clusters`.
        counts: ``[C]`` training samples of each class (:func:`long_tail_counts`); a class that has too few rows of an
            attribute keeps all it has.
        shares: of the attributes in training, largest first.
        test_per_cell: rows a class and attribute in the balanced test set.
        seed: of the draws.

    Raises:
        ValueError: lengths that do not fit, numbers that are not positive, or a class and attribute without enough rows for
            one test row.
    """
    labels, clusters = as_labels(labels), np.asarray(clusters)
    counts = class_counts(counts, labels, least=1)
    test_per_cell = whole_numbers("test_per_cell", test_per_cell, least=1)
    num_classes, share = len(counts), np.asarray(shares, dtype=float)
    if not (np.isfinite(share) & (share > 0)).all():
        raise ValueError(f"shares={shares} must be positive.")
    share = share / share.sum()
    if clusters.shape != labels.shape:
        raise ValueError(f"clusters must be [N] with N = {len(labels)}, got {list(clusters.shape)}.")
    num_clusters = int(clusters.max()) + 1
    if num_clusters < len(share):
        raise ValueError(f"{num_clusters} clusters cannot make {len(share)} attributes.")
    attributes = clusters * len(share) // num_clusters
    rng = np.random.default_rng(seed)
    left = {
        (y, a): list(rng.permutation(np.flatnonzero((labels == y) & (attributes == a))))
        for y in range(num_classes)
        for a in range(len(share))
    }

    def take(y: int, a: int, n: int) -> list[int]:
        cell = left[y, a]
        taken, left[y, a] = cell[:n], cell[n:]
        return taken

    test_balanced: list[int] = []
    test_class_balanced: list[int] = []
    least = min(left, key=lambda cell: len(left[cell]))
    size = min(test_per_cell, len(left[least]) // 4)  # the same in every cell, or classes would not be balanced
    if size < 1:
        raise ValueError(
            f"class {least[0]} has {len(left[least])} rows of attribute {least[1]}: 4 are needed for a test row."
        )
    wanted = [max(1, round(size * len(share) * s)) for s in share]
    for y in range(num_classes):
        for a in range(len(share)):
            test_balanced += take(y, a, size)
        for a in range(len(share)):
            test_class_balanced += take(y, a, min(wanted[a], len(left[y, a]) // 2))

    def long_tailed(sizes: Sequence[int]) -> list[int]:
        return [row for (y, a), cell in left.items() for row in cell[: max(1, int(sizes[y] * share[a]))]]

    balanced = [int(np.sum(counts) // num_classes)] * num_classes
    parts = (long_tailed(counts), long_tailed(balanced), test_class_balanced, test_balanced)
    return GLTSplits(*(sorted(int(row) for row in part) for part in parts), attributes=attributes)
