"""Texts as scenarios: Reuters' long tail, and comments with identity groups."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from iada_plugin.data import balanced_meta_split
from iada_plugin.data.civilcomments import GROUPS, read_civilcomments, synthetic_civilcomments

from .loop import Samples
from .networks import AveragingNetwork, SmallDistilBert
from .scenario import Scenario, Settings, class_scores, group_scores


def encode_texts(
    texts: Mapping[str, Sequence[str]], max_words: int, vocabulary_size: int = 8000
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


def read_reuters(path: str) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """Texts, labels ``[N]`` in the order of the classes' sizes, splits ``[N]`` and class names of such a Parquet file.

    A class with a single training document is left out: it could not be in training and in the meta set.
    """
    import pyarrow.parquet

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: a Parquet file with the columns text, label and split.")
    table = pyarrow.parquet.read_table(path).to_pydict()
    missing = [c for c in ("text", "label", "split") if c not in table]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table)}.")
    sizes = Counter(label for label, split in zip(table["label"], table["split"], strict=True) if split == "train")
    # A class needs a document to train on and one for the meta set; classes in order of size.
    classes = {label: k for k, (label, n) in enumerate(sorted(sizes.items(), key=lambda s: (-s[1], s[0]))) if n >= 2}
    rows = [i for i, label in enumerate(table["label"]) if label in classes]
    y = np.array([classes[table["label"][i]] for i in rows])
    return [table["text"][i] for i in rows], y, np.array([table["split"][i] for i in rows]), list(classes)


def reuters(path: str, *, meta_per_class: int = 10, seed: int = 0) -> Scenario:
    """Texts with a long tail of their own, such as Reuters R52, scored by the mean accuracy of classes.

    Args:
        path: Parquet file with the columns ``text``, ``label`` and ``split`` ("train" or "test").
        meta_per_class: training documents for the meta set; half of a class that has no more than so many.
        seed: of the draw.
    """
    all_texts, labels, split, classes = read_reuters(path)
    rows_of = {name: np.flatnonzero(split == name) for name in ("train", "test")}
    y, test_y = (torch.from_numpy(labels[rows]) for rows in rows_of.values())
    ids, size = encode_texts({name: [all_texts[i] for i in rows] for name, rows in rows_of.items()}, 200)
    with warnings.catch_warnings():  # the tail's classes give half of their rows
        warnings.simplefilter("ignore", UserWarning)
        meta, rest = balanced_meta_split(y, meta_per_class, seed=seed, short="half")
    counts = torch.bincount(y[rest], minlength=len(classes)).tolist()
    score = class_scores(counts)
    macro_first = lambda p, s: {"macro_accuracy": score(p, s)["macro_accuracy"], **score(p, s)}  # noqa: E731
    return Scenario(
        "long_tail_text", len(classes), Samples(ids["train"][rest], y[rest]), Samples(ids["train"][meta], y[meta]),
        Samples(ids["test"], test_y), Settings("dan", 30, 32, "adamw", 1e-3, 0.01, (0.6, 0.85), 0.3, warmup_ratio=0.5),
        macro_first, lambda model: _text_network(model, size, len(classes), 200), class_names=classes,
    )  # fmt: skip


def _text_network(name: str, vocabulary_size: int, num_classes: int, max_words: int) -> nn.Module:
    if name == "dan":
        return AveragingNetwork(vocabulary_size, num_classes)
    if name == "distilbert":
        return SmallDistilBert(vocabulary_size, num_classes, max_words)
    raise ValueError(f"no network {name!r} for texts: use 'dan' or 'distilbert'.")


def comments(data: str | None = None, *, meta_per_group: int = 20, meta_from: str = "train", seed: int = 0) -> Scenario:
    """Toxic comments with overlapping identity groups (CivilComments' layout; Koh et al., 2021), words as inputs.

    Args:
        data: CSV in WILDS' layout, or ``None`` for a generated sample.
        meta_per_group: meta rows for each of the 16 groups; half of a group that has no more than so many.
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
    groups = len(GROUPS)
    settings = Settings("distilbert", 4 if data else 8, 32, "adamw", 3e-4, 0.01, (), warmup_ratio=0.25)
    return Scenario(
        "comments", 2, parts["train"], parts["meta"], parts["test"], settings,
        group_scores(groups, parts["train"].groups, 20), lambda model: _text_network(model, size, 2, length),  # type: ignore[arg-type]
        parts["val"], keep_best=True, class_names=("not toxic", "toxic"),
    )  # fmt: skip
