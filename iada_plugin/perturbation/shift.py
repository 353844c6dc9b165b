"""Are the trusted rows harder than the rest of their classes? Then they come from elsewhere: where groups are balanced among them and
not in training, say, and a rare group has small margins. Training rows are then weighed by how much more often rows like them are
found among the trusted ones (importance weighting for covariate shift; Shimodaira 2000), in the one dimension that tells: the margin.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .conformal import LEAST_OF_A_CLASS, conformal_p_values, grenander

#: Standard errors by which trusted rows have to look worse than chance has it, and the share of pairs in which they must.
LEAST_Z, LEAST_SHARE = 3.0, 0.6
_UNIT = 2**20


class _Ranks:
    """Rows among the trusted rows of their classes, where these are ten or more."""

    def __init__(self, score: Tensor, trusted: Tensor, labels: Tensor) -> None:
        known = torch.isfinite(score) & (labels >= 0)
        self.label = labels.long().clamp_min(0)
        size = int(self.label.max()) + 1
        self.reference = torch.zeros(size, dtype=torch.long, device=score.device)  # [C] trusted rows
        self.reference.index_add_(0, self.label[trusted], known[trusted].long())
        self.compared = known & (self.reference >= LEAST_OF_A_CLASS)[self.label]
        self.others = self.compared.index_fill(0, trusted, False)
        self.of = self.reference[self.label]  # [R]
        self._score, self._trusted, self._labels = score, trusted, labels

    def no_better(self, sign: float = 1.0) -> Tensor:
        """Trusted rows but itself that look no better (or, with -1, no worse) than a row: ``[R]``, whole numbers."""
        p = conformal_p_values(sign * self._score, self._trusted, labels=self._labels, groups="class")
        return (p * (self.of + 1)).round().long() - 1


def trusted_look_worse(score: Tensor, trusted: Tensor, labels: Tensor) -> tuple[float, float]:
    """Whether trusted rows look worse than other rows of their class: the share of pairs in which they do, ties half, and by how many
    standard errors this is above a half (Mann and Whitney 1947, over the classes in proportion to their rows).

    Classes with fewer than ten trusted rows do not count; without any other class the result is ``(0.5, 0.0)``.

    Args:
        score: ``[R]`` of every training row, such as its mean margin; NaN where unknown.
        trusted: ``[T]`` numbers of the trusted rows.
        labels: ``[R]`` class indices, -1 where unknown.
    """
    ranks = _Ranks(score, trusted, labels)
    size = len(ranks.reference)
    n = torch.zeros(size, dtype=torch.long, device=score.device)
    n.index_add_(0, ranks.label, ranks.others.long())
    if not n.any():
        return 0.5, 0.0
    lead = (ranks.no_better() - ranks.no_better(-1.0)).double() / (2 * ranks.of.clamp_min(1))  # above a half, [R]
    # Added up as whole numbers: the same on every process.
    total = torch.where(ranks.others, (lead * _UNIT).round().long(), 0).sum().double() / _UNIT
    m, n = ranks.reference.double().clamp_min(1), n.double()
    error = (n * (m + n + 1) / (12 * m)).sum().sqrt()
    return 0.5 + float(total / n.sum()), float(total / error)


def density_ratio(score: Tensor, trusted: Tensor, labels: Tensor, *, limit: float = 10.0) -> Tensor:
    """Density of the trusted rows over that of all, at each row's score among the rows of its class: ``[R]``, with the mean 1 in each
    class. 1 for rows without a score, and in classes with fewer than ten trusted rows.

    The trusted rows of a class cut the scores into intervals that one of them is as likely to fall into as into any other. How many rows of
    the class each interval holds, made to rise with the score, is the inverse of the ratio.

    Args:
        score, trusted, labels: see :func:`trusted_look_worse`.
        limit: at most so many times as much.
    """
    ranks = _Ranks(score, trusted, labels)
    interval = ranks.of - 1 - ranks.no_better(-1.0) + ranks.others.long()  # trusted rows below, 0 .. m
    last = (ranks.reference + 1).cumsum(0)  # [C] the intervals of all classes, one class after the other
    key = (last - ranks.reference - 1)[ranks.label] + interval.clamp_min(0)
    count = torch.zeros(int(last[-1]), dtype=torch.long, device=score.device)
    counts = count.index_add_(0, key, ranks.compared.long()).cpu().numpy()
    ratios = np.ones(len(counts))
    for m, end in zip(ranks.reference.tolist(), last.tolist(), strict=True):
        own = slice(end - m - 1, end)
        n = counts[own].sum()
        if m < LEAST_OF_A_CLASS or not n:
            continue
        density = grenander(counts[own][::-1])[::-1] * (m + 1) / n
        ratio = 1 / np.maximum(density, 1 / limit)
        ratios[own] = ratio * n / (ratio * counts[own]).sum()
    found = torch.from_numpy(ratios).to(score)[key]
    return torch.where(ranks.compared, found, 1)
