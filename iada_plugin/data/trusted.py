"""Trusted rows: training rows whose labels were checked, trained along with the rest as the reference of a right label."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset


class JoinedDataset(ConcatDataset[Any]):
    """A training set and its trusted rows, one after the other. A transform that is set on it, as timm's ``create_loader`` does,
    is set on both: trusted rows have to be augmented as the rest."""

    @property
    def transform(self) -> Any:
        """Of the training set."""
        return self.datasets[0].transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, value: Any) -> None:
        for part in self.datasets:
            part.transform = value  # type: ignore[attr-defined]


def with_trusted(train: Any, clean: Any) -> tuple[Any, Tensor]:
    """Join a training set and a small set of checked samples, which are then trained on along with the rest.

    Args:
        train: a Hugging Face `Dataset`, a map-style torch data set, or a pair ``(inputs, labels)`` of arrays or tensors.
        clean: the samples whose labels were checked, of the same kind.

    Returns:
        The joined set, and the row numbers ``[T]`` of the checked samples in it.

    Raises:
        TypeError: the two are of different kinds, or cannot be read by row number.
        ValueError: one is empty, or their columns, types or shapes differ.

    Example:
        >>> (x, y), trusted = with_trusted((np.zeros((5, 2)), [0, 1, 0, 1, 0]), (np.ones((2, 2)), [0, 1]))
        >>> x.shape, trusted.tolist()
        ((7, 2), [5, 6])
    """
    for name, data in (("train", train), ("clean", clean)):
        if isinstance(data, IterableDataset) or type(data).__name__ in ("IterableDataset", "IterableDatasetDict"):
            raise TypeError(
                f"{name} is streamed ({type(data).__name__}): trusted rows are known by row number, which it has none of. Load it as"
                " a map-style data set."
            )
    pairs = [isinstance(d, tuple) and len(d) == 2 for d in (train, clean)]
    tables = [hasattr(d, "features") and hasattr(d, "with_format") for d in (train, clean)]
    maps = [hasattr(d, "__len__") and hasattr(d, "__getitem__") and not isinstance(d, Mapping) for d in (train, clean)]
    if all(pairs):
        joined, sizes = _join_pairs(train, clean)
    elif any(pairs) or not all(maps) or tables[0] != tables[1]:
        raise TypeError(
            f"train is a {type(train).__name__} and clean a {type(clean).__name__}: both must be Hugging Face Datasets, or map-style"
            " data sets, or pairs (inputs, labels)."
        )
    else:
        sizes = len(train), len(clean)
        _check_sizes(*sizes)
        joined = _join_tables(train, clean) if tables[0] else _join_maps(train, clean)
    return joined, torch.arange(sizes[0], sum(sizes))


def _check_sizes(train: int, clean: int) -> None:
    for name, size in (("train", train), ("clean", clean)):
        if not size:
            raise ValueError(f"{name} is empty: pass at least one sample, and for clean some of each class.")


def _join_pairs(train: Any, clean: Any) -> tuple[Any, tuple[int, int]]:
    parts = []
    for name, own, other in zip(("inputs", "labels"), train, clean, strict=True):
        own, other = (v if isinstance(v, (Tensor, np.ndarray)) else np.asarray(v) for v in (own, other))
        if isinstance(own, Tensor) != isinstance(other, Tensor):
            raise TypeError(f"the {name} of train are a {type(own).__name__}, those of clean a {type(other).__name__}: pass both as"
                            " tensors or both as arrays.")  # fmt: skip
        if not own.ndim or own.shape[1:] != other.shape[1:] or own.dtype != other.dtype:
            raise ValueError(
                f"the {name} of train are {own.dtype} {list(own.shape)}, those of clean {other.dtype} {list(other.shape)}: they may"
                " differ in the number of rows only."
            )
        parts.append((own, other))
    for name, (inputs, labels) in (("train", (parts[0][0], parts[1][0])), ("clean", (parts[0][1], parts[1][1]))):
        if len(inputs) != len(labels):
            raise ValueError(f"{name} has {len(inputs)} inputs and {len(labels)} labels.")
    sizes = len(parts[0][0]), len(parts[0][1])
    _check_sizes(*sizes)
    whole = (torch.cat(pair) if isinstance(pair[0], Tensor) else np.concatenate(pair) for pair in parts)
    return tuple(whole), sizes


def _join_maps(train: Any, clean: Any) -> JoinedDataset:
    # Addresses of functions and the like say nothing about what they do.
    own, other = (re.sub(r" at 0x\w+", "", repr(getattr(data, "transform", None))) for data in (train, clean))
    if own != other:
        warnings.warn(
            f"train is transformed by {own:.200} and clean by {other:.200}: trusted rows show what a right label looks like only if"
            " they are augmented as the rest. Give both the same transform."
        )
    return JoinedDataset([train, clean])


def _join_tables(train: Any, clean: Any) -> Any:
    from datasets import concatenate_datasets

    for one, other, (name, rest) in (
        (train, clean, ("train", "clean")),
        (clean, train, ("clean", "train")),
    ):
        if extra := sorted(set(one.features) - set(other.features)):
            raise ValueError(
                f"{name} has the columns {', '.join(extra)}, which {rest} has not: both need the same. Prepare them alike, or"
                f" remove_columns({extra})."
            )
    for column, kind in train.features.items():
        if clean.features[column] != kind:
            raise ValueError(
                f"the column {column!r} is {kind} in train and {clean.features[column]} in clean: use"
                " clean.cast(train.features), where the values mean the same."
            )
    # What the training set makes of its rows when they are read holds for the trusted rows, too.
    form = train.format
    plain = (train.with_format(None), clean.select_columns(list(train.features)).with_format(None))
    joined = concatenate_datasets(plain)
    joined.set_format(form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"])
    return joined


def check_trusted_rows(rows: Any, num_rows: int, labels: Any = None, num_classes: int | None = None) -> Tensor:
    """Row numbers of the trusted rows, checked and sorted: ``[T]`` int64.

    Args:
        rows: ``[T]`` row numbers, or ``[R]`` bool, which rows are trusted.
        num_rows: R, of the training set.
        labels: ``[R]`` labels of the training set, where they are known.
        num_classes: C; by default as many as ``labels`` go up to.

    Raises:
        ValueError: there are none, they are no whole numbers, out of range or repeated, a mask of another length, or all of one
            class where there are several.
    """
    try:
        found = torch.as_tensor(sorted(rows) if isinstance(rows, (set, frozenset)) else rows).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"trusted rows are no numbers ({error}): pass row numbers [T], or a mask [R].") from error
    if found.dtype == torch.bool:
        if found.shape != (num_rows,):
            raise ValueError(
                f"trusted rows are a mask of shape {list(found.shape)}; the training set has {num_rows} rows."
            )
        found = found.nonzero().flatten()
    if not found.numel():
        raise ValueError(
            "there are no trusted rows: pass the numbers of rows whose label was checked, some of each class."
        )
    if found.dim() != 1 or found.is_floating_point() or found.is_complex():
        raise ValueError(
            f"trusted rows are {found.dtype} {list(found.shape)}: pass row numbers, whole numbers [T], or a mask [R]."
        )
    found = found.long().sort().values
    if int(found[0]) < 0 or int(found[-1]) >= num_rows:
        wrong = int(found[0]) if int(found[0]) < 0 else int(found[-1])
        raise ValueError(
            f"trusted row {wrong} is out of range: the training set has {num_rows} rows, 0 to {num_rows - 1}."
        )
    if len(found) == num_rows and num_rows > 2 and int(found[-1]) == 1:
        raise ValueError("trusted rows are a mask of the numbers 0 and 1: pass it as bool, mask.astype(bool).")
    if (again := found[1:][found[1:] == found[:-1]]).numel():
        raise ValueError(f"trusted row {int(again[0])} is given twice: pass each row once.")
    if labels is not None:
        _check_classes(found, torch.as_tensor(labels).cpu().long(), num_rows, num_classes)
    return found


def _check_classes(rows: Tensor, labels: Tensor, num_rows: int, num_classes: int | None) -> None:
    if labels.shape != (num_rows,):
        raise ValueError(f"labels have shape {list(labels.shape)}; the training set has {num_rows} rows.")
    trained = set(labels.unique().tolist()) if num_classes is None else set(range(num_classes))
    present = set(labels[rows].unique().tolist())
    if len(present) == 1 and len(trained) > 1:
        raise ValueError(
            f"all {len(rows)} trusted rows are of class {present.pop()}, of {len(trained)} classes: they show what a right label"
            " looks like in no other class. Check some rows of each."
        )
    if missing := sorted(trained - present):
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        warnings.warn(
            f"no trusted row is of class {', '.join(map(str, missing[:10]))}{more}: the labels of these classes are judged by the"
            " trusted rows of others. Check some rows of each."
        )
