"""The paper's scenarios as data: what is trained, on what it is measured, and the published hyperparameters.

Every builder takes ``data=None`` for a built-in sample (no download), or the folder or file of a published data set.
The meta set is always disjoint from training, validation and test samples.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import metrics
from ..data import (
    ImageFiles,
    attribute_clusters,
    balanced_meta_split,
    colored_digits,
    glt_splits,
    long_tail_counts,
    long_tail_subset,
    noisy_labels,
    read_celeba,
    read_cifar,
    read_glt,
    read_image_list,
    read_mnist,
    read_waterbirds,
)
from ..data.civilcomments import GROUPS as COMMENT_GROUPS
from ..data.civilcomments import read_civilcomments, synthetic_civilcomments
from .loop import Samples, crop_and_flip
from .networks import AveragingNetwork, SmallDistilBert, create_network

#: CIFAR-10N's label columns (Wei et al., 2022).
CIFAR10N = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")


@dataclass
class Settings:
    """How a scenario is trained; by default as published where the data are, small where they are built in."""

    model: str = "resnet32"
    epochs: int = 200
    batch_size: int = 100
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.8, 0.9)
    gamma: float = 0.01
    warmup_ratio: float = 0.8
    meta_batch_size: int | None = None
    workers: int = 0
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scenario:
    """Data of one experiment.

    Attributes:
        name: of the scenario.
        num_classes: C.
        train, meta, test: samples.
        val: samples that select settings and epochs, or ``None``.
        settings: defaults.
        score: predictions and samples to named figures in 0..1, the first of them being what is optimised.
        network: makes an untrained network by name.
        augment: for training batches.
        keep_best: end with the epoch of the best validation score instead of the last.
        synthetic: whether the data are generated.
    """

    name: str
    num_classes: int
    train: Samples
    meta: Samples
    test: Samples
    settings: Settings
    score: Callable[[Tensor, Samples], dict[str, float]]
    network: Callable[[str], nn.Module]
    val: Samples | None = None
    augment: Callable[[Tensor], Tensor] | None = None
    keep_best: bool = False
    synthetic: bool = False

    @property
    def counts(self) -> list[int]:
        """Training samples of each class."""
        return torch.bincount(self.train.y, minlength=self.num_classes).tolist()


# ------------------------------------------------------------------------------------------------------ raw data sets


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
        splits = read_cifar(data)
        (x, y), (test_x, test_y) = ((images.float() / 255, labels) for images, labels in splits.values())
    if image_size and image_size != x.shape[-1]:
        x, test_x = (F.interpolate(images, size=(image_size,) * 2, mode="area") for images in (x, test_x))
    mean, std = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True)
    return (x - mean) / std, y, (test_x - mean) / std, test_y


def _image_scenario(name: str, x: Tensor, num_classes: int, data: str | None, augment: bool, **parts: Any) -> Scenario:
    # Digits must not be mirrored. Four pixels in 32, as published.
    shift = crop_and_flip(max(1, x.shape[-1] // 8) if augment else 0, flip=data is not None)
    channels = x.shape[1]
    return Scenario(
        name, num_classes, augment=shift, network=lambda model: create_network(model, num_classes, channels), **parts
    )


# ---------------------------------------------------------------------------------------------------------- long tail


def long_tail(
    data: str | None = None,
    *,
    imbalance_ratio: float | None = None,
    n_max: int | None = None,
    meta_per_class: int = 10,
    val_per_class: int = 0,
    image_size: int | None = None,
    seed: int = 0,
) -> Scenario:
    """Long-tailed images or texts (Cao et al., 2019; Liu et al., 2019; Reuters R52 has its own long tail).

    Args:
        data: ``None`` for digits; a folder of CIFAR's Parquet files; a folder with ``*_train.txt`` and ``*_test.txt`` image
            lists (ImageNet-LT, Places-LT, iNaturalist 2018); a Parquet file with columns ``text``, ``label`` and ``split``.
        imbalance_ratio: largest over smallest class (100; digits 20); for CIFAR and digits.
        n_max: training samples of class 0, by default all.
        meta_per_class: taken from the training data before the tail is cut.
        val_per_class: balanced validation samples, from training data that the tail leaves unused.
        image_size: scale images to this many pixels.
        seed: of every draw.
    """
    if data is not None and str(data).endswith(".parquet"):
        return _reuters(data, meta_per_class, seed)
    if data is not None and list(Path(data).glob("*_train.txt")):
        return _image_lists(Path(data), meta_per_class, image_size, seed)
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


def class_scores(counts: Sequence[int]) -> Callable[[Tensor, Samples], dict[str, float]]:
    """Accuracy, macro accuracy and precision, and many-, medium- and few-shot accuracy."""

    def score(predictions: Tensor, samples: Samples) -> dict[str, float]:
        y, num_classes = samples.y.cpu().numpy(), len(counts)
        per_class = metrics.class_accuracies(predictions.numpy(), y, num_classes)
        return {
            "accuracy": float((predictions.numpy() == y).mean()),
            "macro_accuracy": float(np.nanmean(per_class)),
            **metrics.shot_accuracies(per_class, counts),
            "macro_precision": metrics.macro_precision(predictions.numpy(), y, num_classes),
        }

    return score


def balanced_scores(predictions: Tensor, samples: Samples) -> dict[str, float]:
    """Accuracy and macro precision."""
    found = class_scores([1] * (int(samples.y.max()) + 1))(predictions, samples)
    return {name: found[name] for name in ("accuracy", "macro_precision")}


def _image_lists(folder: Path, meta_per_class: int, image_size: int | None, seed: int) -> Scenario:
    parts = {}
    for split in ("train", "val", "test"):
        lists = sorted(folder.glob(f"*_{split}.txt"))
        if lists:
            parts[split] = read_image_list(lists[0], folder)
    if "test" not in parts and "val" not in parts:
        raise FileNotFoundError(f"{folder} has a *_train.txt but neither *_test.txt nor *_val.txt.")
    test, val = (parts["test"], parts.get("val")) if "test" in parts else (parts["val"], None)  # iNaturalist: val only
    num_classes = int(parts["train"].targets.max()) + 1
    meta, rest = balanced_meta_split(parts["train"].targets, meta_per_class, seed=seed, short="half")
    return _file_scenario(
        "long_tail", num_classes, parts["train"].select(rest), parts["train"].select(meta), test, val, image_size,
        Settings("resnet50", 90, 256, meta_batch_size=64, config={"meta_lr": 1e-4} if num_classes > 5000 else {}),
        class_scores(np.bincount(parts["train"].targets[rest], minlength=num_classes)),
    )  # fmt: skip


def _file_scenario(
    name: str, num_classes: int, train: ImageFiles, meta: ImageFiles, test: ImageFiles, val: ImageFiles | None,
    image_size: int | None, settings: Settings, score: Any, keep_best: bool = False,
) -> Scenario:  # fmt: skip
    from timm.data import create_transform

    def samples(files: ImageFiles | None, training: bool) -> Samples | None:
        if files is None:
            return None
        transform = create_transform((3,) + (image_size or 224,) * 2, is_training=training)
        groups = None if files.groups is None else torch.from_numpy(files.groups)
        return Samples(replace(files, transform=transform), torch.from_numpy(files.targets), groups)

    return Scenario(
        name, num_classes, samples(train, True), samples(meta, True), samples(test, False), settings, score,  # type: ignore[arg-type]
        lambda model: create_network(model, num_classes), samples(val, False), keep_best=keep_best,
    )  # fmt: skip


def encode_texts(
    texts: dict[str, Sequence[str]], max_words: int, vocabulary_size: int = 8000
) -> tuple[dict[str, Tensor], int]:
    """Lower-case words as indices ``[N, max_words]`` padded with 0; 1 is any word that is not among the most frequent of
    ``texts["train"]``. Returns them by split, and the size of the vocabulary."""
    words = {split: [re.findall(r"[a-z0-9]+|[^\sa-z0-9]", t.lower())[:max_words] for t in own] for split, own in texts.items()}  # fmt: skip
    frequent = sorted(Counter(w for text in words["train"] for w in text).items(), key=lambda item: (-item[1], item[0]))
    index = {word: i for i, (word, n) in enumerate(frequent[: vocabulary_size - 2], start=2) if n > 1}
    found = {}
    for split, own in words.items():
        ids = torch.zeros(len(own), max_words, dtype=torch.long)
        for row, text in enumerate(own):
            ids[row, : len(text)] = torch.tensor([index.get(w, 1) for w in text], dtype=torch.long)
        found[split] = ids
    return found, len(index) + 2


def _reuters(path: str, meta_per_class: int, seed: int) -> Scenario:
    import pyarrow.parquet

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: a Parquet file with the columns text, label and split.")
    table = pyarrow.parquet.read_table(path).to_pydict()
    missing = [c for c in ("text", "label", "split") if c not in table]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table)}.")
    train_rows = [i for i, s in enumerate(table["split"]) if s == "train"]
    # A class needs a document to train on and one for the meta set; classes in order of size.
    sizes = Counter(table["label"][i] for i in train_rows)
    classes = {label: k for k, (label, n) in enumerate(sorted(sizes.items(), key=lambda s: (-s[1], s[0]))) if n >= 2}
    train_rows = [i for i in train_rows if table["label"][i] in classes]
    test_rows = [i for i, s in enumerate(table["split"]) if s == "test" and table["label"][i] in classes]
    y = torch.tensor([classes[table["label"][i]] for i in train_rows])
    test_y = torch.tensor([classes[table["label"][i]] for i in test_rows])
    texts = {"train": [table["text"][i] for i in train_rows], "test": [table["text"][i] for i in test_rows]}
    ids, size = encode_texts(texts, 200)
    import warnings

    with warnings.catch_warnings():  # the tail's classes give half of their rows
        warnings.simplefilter("ignore", UserWarning)
        meta, rest = balanced_meta_split(y, meta_per_class, seed=seed, short="half")
    counts = torch.bincount(y[rest], minlength=len(classes)).tolist()
    score = class_scores(counts)
    macro_first = lambda p, s: {"macro_accuracy": score(p, s)["macro_accuracy"], **score(p, s)}  # noqa: E731
    return Scenario(
        "long_tail_text", len(classes), Samples(ids["train"][rest], y[rest]), Samples(ids["train"][meta], y[meta]),
        Samples(ids["test"], test_y), Settings("dan", 30, 32, "adamw", 1e-3, 0.01, (0.6, 0.85), 0.3, warmup_ratio=0.5),
        macro_first, lambda model: _text_network(model, size, len(classes), 200),
    )  # fmt: skip


def _text_network(name: str, vocabulary_size: int, num_classes: int, max_words: int) -> nn.Module:
    if name == "dan":
        return AveragingNetwork(vocabulary_size, num_classes)
    if name == "distilbert":
        return SmallDistilBert(vocabulary_size, num_classes, max_words)
    raise ValueError(f"no network {name!r} for texts: use 'dan' or 'distilbert'.")


# ------------------------------------------------------------------------------------------------------- noisy labels


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
        data: ``None`` for digits, or a folder of CIFAR's Parquet files.
        kind: "uniform", "flip1", "flip2", "none", or a column of ``cifar10n.npz`` in that folder, such as "worse_label".
        rate: share of noise, for the first three.
        samples_per_class: training samples, by default all.
        meta_per_class: clean ones: 100 for CIFAR-10 (1,000 in all, as published), 10 for digits.
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
        noisy = _cifar10n(data, kind, y)
    else:
        noisy = torch.from_numpy(noisy_labels(y, kind, rate, num_classes=num_classes, seed=seed)[0])
    meta, rest = balanced_meta_split(y, meta_per_class or (100 if data else 10), seed=seed)
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


def _cifar10n(data: str | None, column: str, y: Tensor) -> Tensor:
    path = Path(data or "") / "cifar10n.npz"
    if data is None or not path.is_file():
        raise FileNotFoundError(f"noise {column!r} is CIFAR-10N's: --data needs CIFAR-10 with cifar10n.npz beside it.")
    labels = np.load(path)
    if not np.array_equal(labels["clean_label"], y.numpy()):
        raise ValueError(f"{path}: its clean labels are not those of the images in {data}: another order of rows?")
    return torch.from_numpy(labels[column].astype(np.int64))


# ------------------------------------------------------------------------------------------- generalized long tail


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
        data: ``None`` for digits, a folder of CIFAR's Parquet files (both clustered on their pixels), or an annotation
            file of ImageNet-GLT or MSCOCO-GLT (its name says which training set it holds).
        protocol: "CLT", "GLT" or "ALT".
        imbalance_ratio: over classes (100; digits 10).
        n_max: training samples of class 0.
        image_size: scale images to this many pixels.
        seed: of every draw.
    """
    if data is not None and str(data).endswith(".json"):
        return _glt_files(data, protocol, image_size, seed)
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


