"""scikit-learn's interface."""

import pickle

import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

from iada_plugin import IADAConfig, TrustedClassifier, WrongLabels
from iada_plugin.data import noisy_labels
from iada_plugin.integrations.estimator import _Scale
from iada_plugin.metrics import auroc


def problem(n=1500, wrong=0.4, trusted=150, seed=0):
    """Embeddings of five classes, labels of which many are the next class's, and rows drawn at random that were set right."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 5, n)
    x = draw.normal(size=(n, 24)).astype(np.float32) + 2.5 * np.eye(5, 24, dtype=np.float32)[truth]
    y = np.array(noisy_labels(truth, "flip1", wrong, seed=seed)[0])
    rows = np.sort(draw.permutation(n)[:trusted])
    y[rows] = truth[rows]
    return 100 * x + 7, y, truth, rows


def test_scikit_learns_own_checks():
    check_estimator(TrustedClassifier((16,), random_state=0))


def test_wrong_labels_are_let_go_and_listed():
    x, y, truth, rows = problem()
    test, _, test_truth, _ = problem(seed=1)
    names = np.array(["a", "b", "c", "d", "e"])
    plain = TrustedClassifier(random_state=0).fit(x, y)
    found = TrustedClassifier(random_state=0).fit(x, names[y], sample_trusted=rows)
    assert plain.wrong_labels_ is None and plain.kept_.all()
    assert found.score(test, names[test_truth]) > plain.score(test, test_truth) + 0.1
    assert isinstance(found.wrong_labels_, WrongLabels) and found.wrong_labels_.class_names == tuple(names)
    assert auroc(-found.wrong_labels_.p_value, y != truth) > 0.9
    listed = found.wrong_labels_.at(0.2).rows
    assert (y != truth)[listed].mean() > 0.7
    assert (found.wrong_labels_.suggested != y).all()  # what else it may be
    assert (found.wrong_labels_.suggested[listed] == truth[listed]).mean() > 0.7
    assert (y == truth)[found.kept_].mean() > 0.9
    few = TrustedClassifier(random_state=0, epochs=3).fit(x, y, sample_trusted=np.sort(rows[:8]))
    assert few.wrong_labels_ is None and few.kept_.all()


def test_it_is_repeatable_and_leaves_random_numbers_alone():
    x, y, _, rows = problem(300)
    state = torch.get_rng_state()
    mask = np.isin(np.arange(len(y)), rows)
    options = {"epochs": 4, "random_state": 3, "config": IADAConfig(gate_level=0.2)}
    one = TrustedClassifier(**options).fit(x, y, sample_trusted=rows)
    other = clone(one).fit(x, y, sample_trusted=mask)
    assert np.array_equal(one.predict_proba(x), other.predict_proba(x))
    assert torch.equal(torch.get_rng_state(), state)
    again = pickle.loads(pickle.dumps(one))
    assert (
        np.array_equal(again.predict_proba(x), one.predict_proba(x))
        and again.wrong_labels_.rows.tolist() == one.wrong_labels_.rows.tolist()
    )
    assert one.n_iter_ == len(one.loss_curve_) == 4 and type(one.network_[-1]) is torch.nn.Linear


def test_trusted_rows_follow_the_folds():
    x, y, _, rows = problem(600, wrong=0.2)
    mask = np.isin(np.arange(len(y)), rows)
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = TrustedClassifier(random_state=0).set_fit_request(sample_trusted=True)
        scores = cross_val_score(classifier, x, y, cv=2, params={"sample_trusted": mask})
    assert scores.min() > 0.6


@pytest.mark.parametrize("settings, trusted, message", [
    ({"epochs": 2.5}, None, "epochs=2.5 must be a whole number, at least 1"),
    ({"batch_size": 1}, None, "batch_size=1 must be a whole number, at least 2"),
    ({}, [0, 999], "trusted row 999 is out of range"),
    ({}, np.zeros(60, dtype=bool), "there are no trusted rows"),
])  # fmt: skip
def test_bad_input_is_named(settings, trusted, message):
    x, y, _, _ = problem(60, trusted=20)
    with pytest.raises(ValueError, match=message):
        TrustedClassifier(**settings).fit(x, y, sample_trusted=trusted)


def test_features_are_scaled_and_constant_ones_left_alone():
    x = torch.cat([torch.randn(100, 2) * torch.tensor([1e-3, 1e4]) + 5, torch.full((100, 1), 3.0)], dim=1)
    scaled = _Scale(x)(x)
    torch.testing.assert_close(scaled[:, :2].std(dim=0, correction=0), torch.ones(2), rtol=1e-3, atol=0)
    assert (scaled[:, 2] == 0).all()
