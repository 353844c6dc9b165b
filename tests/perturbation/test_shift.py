"""Trusted rows that are harder than the rest: whether that is noticed, and what rows then count."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from iada_plugin.perturbation.shift import density_ratio, trusted_look_worse
from iada_plugin.perturbation.trusted import AutoGate

from .test_trusted import histories_of


def biased(n=4000, per_group=20, rare=0.1, gap=3.0, seed=0):
    """Scores, trusted rows, labels and which rows are of the rare group, whose scores are ``gap`` lower; trusted rows are balanced over both."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=draw)
    is_rare = torch.rand(n, generator=draw) < rare
    score = torch.randn(n, generator=draw) + 3 - gap * is_rare
    trusted = [
        torch.nonzero((labels == c) & (is_rare == g)).flatten()[:per_group] for c in (0, 1) for g in (False, True)
    ]
    return score.clamp(-8, 8), torch.cat(trusted).sort().values, labels, is_rare


def test_it_is_the_test_of_mann_and_whitney():
    score, trusted, labels, _ = biased()
    score = score.round()  # ties
    own, mask = labels == 0, torch.zeros(len(labels), dtype=torch.bool)
    mask[trusted] = True
    only = torch.where(own, labels, -1)
    share, z = trusted_look_worse(score, trusted, only)
    plain = mannwhitneyu(score[own & ~mask], score[own & mask], method="asymptotic", use_continuity=False)
    m, n = int((own & mask).sum()), int((own & ~mask).sum())
    assert share == pytest.approx(plain.statistic / (m * n), abs=1e-6)
    assert z == pytest.approx((plain.statistic / (m * n) - 0.5) / ((m + n + 1) / (12 * m * n)) ** 0.5, rel=1e-4)


def test_chance_stays_within_the_standard_error():
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(200):
        score, labels = torch.randn(1200, generator=draw), torch.randint(4, (1200,), generator=draw)
        found.append(trusted_look_worse(score, torch.randperm(1200, generator=draw)[:80].sort().values, labels)[1])
    assert abs(np.mean(found)) < 0.25 and 0.8 < np.std(found) < 1.2


def test_scores_that_are_all_at_the_limit_say_nothing():
    _, trusted, labels, _ = biased()
    assert trusted_look_worse(torch.full((4000,), 8.0), trusted, labels) == (0.5, 0.0)
    assert torch.allclose(density_ratio(torch.full((4000,), 8.0), trusted, labels), torch.ones(4000))


def test_a_rare_group_counts_as_much_as_among_the_trusted_rows():
    score, trusted, labels, is_rare = biased(n=20_000, per_group=200, gap=6.0)
    weight = density_ratio(score, trusted, labels)
    for c in (0, 1):
        assert float(weight[labels == c].mean()) == pytest.approx(1, abs=1e-4)
        # A tenth of the class in training, and a half of its trusted rows.
        assert float(weight[(labels == c) & is_rare].sum() / weight[labels == c].sum()) == pytest.approx(0.5, abs=0.05)
    by_score = weight[labels == 0][score[labels == 0].argsort()]
    assert (by_score.diff() <= 1e-6).all(), "no row counts more than one with a smaller margin"


def test_a_case_by_hand():
    """Ten trusted rows at 0, 1, ... 9; of thirty others ten lie below 4.5 and twenty above."""
    others = torch.cat([torch.linspace(0.1, 4.4, 10), torch.linspace(4.6, 8.9, 20)])
    score, trusted = torch.cat([torch.arange(10.0), others]), torch.arange(10)
    weight = density_ratio(score, trusted, torch.zeros(40, dtype=torch.long))
    assert float(weight.mean()) == pytest.approx(1, abs=1e-6)
    assert float(weight[10]) > 1 > float(weight[-1]) and weight.unique().numel() > 1


def test_classes_with_few_trusted_rows_are_left_alone():
    score, trusted, labels, _ = biased(per_group=4)
    assert trusted_look_worse(score, trusted, labels) == (0.5, 0.0)
    assert (density_ratio(score, trusted, labels) == 1).all()
    assert trusted_look_worse(score, trusted[:0], labels) == (0.5, 0.0)


def test_the_gate_weighs_and_says_so():
    score, trusted, labels, is_rare = biased()
    gate = AutoGate(0.2, groups="auto")
    with pytest.warns(UserWarning, match="look worse than the rest"):
        weight = gate.refresh(histories_of(score, labels), trusted)
    assert gate.weighs
    assert float(weight[is_rare].mean()) > 2 > 1 > float(weight[~is_rare].mean()) > 0.3


def test_wrong_labels_come_first():
    score, trusted, labels, _ = biased()
    wrong = torch.arange(4000) >= 2500
    score, trusted = torch.where(wrong, score - 8, score).clamp(-8, 8), trusted[trusted < 2500]
    gate = AutoGate(0.2, groups="auto")
    weight = gate.refresh(histories_of(score, labels), trusted)
    assert not gate.weighs and float(weight[wrong].mean()) < 0.3 and float(weight.max()) == 1


def test_few_rows_of_a_class_and_labels_that_are_unknown():
    score, trusted, labels, _ = biased()
    score[5], labels[6] = torch.nan, -1
    keep = trusted[(trusted != 5) & (trusted != 6)]
    weight = density_ratio(score, keep, labels)
    assert weight[5] == 1 and weight[6] == 1 and torch.isfinite(weight).all()