def _glt_files(path: str, protocol: str, image_size: int | None, seed: int) -> Scenario:
    if (protocol == "ALT") != ("inter_bl" in Path(path).name):
        raise ValueError(f"{Path(path).name} is not the annotation of {protocol}: ALT trains on ..._inter_bl.json, CLT and"
                         " GLT on ..._inter_lt.json.")  # fmt: skip
    parts = read_glt(path)
    train, test = parts["train"], parts["test_bl" if protocol == "CLT" else "test_bbl"]
    num_classes = int(train.targets.max()) + 1
    # The training set's attributes are hidden from training, but the meta set is drawn over them, as in the paper.
    cells = None if train.groups is None else train.targets * (int(train.groups.max()) + 1) + train.groups
    meta, rest = balanced_meta_split(train.targets, 2, groups=cells, seed=seed, short="half")
    counts = np.bincount(train.targets[rest], minlength=num_classes)
    return _file_scenario(
        f"generalized_long_tail_{protocol}", num_classes, train.select(rest), train.select(meta), test, parts["val"],
        image_size or 112, Settings("resnext50_32x4d", 100, 256, milestones=(0.6, 0.8), gamma=0.1, meta_batch_size=64),
        class_scores(counts),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ sub-populations


def group_scores(num_groups: int, train_groups: Tensor, min_size: int = 1) -> Callable[..., dict[str, float]]:
    """Worst-group and average accuracy, and the average weighted by the groups' shares of the training set."""
    sizes = _memberships(train_groups, num_groups).sum(axis=0)

    def score(predictions: Tensor, samples: Samples) -> dict[str, float]:
        correct = (predictions == samples.y.cpu()).numpy()
        groups = _memberships(samples.groups, num_groups)  # type: ignore[arg-type]
        worst, index = metrics.worst_group_accuracy(correct, groups, min_size)
        found = {"worst_group": worst, "average": float(correct.mean())}
        if samples.groups.dim() == 1:  # type: ignore[union-attr]
            found["weighted_average"] = metrics.weighted_group_accuracy(correct, groups, sizes)
        return {**found, "worst_group_index": index, "worst_group_size": int(groups[:, index].sum())}

    return score


def _memberships(groups: Tensor, num_groups: int) -> np.ndarray:
    values = groups.cpu().numpy()
    return metrics.group_memberships(values, num_groups) if values.ndim == 1 else values.astype(bool)


def colored_mnist(
    data: str | None = None, *, rows: int | None = None, meta_per_group: int = 20, seed: int = 0
) -> Scenario:
    """Colored MNIST (Arjovsky et al., 2019): the colour predicts the label in training and misleads at test.

    The meta set is drawn from the validation data (colours at chance), balanced over the four groups.

    Args:
        data: ``None`` for scikit-learn's digits; a folder of MNIST's IDX files.
        rows: use only so many images, by default all.
        meta_per_group: of the four groups label x colour.
        seed: of every draw.
    """
    if data is None:
        images = [part.squeeze(1).numpy() for part in load_digits()[::2]]
        digits = [part.numpy() for part in load_digits()[1::2]]
        images, digits = F.interpolate(torch.from_numpy(np.concatenate(images))[:, None], size=(16, 16))[:, 0].numpy(), np.concatenate(digits)  # fmt: skip
    else:
        images, digits = read_mnist(data)
    if rows:
        images, digits = images[:rows], digits[:rows]
    splits = {
        name: Samples(*(torch.from_numpy(part) for part in (s.images, s.labels, s.groups)))
        for name, s in colored_digits(images, digits, seed=seed).items()
    }
    meta, rest = balanced_meta_split(splits["val"].y, meta_per_group, groups=splits["val"].groups, seed=seed)
    settings = Settings("smallconv", 25, 128, lr=0.02, milestones=(0.8,), gamma=0.1, warmup_ratio=0.2)
    return Scenario(
        "colored_mnist", 2, splits["train"], splits["val"].select(meta), splits["test"],
        settings if data else replace(settings, batch_size=32), group_scores(4, splits["train"].groups),  # type: ignore[arg-type]
        lambda model: create_network(model, 2, 2), splits["val"].select(rest), keep_best=True,
    )  # fmt: skip


def photographs(
    data: str, *, dataset: str, meta_per_group: int = 20, image_size: int | None = None, seed: int = 0
) -> Scenario:
    """Waterbirds (Sagawa et al., 2020) or CelebA (Liu et al., 2015); meta set from the validation data, by group.

    Args:
        data: the data set's folder.
        dataset: "waterbirds" or "celeba".
        meta_per_group: of the four groups, at most half of a group.
        image_size: 224 by default.
        seed: of the draw.
    """
    parts = {"waterbirds": read_waterbirds, "celeba": read_celeba}[dataset](data)
    val = parts["val"]
    meta, rest = balanced_meta_split(val.targets, meta_per_group, groups=val.groups, seed=seed, short="half")
    settings = Settings("resnet50", 300 if dataset == "waterbirds" else 50, 128, lr=1e-3, weight_decay=1e-4,
                        milestones=(), warmup_ratio=0.2)  # fmt: skip
    score = group_scores(4, torch.from_numpy(parts["train"].groups))
    return _file_scenario(dataset, 2, parts["train"], val.select(meta), parts["test"], val.select(rest), image_size, settings,
                          score, keep_best=True)  # fmt: skip


def comments(data: str | None = None, *, meta_per_group: int = 20, meta_from: str = "train", seed: int = 0) -> Scenario:
    """Toxic comments with overlapping identity groups (CivilComments' layout; Koh et al., 2021), words as inputs.

    Args:
        data: CSV in WILDS' layout, or ``None`` for a generated sample.
        meta_per_group: meta rows for each of the 16 groups, at most half of a group.
        meta_from: split the meta set is drawn from.
        seed: of the draw.
    """
    splits = read_civilcomments(data) if data else synthetic_civilcomments(seed=seed)
    source = splits[meta_from]
    meta, rest = balanced_meta_split(source.labels, meta_per_group, groups=source.groups, seed=seed, short="half")
    splits["meta"], splits[meta_from] = source.select(meta), source.select(rest)
    length = 128 if data else 32
    ids, size = encode_texts({name: rows.texts for name, rows in splits.items()}, length)
    parts = {
        name: Samples(ids[name], torch.from_numpy(rows.labels), torch.from_numpy(rows.groups))
        for name, rows in splits.items()
    }
    groups = len(COMMENT_GROUPS)
    settings = Settings("distilbert", 4 if data else 8, 32, "adamw", 3e-4, 0.01, (), warmup_ratio=0.25)
    return Scenario(
        "comments", 2, parts["train"], parts["meta"], parts["test"], settings,
        group_scores(groups, parts["train"].groups, 20), lambda model: _text_network(model, size, 2, length),  # type: ignore[arg-type]
        parts["val"], keep_best=True, synthetic=data is None,
    )  # fmt: skip
