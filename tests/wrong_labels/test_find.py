"""The list, its level, and the estimates, against plain loops and simulated labels."""

import warnings

import numpy as np
import pytest
import torch

from iada_plugin import find_wrong_labels
from iada_plugin.runtime.samples import content_of
from iada_plugin.wrong_labels import drawn_share, trusted_rows_needed
from iada_plugin.wrong_labels.estimates import transition_matrix, wrong_share


def simulated(seed, n=600, trusted=100, wrong=0.3, shift=4.0, classes=2):
    """Margins ``[R]`` of labels of which some are wrong, and trusted rows: a fair sample of the right ones."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    mistaken = draw.random(n) < wrong
    rows = draw.permutation(n)[:trusted]
    mistaken[rows] = False
    return labels, draw.normal(2 - shift * mistaken, 1), mistaken, rows


def by_hand(margins, trusted, level, adaptive=False):
    """Benjamini and Hochberg's list, row by row."""
    reference = margins[trusted]
    others = [r for r in range(len(margins)) if r not in set(trusted.tolist())]
    p = {r: (1 + sum(reference <= margins[r])) / (1 + len(reference)) for r in others}
    n, right = len(others), 1.0
    if adaptive:
        right = min(1, (1 + sum(v > 0.5 for v in p.values())) / (n * 0.5))
    best = max((k for k in range(n + 1) if k == 0 or sorted(p.values())[k - 1] * n * right <= level * k), default=0)
    cut = sorted(p.values())[best - 1] if best else -1
    return {r for r in others if p[r] <= cut}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("level", [0.05, 0.1, 0.3])
def test_the_list_is_benjamini_and_hochbergs(level, adaptive):
    labels, margins, _, trusted = simulated(0)
    found = find_wrong_labels(labels, trusted, margins=margins, false_alarms=level, adaptive=adaptive)
    expected = by_hand(margins, trusted, level, adaptive)
    assert set(found.rows.tolist()) == expected and len(expected) > 50
    assert found.listed.sum() == len(found) == len(expected) and not found.listed[trusted].any()
    p = found.p_value[found.order]
    assert (np.diff(p) >= 0).all() and set(found.order[: len(found)].tolist()) == expected


def test_another_level_is_another_list_of_the_same_order():
    labels, margins, _, trusted = simulated(1)
    found = find_wrong_labels(labels, trusted, margins=margins, false_alarms=0.05)
    wider = found.at(0.3)
    assert len(wider) > len(found) and wider.rows[: len(found)].tolist() == found.rows.tolist()
    assert len(found.at(0.3, adaptive=True)) >= len(wider)
    with pytest.raises(ValueError, match=r"false_alarms=1.0 must be between 0 and 1"):
        found.at(1.0)


def test_false_alarms_stay_below_the_level_on_average():
    shares, found_any = [], 0
    for seed in range(300):
        labels, margins, mistaken, trusted = simulated(seed, n=400, trusted=60, shift=3.0)
        rows = find_wrong_labels(labels, trusted, margins=margins, false_alarms=0.2).rows
        shares.append((~mistaken[rows]).mean() if len(rows) else 0.0)
        labels, margins, _, trusted = simulated(seed, n=400, trusted=60, wrong=0.0)
        found_any += len(find_wrong_labels(labels, trusted, margins=margins, false_alarms=0.2)) > 0
    assert (
        np.mean(shares) <= 0.2 * 0.7 + 3 * np.std(shares) / 300**0.5
    )  # Benjamini and Hochberg: level times share of right labels
    assert np.mean(shares) > 0.05  # and not by listing nothing
    assert found_any / 300 <= 0.2 + 3 * (0.2 * 0.8 / 300) ** 0.5  # on clean data a list is a false alarm as a whole


def test_logits_and_probabilities_say_the_same():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 4, generator=draw) * 3, torch.randint(0, 4, (200,), generator=draw)
    trusted = range(60)
    one = find_wrong_labels(labels, trusted, logits=logits)
    two = find_wrong_labels(labels, trusted, pred_probs=logits.softmax(dim=1))
    for row in range(200):
        others = [c for c in range(4) if c != labels[row]]
        best = max(others, key=lambda c: float(logits[row, c]))
        assert one.suggested[row] == best
        assert one.margin[row] == pytest.approx(float(logits[row, labels[row]] - logits[row, best]), abs=1e-5)
    np.testing.assert_allclose(one.margin, two.margin, atol=1e-4)
    np.testing.assert_allclose(one.p_value, two.p_value, atol=0.02)


