"""Gates: which training rows are kept, and how much they count, judged by their histories against those of the trusted rows.

A trusted row's label was checked and it is trained along with the rest, so the trusted rows show what a right label looks like
at any moment of training. One class for each form, found by name in :data:`GATES`.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .conformal import (
    GROUPS,
    LEAST_OF_A_CLASS,
    conformal_p_values,
    effective_number,
    right_label_probability,
    wilson_bound,
)
from .histories import Histories
from .shift import LEAST_SHARE, LEAST_Z, density_ratio, trusted_look_worse

__all__ = [
    "GATES",
    "AutoGate",
    "Gate",
    "HardGate",
    "LocalFdrGate",
    "conformal_p_values",
    "right_label_probability",
]

#: Where something is estimated from trusted rows, rather than one of them looked up, there must be so many.
LEAST_TRUSTED = 20


class Kind(NamedTuple):
    """How rows are compared by a score.

    Attributes:
        least: a class with so many trusted rows is compared with these, the others with those of all such classes.
        alike: right labels look much the same whatever their class, so that trusted rows of several classes count as if of one.
        z: standard errors by which p-values are raised.
    """

    least: int
    alike: bool
    z: float


#: A margin depends on how rare its class is; what says little is held to 90 %.
MARGIN = Kind(LEAST_OF_A_CLASS, False, 1.282)
#: With p-values of a hundred trusted rows, not of ten, the same bound is broken more often on clean data: 95 %.
NEARNESS = Kind(2 * LEAST_OF_A_CLASS, True, 1.645)


class Gate:
    """How far each training row is kept.

    Args:
        level: q in (0, 1): evidence that as large a share of right labels shows has no effect, or little; see each form.
        min_visits: rows seen less often are kept, and no reference.
        groups: whom a row is compared with, see :func:`~iada_plugin.perturbation.conformal.conformal_p_values`.

    Attributes:
        weighs: whether the trusted rows were found to be harder than the rest of their classes: rows were then weighed, instead of let
            go, by weights that stay (:mod:`~iada_plugin.perturbation.shift`).

    Raises:
        ValueError: naming the setting that is out of range.
    """

    weighs = False

    def __init__(self, level: float = 0.1, *, min_visits: int = 2, groups: str = "pooled") -> None:
        if not 0 < level < 1:
            raise ValueError(f"level={level} must be between 0 and 1, such as 0.1.")
        if min_visits < 1:
            raise ValueError(f"min_visits={min_visits} must be at least 1: a row that was never seen has no history.")
        if groups not in GROUPS:
            raise ValueError(f"groups={groups!r} must be one of {', '.join(map(repr, GROUPS))}.")
        self.level, self.min_visits, self.groups = level, min_visits, groups

    @property
    def least_trusted(self) -> int:
        """Trusted rows seen often enough that it takes before the gate has any effect."""
        return LEAST_TRUSTED

    @torch.no_grad()
    def refresh(self, histories: Histories, trusted: Tensor, known: Tensor | None = None) -> Tensor:
        """Weight of each row: ``[R]``, 1 to keep it and 0 to let it go; 1 for all where too few trusted rows were seen.

        Rows are judged by their margins or, where it is followed, by their nearness: by that of which trusted rows stand out more from
        the rest.

        Args:
            histories: of R rows.
            trusted: ``[T]`` numbers of the trusted rows, on the histories' device; none twice.
            known: ``[R]`` rows whose nearness says something; ``None``: all.
        """
        seen = histories.visits >= self.min_visits
        enough = seen[trusted].sum() >= self.least_trusted
        judged, kind, labels = seen, MARGIN, histories.label
        p = self.p_values(histories.margin, seen, trusted, labels, kind)
        if histories.nearness is not None:
            near = seen if known is None else seen & known
            by_nearness = self.p_values(histories.nearness, near, trusted, labels, NEARNESS)
            others = near.index_fill(0, trusted, False)
            # As whole numbers: the same on every process.
            near_total, total = ((2**24 * q[others]).long().sum() for q in (by_nearness, p))
            if bool(near_total < total):
                judged, kind, p = near, NEARNESS, by_nearness
        return torch.where(judged & enough, self.weight(p, judged, trusted, histories, kind), 1)

    def weight(self, p: Tensor, judged: Tensor, trusted: Tensor, histories: Histories, kind: Kind) -> Tensor:
        """Weight ``[R]`` of rows with these p-values ``[R]``, of which some are ``judged`` ``[R]``; given enough trusted rows."""
        raise NotImplementedError

    def p_values(self, score: Tensor, judged: Tensor, trusted: Tensor, labels: Tensor, kind: Kind) -> Tensor:
        """P-values ``[R]`` of the labels by this score ``[R]`` of the ``judged`` rows, with the gate's settings."""
        score = torch.where(judged, score, torch.nan)
        return conformal_p_values(score, trusted, labels=labels, groups=self.groups, least=kind.least)


