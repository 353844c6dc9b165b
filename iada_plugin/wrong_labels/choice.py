"""Which of several margins of the same rows tells most."""

from __future__ import annotations

import torch
from torch import Tensor


def standing_out(margin: Tensor, trusted: Tensor, labels: Tensor) -> Tensor:
    """For each trusted row the share of the other rows of its class that have a smaller margin: ``[T]``, 1/2 on average where no
    label is wrong. With a share w of wrong labels and AUROC A of the ranking by margin the mean is (1 - w) / 2 + w A.

    Args:
        margin: ``[R]``; NaN where a row was not seen.
        trusted: ``[R]`` bool.
        labels: ``[R]`` class indices.
    """
    found = torch.full(margin.shape, 0.5, dtype=torch.double)
    seen = torch.isfinite(margin)
    for label in labels[trusted & seen].unique():
        own = seen & (labels == label)
        others = margin[own & ~trusted].sort().values
        reference = margin[own & trusted].contiguous()
        below = torch.searchsorted(others, reference) + torch.searchsorted(others, reference, right=True)
        found[own & trusted] = below.double() / (2 * max(len(others), 1))
    return found[trusted]


def best_of(margins: Tensor, trusted: Tensor, labels: Tensor) -> int:
    """The first of S margins ``[S, R]`` in which trusted rows stand out as well as in any, but for a standard error.

    One choice for all rows, since margins of different models are not comparable. That the trusted rows which p-values refer to have
    a say in it is a bias of the order of that error, and only where the first is not good enough.
    """
    scores = torch.stack([standing_out(m, trusted, labels) for m in margins])  # [S, T]
    behind = scores[scores.mean(dim=1).argmax()] - scores
    error = behind.std(dim=1) / max(scores.shape[1], 2) ** 0.5
    return int((behind.mean(dim=1) <= error.nan_to_num()).nonzero()[0])
