"""How much rarer a history is among the training rows than among the trusted ones: a density ratio from one small classifier
(Sugiyama et al. 2012, "Density Ratio Estimation in Machine Learning")."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Standardised scores are cut off there, and rounded to one of so many steps: the fit then costs the same for any number of rows.
_RANGE, _STEPS = 3.0, 601


@torch.no_grad()
def density_ratio(
    score: Tensor,
    trusted: Tensor,
    labels: Tensor,
    *,
    l2: float = 1.0,
    caution: float = 1.0,
    top: float = 0.9,
) -> Tensor:
    """``min(1, r_i / r_top)``, r = p(score | trusted) / p(score | training): ``[R]``, near 0 where a score is rarely a trusted row's.

    A ridge-logistic fit of trusted against training rows on [1, m, m^2], m the standardised score within +-3. Both sides weigh
    their classes equally, and as much as there are trusted rows, so that neither class shares nor the training set's size enter.
    Rows without a score (NaN) or label (-1) have 1.

    Args:
        score: ``[R]`` of every training row, such as its mean margin.
        trusted: ``[T]`` numbers of the trusted rows, none twice.
        labels: ``[R]`` class indices, -1 where unknown.
        l2: penalty of the two slopes.
        caution: standard errors by which the ratio is raised, so that weak evidence has no effect.
        top: quantile of the ratio over the trusted rows that it is relative to, at least a ratio of 1.
    """
    known = torch.isfinite(score) & (labels >= 0)
    known_trusted = known[trusted]
    n = known.sum().clamp_min(2)
    mean = torch.where(known, score, 0).sum() / n
    spread = (torch.where(known, score - mean, 0).square().sum() / (n - 1)).sqrt().clamp_min(1e-6)
    scale = (_STEPS - 1) / (2 * _RANGE)
    place = ((score - mean) / spread).nan_to_num().clamp_(-_RANGE, _RANGE).add_(_RANGE).mul_(scale).round_().long()
    counts = _counts(place, trusted, labels.long().clamp_min(0), known).cpu().numpy()  # the one wait
    m = np.linspace(-_RANGE, _RANGE, _STEPS)
    log_ratio, error = _fit(np.stack([np.ones_like(m), m, m * m], axis=1), *_balanced(counts), l2)
    places = place[trusted][known_trusted].cpu().numpy()
    best = max(0.0, float(np.quantile(log_ratio[places], top))) if len(places) else 0.0
    ratio = np.exp(np.clip(log_ratio + caution * error - best, -8, 0))
    return torch.where(known, torch.from_numpy(ratio).to(score)[place], 1)


def _counts(place: Tensor, trusted: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Rows of each class at each place: ``[2, C, B]``, of the training set without the trusted rows and of these. Whole numbers:
    the same in every process."""
    num_classes = int(labels.max()) + 1
    size = num_classes * _STEPS
    cell = torch.where(known, labels * _STEPS + place, size)  # the last one is of no use
    every, reference = (
        torch.zeros(size + 1, dtype=torch.long, device=c.device).index_add_(0, c, torch.ones_like(c))
        for c in (cell, cell[trusted])
    )
    return torch.stack([every - reference, reference])[:, :-1].view(2, num_classes, _STEPS)


def _balanced(counts: np.ndarray) -> np.ndarray:
    """``[2, B]``: each class weighs the same within its side, and both sides as much as there are trusted rows."""
    of_class = counts.sum(axis=2, keepdims=True)  # [2, C, 1]
    shares = (counts / np.maximum(of_class, 1)).sum(axis=1)
    return shares / np.maximum((of_class > 0).sum(axis=1), 1) * counts[1].sum()


def _fit(x: np.ndarray, train: np.ndarray, reference: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Logit ``[B]`` of being trusted at inputs ``x`` ``[B, 3]`` under weights ``[B]`` of both sides, and its standard error."""
    penalty = np.diag([1e-3, l2, l2])
    slopes = np.zeros(3)
    weight = train + reference
    curvature = penalty
    for _ in range(15):  # Newton
        p = 1 / (1 + np.exp(-np.clip(x @ slopes, -30, 30)))
        curvature = (x * (weight * p * (1 - p))[:, None]).T @ x + penalty
        slopes = slopes - np.linalg.solve(curvature, x.T @ (weight * p - reference) + penalty @ slopes)
    variance = ((x @ np.linalg.inv(curvature)) * x).sum(axis=1)
    return x @ slopes, np.sqrt(np.maximum(variance, 0))
