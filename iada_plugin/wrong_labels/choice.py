"""Which of several margins of the same rows tells right from wrong labels best, without a look at which rows are trusted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Margins are kept within so many nats: one wild value must not outweigh the others of a mean.
MARGIN_LIMIT = 20.0
_PARTS = 20


def marks() -> Iterator[int]:
    """The epochs 1, 2, 3, 5, 8, 13, ... up to which margins are averaged: early ones tell more where labels are learned by heart later on."""
    mark, following = 1, 2
    while True:
        yield mark
        mark, following = following, mark + following


def bimodality(margin: Tensor) -> float:
    """Sarle's coefficient of bimodality, ``(skewness^2 + 1) / kurtosis``: 1/3 of a normal distribution, 5/9 of a uniform one, up to 1
    for two points. Right and wrong labels are the two modes: of the epochs of a run it is highest where they are furthest apart.

    Args:
        margin: ``[R]``; NaN where a row was not seen.
    """
    z = margin[torch.isfinite(margin)].double()
    if len(z) < 2:  # of an epoch in which hardly a row was seen
        return 0.0
    z = z - z.mean()
    z = z / z.square().mean().sqrt().clamp_min(1e-12)
    return float((z.pow(3).mean().square() + 1) / z.pow(4).mean().clamp_min(1e-12))


def best_of(margins: Tensor, slack: float = 0.0) -> int:
    """The most bimodal of S margins ``[S, R]``; or the first that is behind by no more than ``slack`` standard errors.

    Trusted rows have the same part in the choice as all others, so that they stay exchangeable with the right labels.
    """
    parts = torch.arange(margins.shape[1]) % _PARTS
    scores = torch.tensor([[bimodality(m[parts == k]) for k in range(_PARTS)] for m in margins])  # [S, parts]
    behind = scores[scores.mean(dim=1).argmax()] - scores
    error = behind.std(dim=1) / _PARTS**0.5
    return int((behind.mean(dim=1) <= slack * error + 1e-12).nonzero()[0])
