"""Splitting a clean, balanced meta set off a data set."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..runtime.batches import changed_label
from ..runtime.labels import labels_of


def balanced_meta_split(
    labels: Sequence[int] | Any,
    per_group: int = 10,
    *,
    groups: Any = None,
    trusted: Any = None,
    seed: int = 0,
    short: str = "error",
) -> tuple[list[int], list[int]]:
    """Draw the same number of rows from every class, or group, and leave the rest.

    Args:
        labels: ``[N]`` class indices (list, array, tensor or column), or a data set that has them.
        per_group: rows to draw from each class, or from each group where ``groups`` is given.
        groups: ``[N]`` group indices, or ``[N, G]`` memberships (0 or 1) of groups that may overlap; a row drawn for one
            group counts for every group it belongs to. ``label * K + cluster`` balances over class and cluster.
        trusted: ``[N]`` whether a row's label is known to be right: only such rows are drawn. ``None``: all are.
        seed: of the draw.
        short: what to do with a group of fewer than ``per_group + 1`` rows: "error", or "half" to take half of its rows
            (at least one), with a warning.

    Returns:
        Sorted row indices of the meta set and of the rest; disjoint, together all rows.

    Raises:
        ValueError: wrong shapes, a ``per_group`` that is no whole number from 1 on, or too few rows.

    Example:
        >>> meta, rest = balanced_meta_split([0, 0, 0, 0, 1, 1], per_group=1)
        >>> len(meta), len(rest)
        (2, 4)
    """
    labels, per_group = as_labels(labels), whole_numbers("per_group", per_group, least=1)
    if short not in ("error", "half"):
        raise ValueError(f"short={short!r} must be 'error' or 'half'.")
    member = np.asarray(labels if groups is None else groups)
    if member.shape[0] != labels.shape[0] or member.ndim > 2:
        raise ValueError(f"groups must be [N] or [N, G] with N = {len(labels)}, got shape {list(member.shape)}.")
    if member.ndim == 1:
        names = np.unique(member)
        member = member[:, None] == names[None, :]
    else:
        names = np.arange(member.shape[1])
        member = member.astype(bool)
    clean = np.ones(len(labels), dtype=bool) if trusted is None else np.asarray(trusted).astype(bool)
    if clean.shape != labels.shape:
        raise ValueError(f"trusted must be [N] with N = {len(labels)}, got {list(clean.shape)}.")
    rng = np.random.default_rng(seed)
    taken = np.zeros(len(labels), dtype=bool)
    left = member.sum(axis=0)
    kind = "class" if groups is None else "group"
    # Rare groups first: what they need cannot be used up by others, and what they draw counts for the others.
    for column in np.argsort(member.sum(axis=0), kind="stable"):
        own = np.flatnonzero(member[:, column])
        rows = own[clean[own]]
        wanted = per_group
        if len(rows) < per_group or len(own) <= per_group:
            what = "rows" if trusted is None else f"rows, {len(rows)} of them trusted"
            message = f"{kind} {names[column]} has {len(own)} {what}: too few to draw {per_group} and leave one."
            if short == "error" or len(rows) < 1 or len(own) < 2:
                raise ValueError(message + " Draw fewer (per_group), merge it, or allow less with short='half'.")
            wanted = max(1, len(rows) // 2)
            warnings.warn(f"{message} {wanted} drawn.")
        missing = wanted - int(taken[rows].sum())
        for row in rng.permutation(rows[~taken[rows]]):
            if missing <= 0:
                break
            if (left[member[row]] > 1).all():  # no group may lose its last row
                taken[row], missing = True, missing - 1
                left -= member[row]
    return np.flatnonzero(taken).tolist(), np.flatnonzero(~taken).tolist()


def as_labels(data: Any) -> np.ndarray:
    """The labels ``[N]`` of an array, tensor, list, column or data set (see :func:`labels_of`).

    Raises:
        ValueError: labels that are no class indices, or not those that samples come with.
        TypeError: a data set whose labels cannot be read without loading its samples.
    """
    known = labels_of(data)
    column = hasattr(data, "column_name")
    if known is not None and not column and (wrong := changed_label(data, known)) is not None:
        raise ValueError(f"{wrong}: pass the labels that are trained on, as an array.")
    if known is None and isinstance(data, torch.utils.data.Dataset):
        raise TypeError(
            f"the labels of a {type(data).__name__} cannot be read without loading every sample: pass them as an array,"
            " or give the data set an attribute `targets`."
        )
    data = data.detach().cpu() if isinstance(data, torch.Tensor) else data
    labels = np.asarray(data if known is None else known)
    if labels.ndim == 1 and labels.size and labels.dtype.kind in "OUST":
        raise ValueError(
            f"labels must be class indices, got {str(labels[0])!r:.40}: names, labels = numpy.unique(labels, return_inverse=True) gives"
            " both."
        )
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iub":
        raise ValueError(
            f"labels must be a non-empty list of class indices, got {labels.dtype} of shape {list(labels.shape)}"
            + (": labels.astype(int) if they are whole numbers." if labels.dtype.kind == "f" else ".")
        )
    if labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {labels.min()}.")
    return labels.astype(np.int64)


def whole_numbers(name: str, values: Any, least: int = 0) -> Any:
    """``values``, a number or a list of them, as Python's whole numbers.

    Raises:
        ValueError: with the argument's ``name``: values that are fractions or below ``least``, or no numbers.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or not (np.isfinite(array) & (array >= least) & (array == np.floor(array))).all():
        wanted = "a whole number" if np.isscalar(values) else "a list of whole numbers"
        raise ValueError(f"{name}={values!r:.80} must be {wanted} >= {least}.")
    return array.astype(np.int64).tolist()


def class_counts(counts: Any, labels: np.ndarray, least: int = 0) -> list[int]:
    """``[C]`` counts for the classes of ``labels``, checked.

    Raises:
        ValueError: counts that are no whole numbers from ``least`` on, or fewer of them than classes.
    """
    numbers = whole_numbers("counts", counts, least)
    if not isinstance(numbers, list) or len(numbers) <= labels.max():
        raise ValueError(f"counts={counts!r:.80}: one is needed for every class, and labels go up to {labels.max()}.")
    return numbers


def check_share(name: str, value: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: a value outside [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be in [0, 1], such as 0.4 for 40 %.")