def test_of_many_epochs_early_ones_are_taken_where_labels_are_learned_by_heart_later():
    labels, early, mistaken, trusted = simulated(0, shift=4.0)
    draw = np.random.default_rng(1)
    epochs = np.stack(
        [early + draw.normal(0, 0.5, 600) for _ in range(5)] + [draw.normal(9, 6, 600) for _ in range(30)]
    )
    found = find_wrong_labels(labels, trusted, margins=epochs)
    assert any(np.allclose(found.margin, epochs[:n].mean(axis=0)) for n in (2, 3, 5))
    rows = found.rows
    assert len(rows) > 100 and mistaken[rows].mean() > 0.9
    # and where nothing is learned by heart, all of them
    epochs = np.stack([early + draw.normal(0, 6, 600) for _ in range(30)])
    found = find_wrong_labels(labels, trusted, margins=epochs)
    np.testing.assert_allclose(found.margin, epochs.clip(-20, 20).mean(axis=0))


def test_p_values_stay_uniform_although_the_epoch_is_chosen():
    """Of epochs that are all noise, a choice by trusted rows would make these look better than they are."""
    low = []
    for seed in range(300):
        draw = np.random.default_rng(seed)
        epochs = draw.normal(size=(8, 120)) + np.arange(8)[:, None]
        found = find_wrong_labels(draw.integers(0, 2, 120), np.arange(40), margins=epochs, false_alarms=0.2)
        low.append((found.p_value[40:] <= 0.2).mean())
    assert abs(np.mean(low) - 8 / 41) < 3 * np.std(low) / 300**0.5


def test_rows_that_were_not_seen_are_not_listed():
    labels, margins, _, trusted = simulated(0)
    margins[[0, 1, 2]] = np.nan
    found = find_wrong_labels(labels, np.setdiff1d(trusted, [0, 1, 2]), margins=margins)
    assert (found.p_value[:3] == 1).all() and not found.listed[:3].any() and len(found) > 50


def test_a_balanced_draw_from_a_long_tail_is_weighted():
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1], [900, 100])
    margins = draw.normal(np.where(labels == 0, 4, 1), 1)
    balanced = np.concatenate([np.arange(40), np.arange(900, 940)])
    assert find_wrong_labels(labels, balanced, margins=margins).compared == "weighted"
    assert find_wrong_labels(labels, draw.permutation(1000)[:80], margins=margins).compared == "pooled"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        within = find_wrong_labels(labels, balanced, margins=margins, compare="class")
    own = np.setdiff1d(np.flatnonzero(labels == 1), balanced)
    expected = [(1 + (margins[900:940] <= margins[r]).sum()) / 41 for r in own]
    np.testing.assert_allclose(within.p_value[own], expected)
    with pytest.warns(UserWarning, match="b: fewer than 20 trusted rows"):
        few = find_wrong_labels(labels, balanced[:50], margins=margins, compare="class", class_names=["a", "b"])
    assert few.pooled_classes == (1,)


@pytest.mark.parametrize("wrong", [0.0, 0.15, 0.4])
def test_the_share_of_wrong_labels_is_estimated_with_its_interval(wrong):
    shares, covered = [], 0
    for seed in range(200):
        labels, margins, mistaken, rows = simulated(seed, n=1000, trusted=100, wrong=wrong, shift=6.0)
        others = np.setdiff1d(np.arange(1000), rows)
        share = wrong_share(margins[others], labels[others], margins[rows], labels[rows])
        shares.append(share.estimate)
        covered += share.low <= mistaken[others].mean() <= share.high
    truth = wrong * 1.0
    assert abs(np.mean(shares) - truth) < (0.012 if wrong else 0.05)  # cut off at zero where nothing is wrong
    assert covered / 200 > 0.85  # of a nominal 0.9


