"""P-values against their definition, and what they promise."""

import numpy as np
import pytest
import scipy.stats
import torch

from iada_plugin.perturbation.conformal import (
    class_share_weights,
    conformal_p_values,
    grenander,
    right_label_probability,
)


def by_definition(score, trusted, groups=None, weights=None):
    """Row by row; ``groups`` ``[R]``: compared within it."""
    found = []
    for i, s in enumerate(score):
        w = [1.0] * len(score) if weights is None else weights
        reference = [k for k in trusted if not np.isnan(score[k]) and (groups is None or groups[k] == groups[i])]
        below = sum(w[k] for k in reference if k != i and score[k] <= s)
        found.append(1.0 if np.isnan(s) else (w[i] + below) / (w[i] + sum(w[k] for k in reference)))
    return torch.tensor(found, dtype=torch.float32)


def test_by_hand():
    score = torch.tensor([1.0, 2.0, 3.0, 0.5, 2.0, 9.0, torch.nan])
    found = conformal_p_values(score, torch.tensor([0, 1, 2]))
    # Trusted: 1, 2, 3, each one of those that are no better than itself. Then 0.5, 2 and 9; no score.
    torch.testing.assert_close(found, torch.tensor([1 / 4, 2 / 4, 3 / 4, 1 / 4, 3 / 4, 1, 1]))


@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_against_the_definition(weighted):
    score = torch.randint(12, (80,)).float()  # with ties
    score[torch.randperm(80)[:15]] = torch.nan
    trusted = torch.randperm(80)[:30]
    weights = torch.rand(80) + 0.1 if weighted else None
    expected = by_definition(score.numpy(), trusted.tolist(), weights=None if weights is None else weights.tolist())
    torch.testing.assert_close(conformal_p_values(score, trusted, weights=weights), expected)


def test_within_classes_against_the_definition():
    labels = torch.randint(4, (400,))
    labels[::50] = 4  # a class with few rows
    score = torch.randn(400) + labels
    trusted = torch.cat([(labels == c).nonzero()[:n, 0] for c, n in enumerate((25, 10, 9, 8, 3))])
    score[trusted[0]] = torch.nan  # 24 left
    by_class = conformal_p_values(score, trusted, labels=labels, groups="class")
    torch.testing.assert_close(by_class, by_definition(score.numpy(), trusted.tolist(), labels.tolist()))
    auto = conformal_p_values(score, trusted, labels=labels, groups="auto")
    groups = [c if c < 2 else 9 for c in labels.tolist()]
    torch.testing.assert_close(auto, by_definition(score.numpy(), trusted.tolist(), groups))


def test_a_class_without_trusted_rows_and_unknown_labels_are_not_suspect():
    found = conformal_p_values(
        torch.tensor([5.0, -9.0, -9.0]), torch.tensor([0]), labels=torch.tensor([0, 1, -1]), groups="class"
    )
    assert found.tolist() == [0.5, 1, 1]


def test_uniform_where_rows_are_exchangeable():
    """Over many draws, the p-value of a row that is one of the trusted rows' kind, and those of the trusted rows."""
    others, own = [], []
    for _ in range(2000):
        p = conformal_p_values(torch.randn(20), torch.arange(19))
        others.append(float(p[19]))
        own.append(float(p[7]))
    for found, n in ((others, 20), (own, 19)):  # on a grid of n values, each as probable
        counts = np.bincount(np.round(np.array(found) * 20).astype(int), minlength=21)[1 : n + 1]
        assert counts.sum() == 2000
        assert scipy.stats.chisquare(counts).pvalue > 1e-3
    smooth = np.array(others) - np.random.default_rng(0).random(len(others)) / 20
    assert scipy.stats.kstest(smooth, "uniform").pvalue > 1e-3


def test_class_shares():
    """Balanced trusted rows, a long tail in training, and scores that depend on the class: only weighted p-values are uniform."""
    torch.manual_seed(1)
    found, plain = [], []
    for _ in range(150):
        labels = torch.cat([torch.tensor([0, 1]).repeat_interleave(60), (torch.rand(200) < 0.1).long()])
        score = torch.randn(320) + 2.0 * labels
        trusted = torch.arange(120)
        weights = class_share_weights(labels, trusted)
        share = (labels == 1).float().mean()
        torch.testing.assert_close(weights[labels == 1], (share / 0.5).expand(int((labels == 1).sum())))
        found.append(float((conformal_p_values(score, trusted, weights=weights)[120:] <= 0.1).float().mean()))
        plain.append(float((conformal_p_values(score, trusted)[120:] <= 0.1).float().mean()))
    assert abs(np.mean(found) - 0.1) < 0.05 and np.mean(plain) > 0.15


def test_shares_of_a_class_without_trusted_rows_and_of_unknown_labels():
    weights = class_share_weights(torch.tensor([0, 0, 1, -1]), torch.tensor([0]))
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 2 / 3, 1 / 3, 1.0]))


def naive_majorant(counts):
    """Slopes of the least concave majorant, in O(B^2): the highest chord over each bin's right edge and the one before."""
    total = np.concatenate([[0], np.cumsum(counts)]).astype(float)
    at = [
        max(
            total[a] + (total[b] - total[a]) * (x - a) / (b - a) if b > a else total[a]
            for a in range(x + 1)
            for b in range(x, len(total))
        )
        for x in range(len(total))
    ]
    return np.diff(at)


@pytest.mark.parametrize("seed", range(5))
def test_grenander_against_the_naive_majorant(seed):
    counts = np.random.default_rng(seed).integers(0, 6, size=25)
    slopes = grenander(counts)
    np.testing.assert_allclose(slopes, naive_majorant(counts), atol=1e-9)
    assert (np.diff(slopes) <= 1e-9).all() and slopes.sum() == pytest.approx(counts.sum())


def test_labels_that_are_right_are_found_right():
    score = torch.randn(50_000)
    p = conformal_p_values(score, torch.arange(1000))
    assert float(right_label_probability(p, bins=1001).mean()) > 0.95


def test_wrong_labels_in_a_mixture_are_found():
    """30 % wrong, at a lower score: against the probability by the true densities."""
    n, wrong = 50_000, 15_000
    score = torch.randn(n)
    score[-wrong:] -= 2.0
    found = right_label_probability(conformal_p_values(score, torch.arange(2000)), bins=2001)
    right = (-(score**2) / 2).exp() * 0.7
    true = right / (right + 0.3 * (-((score + 2) ** 2) / 2).exp())
    assert float((found - true).abs().mean()) < 0.06
    assert float(found[-wrong:].mean()) < 0.4 and float(found[:-wrong].mean()) > 0.8


def test_only_counted_rows_are_learned_from():
    p = torch.cat([torch.rand(2000), torch.rand(2000) * 0.05])
    counted = torch.arange(4000) < 2000
    assert float(right_label_probability(p, counted=counted, bins=50).min()) > 0.6
    assert float(right_label_probability(p, bins=50).min()) < 0.2


def test_bad_inputs():
    score, trusted = torch.randn(5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="groups='classes' must be one of 'pooled', 'class', 'auto'"):
        conformal_p_values(score, trusted, groups="classes")
    with pytest.raises(ValueError, match="pass labels="):
        conformal_p_values(score, trusted, groups="auto")
    with pytest.raises(ValueError, match="bins=1"):
        right_label_probability(score.sigmoid(), bins=1)
