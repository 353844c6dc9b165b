"""Images as scenarios: long tail, noisy labels, generalized long tail."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iada_plugin.data import (
    attribute_clusters,
    balanced_meta_split,
    glt_splits,
    long_tail_counts,
    long_tail_subset,
    noisy_labels,
    read_cifar,
    read_mnist,
)

from .loop import Samples, crop_and_flip
from .networks import create_network
from .scenario import Scenario, Settings, balanced_scores, class_scores

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: CIFAR-10N's label columns (Wei et al., 2022).
CIFAR10N = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 8 x 8 digits: images ``[N, 1, 8, 8]`` in 0..1 and labels of train, then of test (every fifth)."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = np.random.default_rng(0).permutation(len(labels))  # the same test set for every seed
    test, train = order[::5], np.setdiff1d(order, order[::5])
    return images[train], labels[train], images[test], labels[test]


@functools.lru_cache(maxsize=1)  # decoding takes longer than many a small run
def _load_images(data: str | None, image_size: int | None) -> tuple[Tensor, ...]:
    if data is None:
        x, y, test_x, test_y = load_digits()
        x, test_x = (F.interpolate(images, size=(16, 16)) for images in (x, test_x))
    else:
        if list(Path(data).glob("train-images-idx3-ubyte*")):
            parts = ((torch.from_numpy(part) for part in read_mnist(data, train)) for train in (True, False))
            splits = [(images[:, None], labels.long()) for images, labels in parts]
        else:
            splits = list(read_cifar(data).values())
        (x, y), (test_x, test_y) = ((images.float() / 255, labels) for images, labels in splits)
    if image_size and image_size != x.shape[-1]:
        x, test_x = (F.interpolate(images, size=(image_size,) * 2, mode="area") for images in (x, test_x))
    mean, std = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True)
    return (x - mean) / std, y, (test_x - mean) / std, test_y


def _image_scenario(name: str, x: Tensor, num_classes: int, data: str | None, augment: bool, **parts: Any) -> Scenario:
    # Digits must not be mirrored. Four pixels in 32, as published.
    shift = crop_and_flip(max(1, x.shape[-1] // 8) if augment else 0, flip=x.shape[1] == 3)
    channels = x.shape[1]
    names = CIFAR10_CLASSES if data and channels == 3 and num_classes == 10 else None  # of the suspects' report
    return Scenario(
        name, num_classes, augment=shift, network=lambda model: create_network(model, num_classes, channels),
        class_names=names, **parts,
    )  # fmt: skip


def long_tailed_images(
    data: str | None = None,
    *,
    imbalance_ratio: float | None = None,
    n_max: int | None = None,
    meta_per_class: int = 10,
    val_per_class: int = 0,
    image_size: int | None = None,
    seed: int = 0,
) -> Scenario:
    """Long-tailed images (Cao et al., 2019).

    Args:
        data: ``None`` for digits; a folder of CIFAR's Parquet files, or of MNIST's IDX files.
        imbalance_ratio: largest over smallest class (100; digits 20).
        n_max: training samples of class 0, by default all.
        meta_per_class: taken from the training data before the tail is cut.
        val_per_class: balanced validation samples, from training data that the tail leaves unused.
        image_size: scale images to this many pixels.
        seed: of every draw.
    """
    x, y, test_x, test_y = _load_images(data, image_size)
    num_classes = int(y.max()) + 1
    meta, rest = balanced_meta_split(y, meta_per_class, seed=seed)
    available = int(torch.bincount(y[rest], minlength=num_classes).min())
    counts = long_tail_counts(num_classes, n_max or available - val_per_class, imbalance_ratio or (100 if data else 20))
    train = np.asarray(rest)[long_tail_subset(y[rest], counts, seed=seed)]
    val = None
    if val_per_class:
        left = np.setdiff1d(rest, train)
        val = left[long_tail_subset(y[left], [val_per_class] * num_classes, seed=seed)]
    settings = Settings() if data else Settings(model="resnet8", epochs=20, batch_size=32)

    return _image_scenario(
        "long_tail", x, num_classes, data, True,
        train=Samples(x[train], y[train]), meta=Samples(x[meta], y[meta]), test=Samples(test_x, test_y),
        val=None if val is None else Samples(x[val], y[val]), settings=settings, score=class_scores(counts),
    )  # fmt: skip


def label_noise(
    data: str | None = None,
    *,
    kind: str = "flip2",
    rate: float = 0.4,
    samples_per_class: int | None = None,
    meta_per_class: int | None = None,
    val_per_class: int = 0,
    image_size: int | None = None,
    augment: bool = True,
    seed: int = 0,
) -> Scenario:
    """Wrong labels (Shu et al., 2019), or real human ones (CIFAR-10N).

    Args:
        data: ``None`` for digits, or a folder of CIFAR's Parquet files or MNIST's IDX files.
        kind: "uniform", "flip1", "flip2", "none", or a column of ``cifar10n.npz`` in that folder, such as "worse_label".
        rate: share of noise, for the first three.
        samples_per_class: training samples, by default all.
        meta_per_class: clean ones: 1,000 in all for CIFAR, as published; 10 for digits.
        val_per_class: clean validation samples.
        image_size: scale images to this many pixels.
        augment: random crops.
        seed: of every draw.
    """
    x, y, test_x, test_y = _load_images(data, image_size)
    num_classes = int(y.max()) + 1
    # Noise first, so that a row's noisy label does not depend on how the data are split.
    if kind == "none":
        noisy = y
    elif kind in CIFAR10N:
        noisy = read_cifar10n(data, kind, y)
    else:
        noisy = torch.from_numpy(noisy_labels(y, kind, rate, num_classes=num_classes, seed=seed)[0])
    if meta_per_class is None:
        meta_per_class = max(1, 1000 // num_classes) if data else 10
    meta, rest = balanced_meta_split(y, meta_per_class, seed=seed)
    left = np.asarray(rest)
    val = None
    if val_per_class:
        val = left[long_tail_subset(y[left], [val_per_class] * num_classes, seed=seed)]
        left = np.setdiff1d(left, val)
    if samples_per_class:
        left = left[long_tail_subset(y[left], [samples_per_class] * num_classes, seed=seed)]
    wide = kind == "uniform" and data is not None
    settings = Settings(
        "wrn28_10" if wide else "resnet32", 60, 100, milestones=(50 / 60, 55 / 60) if wide else (40 / 60, 50 / 60),
        gamma=0.1, warmup_ratio=0.25,
    )  # fmt: skip
    if not data:
        settings = Settings("smallconv", 40, 32, lr=0.05, milestones=(0.7, 0.9), gamma=0.1, warmup_ratio=0.25)
    return _image_scenario(
        "label_noise" if kind != "none" else "balanced", x, num_classes, data, augment,
        train=Samples(x[left], noisy[left], clean=y[left]), meta=Samples(x[meta], y[meta]), settings=settings,
        val=None if val is None else Samples(x[val], y[val]), test=Samples(test_x, test_y),
        score=balanced_scores,
    )  # fmt: skip


def read_cifar10n(data: str | None, column: str, y: Tensor) -> Tensor:
    """One of CIFAR-10N's columns of labels, from ``data``/cifar10n.npz; ``y`` are the true ones, to see that the order is the same."""
    path = Path(data or "") / "cifar10n.npz"
    if data is None or not path.is_file():
        raise FileNotFoundError(f"noise {column!r} is CIFAR-10N's: --data needs CIFAR-10 with cifar10n.npz beside it.")
    labels = np.load(path)
    if not np.array_equal(labels["clean_label"], y.numpy()):
        raise ValueError(f"{path}: its clean labels are not those of the images in {data}: another order of rows?")
    return torch.from_numpy(labels[column].astype(np.int64))


