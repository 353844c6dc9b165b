"""Does a label look like the right ones? P-values of training rows against trusted rows, whose labels were checked and which
are trained along with the rest, and the share of right labels at each p-value.

A trusted row is exchangeable with the training rows whose label is right (within its class), so among these
p = (1 + trusted rows that look no better) / (1 + trusted rows) is at most t with probability at most t (Vovk et al. 2005; Bates
et al. 2023, "Testing for outliers with conformal p-values").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: A class with so many trusted rows has p-values of its own; the others share theirs.
LEAST_OF_A_CLASS = 10
_UNIT = 2**32
#: What ``groups`` may be.
GROUPS = ("pooled", "class", "auto")


@torch.no_grad()
def conformal_p_values(
    score: Tensor,
    trusted: Tensor,
    *,
    labels: Tensor | None = None,
    groups: str = "pooled",
    weights: Tensor | None = None,
    least: int = LEAST_OF_A_CLASS,
) -> Tensor:
    """``p_i = (1 + #{trusted k != i: score_k <= score_i}) / (1 + #trusted)``: ``[R]``, small for a suspect label.

    Trusted rows fall below a level as often as right labels do (within one in so many): were the number of them in the denominator one
    less for a trusted row, a gate would let go of fewer of these, they would be trained on more, and show too much. Rows without a score (NaN) have p = 1 and are no reference.

    Args:
        score: ``[R]`` of every training row; low for a wrong label, such as its mean margin.
        trusted: ``[T]`` numbers of the trusted rows, none twice.
        labels: ``[R]`` class indices, -1 where unknown (p = 1 then, unless pooled); needed for ``groups`` other than "pooled".
        groups: whom a row is compared with: all trusted rows ("pooled"), those of its class ("class"; without any p = 1), or those
            of its class if they are ``least`` or more, else all of the classes with fewer ("auto").
        weights: ``[R]`` positive; row k counts as ``weights[k]`` instead of 1, in its own p-value too. See
            :func:`class_share_weights`.
        least: of "auto".

    Raises:
        ValueError: ``groups`` is none of the three, or needs labels.
    """
    if groups not in GROUPS:
        raise ValueError(f"groups={groups!r} must be one of {', '.join(map(repr, GROUPS))}.")
    if groups != "pooled" and labels is None:
        raise ValueError(f"groups={groups!r} compares rows within classes: pass labels=, or groups='pooled'.")
    known = torch.isfinite(score)
    group, num_groups = None, 1
    if groups != "pooled":
        assert labels is not None
        known = known & (labels >= 0)
        group, num_groups = _groups(labels.long().clamp_min(0), trusted, known, least if groups == "auto" else 0)
    # Within a group the order of scores is that of their ranks among all trusted rows: group and rank make one whole number.
    score = torch.where(known, score, torch.inf)
    span = trusted.shape[0] + 1
    key = torch.searchsorted(score[trusted].sort().values, score, right=True)
    key = key if group is None else key.add_(group, alpha=span)
    unseen = num_groups * span
    reference, order = torch.where(known[trusted], key[trusted], unseen).sort()
    # Weights add up as whole numbers, exactly and alike on every device.
    own = torch.full_like(order, _UNIT) if weights is None else (weights[trusted][order] * _UNIT).round().long()
    total = torch.cat([own.new_zeros(1), own.cumsum(0)])  # of the first k of the reference
    edges = total[torch.searchsorted(reference, torch.arange(0, unseen + 1, span, device=key.device))]
    start, all_of = edges[:-1], edges.diff()  # [G]
    if unseen < key.shape[0]:  # fewer keys than rows: look each up once
        below = total[torch.searchsorted(reference, torch.arange(unseen, device=key.device), right=True)][key]
    else:
        below = total[torch.searchsorted(reference, key, right=True)]
    below = (below - (start if group is None else start[group])).to(score.dtype) / _UNIT
    rest = all_of.to(score.dtype) / _UNIT
    own = torch.ones_like(score) if weights is None else weights.to(score.dtype)
    below = below + own.index_fill(0, trusted, 0)  # a trusted row is in the reference, and counted there
    p = below / (own + (rest if group is None else rest[group]))
    return torch.where(known, p, 1)


def _groups(labels: Tensor, trusted: Tensor, known: Tensor, least: int) -> tuple[Tensor, int]:
    """The group ``[R]`` of each row, and how many there may be: its class, or, where that has few trusted rows, one for all such
    classes."""
    num_classes = int(labels.max()) + 1
    if not least:
        return labels, num_classes
    count = torch.zeros(num_classes, dtype=torch.long, device=labels.device)
    count.index_add_(0, labels[trusted], known[trusted].long())
    own = torch.arange(num_classes, device=labels.device)
    return torch.where(count >= least, own, num_classes)[labels], num_classes + 1


def class_share_weights(labels: Tensor, trusted: Tensor) -> Tensor:
    """Weights that give the trusted rows the training set's class shares: ``[R]``, a row's is the share of its class in the
    training set over that in the trusted rows (weighted conformal prediction; Tibshirani et al. 2019).

    A class without trusted rows counts as if it had one. Rows without a label (-1) weigh 1.

    Args:
        labels: ``[R]`` class indices.
        trusted: ``[T]`` numbers of the trusted rows.
    """
    known, labels = labels >= 0, labels.long().clamp_min(0)
    count = torch.zeros(2, int(labels.max()) + 1, device=labels.device, dtype=torch.long)
    for side, (rows, counted) in enumerate(((labels, known), (labels[trusted], known[trusted]))):
        count[side].index_add_(0, rows, counted.long())
    train, reference = count.float()
    ratio = (train / train.sum().clamp_min(1)) / (reference.clamp_min(1) / reference.sum().clamp_min(1))
    return torch.where(known, ratio[labels], 1)


def effective_number(labels: Tensor, trusted: Tensor, seen: Tensor, least: int = 0) -> Tensor:
    """Trusted rows that a mean of per-class distributions, weighted by the training set's class shares, is as good as: ``[]``.

    ``1 / sum_c share_c^2 / n_c`` over the classes that have trusted rows; a thousand rows of one class say little of the others.

    Args:
        labels: ``[R]`` class indices, -1 where unknown.
        trusted: ``[T]`` numbers of the trusted rows.
        seen: ``[R]`` bool, which rows count.
        least: classes with fewer trusted rows are taken for one.
    """
    counted = seen & (labels >= 0)
    if least:
        labels, _ = _groups(labels.long().clamp_min(0), trusted, counted, least)
    size = int(labels.max()) + 1
    count = torch.zeros(2, max(size, 1), device=labels.device)
    labels = labels.long().clamp_min(0)
    count[0].index_add_(0, labels, counted.float())
    count[1].index_add_(0, labels[trusted], counted[trusted].float())
    train, reference = torch.where(count[1] > 0, count, 0)
    share = train / train.sum().clamp_min(1)
    return 1 / (share.square() / reference.clamp_min(1)).sum().clamp_min(1e-12)


def wilson_bound(share: Tensor, n: Tensor, z: float = 1.282) -> Tensor:
    """Upper confidence bound (Wilson, 1927) of shares ``[R]`` that were seen in ``n`` ``[]`` draws; 90 % one-sided by default."""
    centre = share + z * z / (2 * n)
    spread = z * (share * (1 - share) / n + z * z / (4 * n * n)).clamp_min(0).sqrt()
    return ((centre + spread) / (1 + z * z / n)).clamp(max=1)


def right_label_probability(p: Tensor, *, counted: Tensor | None = None, bins: int = 1000) -> Tensor:
    """Probability that a label is right, given its p-value: the local false discovery rate ``min(1, pi0 / f(p))``, ``[R]``.

    pi0, the share of right labels, is Storey's estimate at 1/2: twice the share of p-values above it, at most 1. f, the density
    of all p-values, is Grenander's estimate: the slope of the least concave majorant of their distribution function, which falls
    as p rises. An estimate, not a bound: the smallest p-values of clean data may look like a few wrong labels.

    Args:
        p: ``[R]`` in (0, 1].
        counted: ``[R]`` bool, the rows to learn both from; ``None``: all.
        bins: the p-values are rounded up to a multiple of ``1 / bins``. Right for T trusted rows: T + 1.

    Raises:
        ValueError: fewer than 2 bins.
    """
    if bins < 2:
        raise ValueError(f"bins={bins} must be at least 2.")
    place = (p * bins - 1e-3).ceil().long().clamp_(1, bins) - 1
    ones = torch.ones_like(place) if counted is None else counted.long()
    counts = torch.zeros(bins, dtype=torch.long, device=p.device).index_add_(0, place, ones).cpu().numpy()
    total = max(int(counts.sum()), 1)
    pi0 = min(1.0, 2 * float(counts[bins // 2 :].sum()) / total)
    density = grenander(counts) * bins / total
    probability = np.minimum(1, pi0 / np.maximum(density, 1e-12))
    return torch.from_numpy(probability).to(p)[place]


def grenander(counts: np.ndarray) -> np.ndarray:
    """Slopes ``[B]`` of the least concave majorant of the cumulative sums of ``counts`` ``[B]``, by pooling adjacent violators."""
    level: list[float] = []
    width: list[int] = []
    for count in counts.tolist():
        value, span = float(count), 1
        while level and level[-1] <= value:  # would rise: one step of their average
            last = width.pop()
            value, span = (value * span + level.pop() * last) / (span + last), span + last
        level.append(value)
        width.append(span)
    return np.repeat(level, width)
