"""`find_wrong_labels`: from margins and trusted rows to a list of wrong labels with a bounded share of false alarms."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.meta import as_labels
from ..data.trusted import check_trusted_rows
from ..perturbation.conformal import class_share_weights, conformal_p_values
from ..perturbation.histories import margin_and_other
from ..runtime.labels import ordered_names
from .choice import MARGIN_LIMIT, best_of, marks
from .result import WrongLabels, check_level

#: Within a class's own trusted rows only where it has as many.
LEAST_OF_A_CLASS = 20
COMPARE = ("auto", "pooled", "weighted", "class")
#: Trusted rows whose class shares are by so many standard deviations off those of the data were not drawn at random from all of it.
_UNLIKELY = 4.0


def find_wrong_labels(
    labels: Any,
    trusted_rows: Any,
    *,
    checked_rows: Any = None,
    logits: Any = None,
    pred_probs: Any = None,
    margins: Any = None,
    suggested: Any = None,
    false_alarms: float = 0.1,
    adaptive: bool = False,
    compare: str = "auto",
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> WrongLabels:
    """Which labels are wrong, given rows whose label was checked: a list with a bounded share of false alarms.

    A trusted row that was treated as all others is exchangeable with the rows whose label is right, so its margin shows what to
    expect of a right label: p = (1 + trusted rows that look no better) / (1 + trusted rows). The list holds the rows that
    Benjamini and Hochberg's procedure selects: on average over draws of the trusted rows, at most ``false_alarms`` of it are right
    labels (Bates et al. 2023, "Testing for outliers with conformal p-values"). Nothing is promised where trusted rows are no fair
    sample of the right labels, or were treated differently: trained on more often, checked because they looked easy.

    Give one of ``logits``, ``pred_probs`` and ``margins``, of trusted rows and all others alike.

    Args:
        labels: ``[R]`` class indices, as given (list, array, tensor or column).
        trusted_rows: ``[T]`` row numbers, or ``[R]`` bool, of rows whose label was checked and found right, drawn at random.
        checked_rows: ``[K]`` row numbers, or ``[R]`` bool, of further rows that were looked at, such as those of an earlier list: they
            are not judged again, and no reference, since nobody drew them at random.
        logits: ``[R, C]``, or ``[E, R, C]`` of E epochs; NaN where a row was not seen. Margins are averaged up to that epoch after
            which they are the most bimodal.
        pred_probs: ``[R, C]`` probabilities out of sample (by cross-validation), as cleanlab takes them.
        margins: ``[R]``, or ``[E, R]`` of E epochs: own logit less the largest other one.
        suggested: with margins: ``[R]`` class of the largest other logit.
        false_alarms: level of the list, in (0, 1).
        adaptive: list more by an estimate of the share of right labels (Storey et al., 2004); its level is kept approximately.
        compare: whom a label is compared with: all trusted rows ("pooled"); these, weighted by the classes' shares of the data
            ("weighted"); those of its class, where it has 20 or more ("class"): the promise then holds within each class, and it
            takes many more trusted rows; or "auto": pooled where the trusted rows' class shares are about those of the data, else
            weighted.
        class_names: ``[C]``, or a dict of class to name.

    Raises:
        ValueError: none or several of the inputs, shapes that do not fit, values out of range, or so few trusted rows that nothing
            could ever be listed at this level.

    Example:
        >>> margins = np.array([3.0, 2.5, -2.0, 2.8] + [2.0 + k / 100 for k in range(100)])
        >>> found = find_wrong_labels([0, 1] * 52, range(4, 104), margins=margins, false_alarms=0.5)
        >>> found.rows.tolist(), round(float(found.p_value[2]), 3)
        ([2], 0.01)
    """
    y = torch.from_numpy(as_labels(labels))
    margin, other = _margins(y, logits, pred_probs, margins, suggested)
    return judge(y, trusted_rows, margin, other, false_alarms, adaptive, compare, class_names, checked_rows)


def judge(
    y: Tensor,
    trusted_rows: Any,
    margins: Tensor,
    other: Tensor,
    false_alarms: float = 0.1,
    adaptive: bool = False,
    compare: str = "auto",
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    checked_rows: Any = None,
) -> WrongLabels:
    """:func:`find_wrong_labels` of labels ``[R]``, by the most bimodal one of S margins ``[S, R]``."""
    check_level(false_alarms)
    if compare not in COMPARE:
        raise ValueError(f"compare={compare!r} must be one of {', '.join(map(repr, COMPARE))}.")
    labels = y.numpy()
    if (y == y[0]).all():
        raise ValueError(f"all labels are of class {int(y[0])}: there is no other one that they could be.")
    num_classes = int(max(y.max(), other.max())) + 1
    names = _names(class_names, num_classes)
    rows = check_trusted_rows(trusted_rows, len(labels), labels)
    trusted = torch.zeros(len(labels), dtype=torch.bool)
    trusted[rows] = True
    checked = trusted | _checked(checked_rows, len(labels))
    if checked.all():
        raise ValueError(f"all {len(labels)} rows are checked: there is nothing left to judge.")
    margin = margins[best_of(margins) if len(margins) > 1 else 0]
    used = rows[torch.isfinite(margin)[rows]]
    check_enough(len(used), false_alarms)
    how = _comparison(compare, y, rows)
    pooled: tuple[int, ...] = ()
    if how == "class":
        count = np.bincount(labels[used.numpy()], minlength=num_classes)
        pooled = tuple(
            np.flatnonzero((count < LEAST_OF_A_CLASS) & (np.bincount(labels, minlength=num_classes) > 0)).tolist()
        )
        if pooled:
            shown = ", ".join(names[c] for c in pooled[:10]) + (
                f" and {len(pooled) - 10} more" if len(pooled) > 10 else ""
            )
            warnings.warn(
                f"{shown}: fewer than {LEAST_OF_A_CLASS} trusted rows, so that these classes are compared with the trusted rows of all"
                " such classes. Check more of them for a promise within each."
            )
    p = conformal_p_values(
        margin, rows, labels=y, groups="auto" if how == "class" else "pooled", least=LEAST_OF_A_CLASS,
        weights=class_share_weights(y, rows).to(margin) if how == "weighted" else None,
    )  # fmt: skip
    return WrongLabels(
        label=labels, suggested=other.numpy(), margin=margin.numpy(), p_value=p.numpy(), trusted=trusted.numpy(), checked=checked.numpy(),
        false_alarms=float(false_alarms), adaptive=adaptive, compared=how, pooled_classes=pooled, class_names=names,
    )  # fmt: skip


def _checked(rows: Any, num_rows: int) -> Tensor:
    """``[R]`` bool."""
    found = torch.zeros(num_rows, dtype=torch.bool)
    given = torch.as_tensor([] if rows is None else np.asarray(rows))
    if given.numel() and not (given.dtype == torch.bool and not given.any()):
        try:
            found[check_trusted_rows(given, num_rows)] = True
        except ValueError as error:
            raise ValueError(
                f"checked_rows={given.tolist()!r:.80}: {str(error).replace('trusted row', 'row')}"
            ) from error
    return found


def trusted_rows_needed(false_alarms: float = 0.1, wrong_share: float = 0.1) -> int:
    """Trusted rows it takes at least before a list of this level can hold anything, if this share of all labels is wrong.

    The smallest p-value, 1 / (T + 1), must be at most ``false_alarms * wrong_share``. With twice as many the list holds most of
    what stands out.

    Raises:
        ValueError: values outside (0, 1).

    Example:
        >>> trusted_rows_needed(0.1, 0.4), trusted_rows_needed(0.1, 0.02)
        (24, 499)
    """
    check_level(false_alarms)
    if not 0 < wrong_share <= 1:
        raise ValueError(f"wrong_share={wrong_share} must be in (0, 1]: the share of all labels that may be wrong.")
    return math.ceil(1 / (false_alarms * wrong_share) - 1 - 1e-9)


def check_enough(trusted: int, false_alarms: float) -> None:
    """So many trusted rows can list something at this level.

    Raises:
        ValueError: they cannot, with the number that it takes.
    """
    check_level(false_alarms)
    if 1 / (trusted + 1) > false_alarms:
        raise ValueError(
            f"with {trusted} trusted rows no p-value is below {1 / (trusted + 1):.3f}, so that nothing can be listed at"
            f" false_alarms={false_alarms}: check at least {trusted_rows_needed(false_alarms, 0.2)} rows (enough where a fifth of the"
            f" labels is wrong; {trusted_rows_needed(false_alarms, 0.02)} for one in fifty), or raise the level."
        )


def _margins(y: Tensor, logits: Any, pred_probs: Any, margins: Any, suggested: Any) -> tuple[Tensor, Tensor]:
    """Margins ``[S, R]`` to choose from, and the class of the largest other logit ``[R]``."""
    given = [n for n, v in (("logits", logits), ("pred_probs", pred_probs), ("margins", margins)) if v is not None]
    if len(given) != 1:
        raise ValueError(f"give one of logits=, pred_probs= and margins=; got {', '.join(given) or 'none'}.")
    n = len(y)
    if margins is not None:
        found = _floats(margins, "margins")
        if found.dim() not in (1, 2) or found.shape[-1] != n:
            raise ValueError(f"margins have shape {list(found.shape)}: pass [{n}], or [E, {n}] of E epochs.")
        other = y if suggested is None else torch.as_tensor(np.asarray(suggested)).long()
        if other.shape != y.shape:
            raise ValueError(f"suggested has shape {list(other.shape)}: pass [{n}], a class for each row.")
        return (found[None] if found.dim() == 1 else _means(found)), other
    values = _floats(logits if pred_probs is None else pred_probs, given[0])
    values = values[None] if values.dim() == 2 else values
    if values.dim() != 3 or values.shape[1] != n or values.shape[2] < 2 or (pred_probs is not None and len(values) > 1):
        more = f", or [E, {n}, C] of E epochs" if pred_probs is None else ""
        raise ValueError(f"{given[0]} have shape {list(values.shape[-2:])} for {n} labels: pass [{n}, C]{more}.")
    if int(y.max()) >= values.shape[2]:
        raise ValueError(f"label {int(y.max())} has no column: {given[0]} are of {values.shape[2]} classes.")
    if pred_probs is not None:
        seen = values.isfinite().all(dim=2)
        if (values[seen] < 0).any() or ((values[seen].sum(dim=1) - 1).abs() > 1e-2).any():
            raise ValueError("pred_probs must be probabilities, each row with a sum of 1; for logits there is logits=.")
        values = values.clamp_min(1e-9).log()
    found = torch.stack([margin_and_other(v, None, y, MARGIN_LIMIT)[0] for v in values])
    return _means(found), margin_and_other(values.nanmean(dim=0), None, y)[1]


def _means(margins: Tensor) -> Tensor:
    """Means of margins ``[E, R]`` up to the epochs 1, 2, 3, 5, 8, 13, ... and the last: ``[S, R]``."""
    ends = [*itertools.takewhile(lambda end: end < len(margins), marks()), len(margins)]
    return torch.stack([margins[:e].clamp(-MARGIN_LIMIT, MARGIN_LIMIT).nanmean(dim=0) for e in ends])


def _floats(values: Any, name: str) -> Tensor:
    try:
        found = (
            values.detach().cpu().double()
            if isinstance(values, Tensor)
            else torch.as_tensor(np.asarray(values, dtype=np.float64))
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are no numbers ({error}).") from error
    if found.isinf().any():
        raise ValueError(f"{name} have infinite values; NaN stands for a row that was not seen.")
    return found


def _names(class_names: Any, num_classes: int) -> tuple[str, ...]:
    if class_names is None:
        return tuple(map(str, range(num_classes)))
    class_names = ordered_names(class_names)
    if len(class_names) < num_classes:
        raise ValueError(f"class_names has {len(class_names)} names, and labels go up to {num_classes - 1}.")
    return tuple(class_names)


def _comparison(compare: str, labels: Tensor, rows: Tensor) -> str:
    if compare != "auto":
        return compare
    size = int(labels.max()) + 1
    expected = torch.bincount(labels, minlength=size).double() * len(rows) / len(labels)
    drawn = torch.bincount(labels[rows], minlength=size)[expected > 0]
    expected = expected[expected > 0]
    # Pearson's statistic, against its mean and deviation where the rows are drawn at random.
    distance, freedom = float(((drawn - expected).square() / expected).sum()), len(expected) - 1
    return "pooled" if distance <= freedom + _UNLIKELY * (2 * freedom) ** 0.5 else "weighted"