def generalized_long_tail(
    data: str | None = None,
    *,
    protocol: str = "GLT",
    imbalance_ratio: float | None = None,
    n_max: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Scenario:
    """Long tails over classes, over attributes within a class, or over both (Tang et al., 2022).

    Attributes are KMeans clusters, six a class; the meta set holds two samples of each.

    Args:
        data: ``None`` for digits, or a folder of CIFAR's Parquet files; both are clustered on their pixels.
        protocol: "CLT", "GLT" or "ALT".
        imbalance_ratio: over classes (100; digits 10).
        n_max: training samples of class 0.
        image_size: scale images to this many pixels.
        seed: of every draw.
    """
    x, y, _, _ = _load_images(data, image_size)
    num_classes = int(y.max()) + 1
    small = F.adaptive_avg_pool2d(x, 8).flatten(1).numpy()
    clusters = attribute_clusters(small, y, seed=seed)
    cells = y.numpy() * 6 + clusters
    meta, rest = balanced_meta_split(y, 2, groups=cells, seed=seed)
    rest_y = y[rest]
    n_max = n_max or int(0.5 * torch.bincount(rest_y).min())
    counts = long_tail_counts(num_classes, n_max, imbalance_ratio or (100 if data else 10))
    splits = glt_splits(rest_y, clusters[rest], counts, test_per_cell=20 if data is None else 100, seed=seed)
    rows, test_rows = splits.protocol(protocol)
    rest = np.asarray(rest)
    attributes = torch.from_numpy(splits.attributes)
    train, test = rest[rows], rest[test_rows]
    counts = torch.bincount(y[train], minlength=num_classes).tolist()
    settings = Settings("resnet32") if data else Settings("resnet8", 20, 32)
    return _image_scenario(
        f"generalized_long_tail_{protocol}", x, num_classes, data, True,
        train=Samples(x[train], y[train], attributes[rows]), meta=Samples(x[meta], y[meta]),
        test=Samples(x[test], y[test], attributes[test_rows]), settings=settings, score=class_scores(counts),
    )  # fmt: skip