def test_the_share_is_right_where_margins_are_tied():
    ties = np.full(500, 8.0)
    share = wrong_share(ties, np.zeros(500, int), ties[:40], np.zeros(40, int))
    assert share.estimate == pytest.approx(0, abs=0.05)
    mixed = np.where(np.arange(500) < 100, -8.0, 8.0)
    assert wrong_share(mixed, np.zeros(500, int), ties[:40], np.zeros(40, int)).estimate == pytest.approx(0.2, abs=0.05)
    assert np.isnan(wrong_share(ties, np.zeros(500, int), ties[:3], np.zeros(3, int)).estimate)


def test_the_transition_matrix_is_found_again():
    draw = np.random.default_rng(0)
    truth = np.array([[0.7, 0.3, 0.0], [0.0, 0.9, 0.1], [0.2, 0.0, 0.8]])
    confusion = np.array([[0.8, 0.1, 0.1], [0.15, 0.7, 0.15], [0.05, 0.15, 0.8]])  # of the model, by true class
    pick = lambda table, rows: (draw.random(len(rows))[:, None] > table.cumsum(axis=1)[rows]).sum(axis=1)  # noqa: E731
    classes, checked = draw.integers(0, 3, 20_000), draw.integers(0, 3, 3000)
    found = transition_matrix(pick(confusion, checked), checked, pick(confusion, classes), pick(truth, classes), 3)
    np.testing.assert_allclose(found, truth, atol=0.04)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_what_is_needed_is_said():
    assert trusted_rows_needed(0.1, 0.4) == 24 and trusted_rows_needed(0.05, 0.1) == 199
    labels, margins, _, trusted = simulated(0)
    found = find_wrong_labels(labels, trusted[:50], margins=margins)
    assert found.share_needed == pytest.approx(1 / 51 / 0.1)