class HardGate(Gate):
    """Lets rows go whose p-value is at most ``level``: about that share of right labels, too, and most wrong ones."""

    @property
    def least_trusted(self) -> int:
        """``1 / level``: with fewer no p-value is as small."""
        return math.ceil(1 / self.level - 1e-9)

    def weight(self, p: Tensor, judged: Tensor, trusted: Tensor, histories: Histories, kind: Kind) -> Tensor:
        """0 or 1."""
        return (p > self.level).to(histories.margin.dtype)


class LocalFdrGate(Gate):
    """Lets rows go whose label is probably wrong, and where there are such rows at all, also those of a p-value below ``level``.

    The p-values' null distribution is the trusted rows', which are few: each p-value is raised to its upper confidence bound (Wilson, 90
    or 95 %, see :class:`Kind`) first. On right labels nothing stands out of that bound, and the gate has no effect at all; where labels are wrong it works
    as the hard one does, without a share of them to be guessed.
    """

    #: A label that is right with at least this probability is kept.
    probability = 0.8
    #: Share of rows below it from which on there is evidence of wrong labels.
    evidence = 0.01

    def weight(self, p: Tensor, judged: Tensor, trusted: Tensor, histories: Histories, kind: Kind) -> Tensor:
        """0 or 1."""
        others = judged.index_fill(0, trusted, False)
        n = effective_number(histories.label, trusted, judged, kind.least if kind.alike else 0)
        # Half a row in the place of the whole one that a p-value adds: about the exact (Clopper-Pearson) bound.
        bound = wilson_bound(((p * (n + 1) - 0.5) / n).clamp(0, 1), n, kind.z)
        wrong = right_label_probability(bound, counted=others) < self.probability
        found = (wrong & others).sum() > self.evidence * others.sum()
        return 1 - (wrong | (found & (p < self.level))).to(p.dtype)


class AutoGate(LocalFdrGate):
    """Lets rows go as :class:`LocalFdrGate` does. Where that finds no wrong labels, and the trusted rows have smaller margins than the rest
    of their classes, it is another distribution that they are of: rows are then weighed by the ratio of the two (:mod:`.shift`). Once, for
    the rest of the run: later, rare rows have been learned, and look better.
    """

    def weight(self, p: Tensor, judged: Tensor, trusted: Tensor, histories: Histories, kind: Kind) -> Tensor:
        """0 or 1, or a density ratio with the mean 1."""
        weight = super().weight(p, judged, trusted, histories, kind)
        if (weight == 0).float().mean() > self.evidence:
            return weight
        margin = torch.where(histories.visits >= self.min_visits, histories.margin, torch.nan)
        share, z = trusted_look_worse(margin, trusted, histories.label)
        if share <= LEAST_SHARE or z <= LEAST_Z:
            return weight
        self.weighs = True
        warnings.warn(
            f"trusted rows look worse than the rest of their classes, in {100 * share:.0f} % of pairs (z = {z:.1f}): from now on rows are"
            " weighed by how much more often their like is found among the trusted ones. Right where these are balanced over groups;"
            " if they were picked because they look suspicious, draw them at random instead, or set gate='local_fdr'."
        )
        return density_ratio(margin, trusted, histories.label)


#: The forms, by name.
GATES: dict[str, type[Gate]] = {
    "auto": AutoGate,
    "hard": HardGate,
    "local_fdr": LocalFdrGate,
}