BAD = {
    "none of the inputs": ({}, "give one of logits=, pred_probs= and margins=; got none"),
    "two of them": ({"margins": np.zeros(20), "logits": np.zeros((20, 2))}, "got logits, margins"),
    "a level of 10": ({"margins": np.zeros(20), "false_alarms": 10}, "false_alarms=10 must be between 0 and 1"),
    "too few trusted rows": ({"margins": np.zeros(20), "false_alarms": 0.05}, "with 10 trusted rows no p-value is below 0.091.*check at least 99"),
    "margins of other rows": ({"margins": np.zeros(7)}, r"margins have shape \[7\]: pass \[20\]"),
    "logits of other rows": ({"logits": np.zeros((7, 2))}, r"logits have shape \[7, 2\] for 20 labels"),
    "too few columns": ({"logits": np.zeros((20, 1))}, r"logits have shape \[20, 1\]"),
    "a label without column": ({"logits": np.zeros((20, 2)), "labels": [2] * 20}, "label 2 has no column"),
    "logits as probabilities": ({"pred_probs": np.full((20, 2), 3.0)}, "pred_probs must be probabilities"),
    "infinite": ({"margins": np.full(20, np.inf)}, "margins have infinite values"),
    "text": ({"margins": ["a"] * 20}, "margins are no numbers"),
    "names": ({"margins": np.zeros(20), "class_names": ["a"]}, "class_names has 1 names"),
    "comparison": ({"margins": np.zeros(20), "compare": "all"}, "compare='all' must be one of"),
    "suggested": ({"margins": np.zeros(20), "suggested": [0]}, r"suggested has shape \[1\]"),
    "trusted rows out of range": ({"margins": np.zeros(20), "trusted_rows": [0, 99]}, "trusted row 99 is out of range"),
    "trusted rows as numbers 0 and 1": ({"margins": np.zeros(20), "trusted_rows": [0, 1] * 10}, "pass it as bool"),
    "labels that are floats": ({"margins": np.zeros(20), "labels": [0.0, 1.0] * 10}, r"float64 .*labels.astype\(int\)"),
    "negative labels": ({"margins": np.zeros(20), "labels": [-1] * 20}, "labels must not be negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    options, message = BAD[case]
    options = {"labels": [0, 1] * 10, "trusted_rows": range(10), "false_alarms": 0.2, **options}
    with pytest.raises(ValueError, match=message):
        find_wrong_labels(options.pop("labels"), options.pop("trusted_rows"), **options)


def test_exchange_with_pandas_datasets_and_cleanlab():
    pandas = pytest.importorskip("pandas")
    from datasets import Dataset

    labels, margins, _, trusted = simulated(0)
    found = find_wrong_labels(labels, trusted, margins=margins, suggested=1 - labels)
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.index[: len(found)].tolist() == found.rows.tolist()
    assert frame.listed.sum() == len(found) and frame.trusted[-len(trusted) :].all()
    data = found.add_to(Dataset.from_dict({"label": labels.tolist()}))
    assert [k for k, v in enumerate(data["listed"]) if v] == sorted(found.rows.tolist())
    assert data[int(found.rows[0])]["suggested_label"] == 1 - labels[found.rows[0]]
    looser = found.at(0.5).add_to(data)  # in the place of the earlier columns
    assert sum(looser["listed"]) == len(found.at(0.5)) and looser.column_names == data.column_names
    data = found.add_to(pandas.DataFrame({"label": labels}))
    assert data.index[data.listed].tolist() == sorted(found.rows.tolist())
    with pytest.raises(ValueError, match="the data set has 3 rows, and 600 labels were judged"):
        found.add_to(Dataset.from_dict({"label": [0, 1, 0]}))
    issues = found.to_cleanlab()
    assert list(issues.columns) == ["is_label_issue", "label_quality", "given_label", "predicted_label"]
    assert (issues.predicted_label == np.where(margins > 0, labels, 1 - labels)).all()


def test_checked_rows_are_not_judged_again():
    draw = np.random.default_rng(0)
    margins = np.concatenate([draw.normal(3, 1, 400), draw.normal(-4, 1, 60)])
    labels, trusted = np.arange(460) % 2, range(100)
    wrong = [455, 456, 457]
    plain = find_wrong_labels(labels, trusted, margins=margins)
    found = find_wrong_labels(labels, trusted, checked_rows=wrong, margins=margins)
    assert set(plain.rows) - set(found.rows) == set(wrong) <= set(plain.rows)
    assert set(wrong) < set(found.ranking[-103:].tolist()) and len(found.order) == 357
    assert found.wrong_share.estimate < plain.wrong_share.estimate
    assert (found.checked & ~found.trusted).nonzero()[0].tolist() == wrong
    mask = np.isin(np.arange(460), wrong)
    assert find_wrong_labels(labels, trusted, checked_rows=mask, margins=margins).rows.tolist() == found.rows.tolist()
    nobody = find_wrong_labels(labels, trusted, checked_rows=mask & False, margins=margins)
    assert nobody.rows.tolist() == plain.rows.tolist()


@pytest.mark.parametrize(
    "labels, trusted, wrong, message",
    [
        ([0, 1] * 50, range(40), [100], r"checked_rows=\[100\]: row 100 is out of range"),
        ([0, 1] * 50, range(60), range(60, 100), "all 100 rows are checked"),
        ([1] * 100, range(40), None, "all labels are of class 1"),
        (["cat", "dog"] * 50, range(40), None, "must be class indices, got 'cat': names, labels = numpy.unique"),
    ],
)
def test_nothing_to_judge(labels, trusted, wrong, message):
    with pytest.raises(ValueError, match=message):
        find_wrong_labels(labels, trusted, checked_rows=wrong, margins=np.zeros(100))


def test_the_share_of_a_random_draw():
    share = drawn_share(12, 200)
    assert share.estimate == 0.06
    stats = pytest.importorskip("scipy.stats")
    np.testing.assert_allclose(share[1:], stats.beta.ppf([0.05, 0.95], 12.5, 188.5), atol=1e-3)
    assert drawn_share(0, 50).low == 0 and drawn_share(50, 50).high == 1
    for wrong, checked in ((5, 3), (0.2, 200)):
        with pytest.raises(ValueError, match=f"{wrong} of {checked} checked"):
            drawn_share(wrong, checked)


def test_samples_of_a_shuffled_table_go_by_place():
    pandas = pytest.importorskip("pandas")
    texts = pandas.Series(["first", "second", "third"], index=[2, 0, 1])
    assert [content_of(texts, k) for k in range(3)] == ["first", "second", "third"]
    table = pandas.DataFrame({"text": texts, "key": ["a", "b", "c"]})
    assert [content_of(table, k) for k in range(3)] == ["first", "second", "third"]
