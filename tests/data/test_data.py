import csv

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import recall_score
from torch.utils.data import DataLoader, Subset, TensorDataset

from iada_plugin import balanced_meta_split
from iada_plugin.data import labels_of, long_tail_counts, long_tail_subset
from iada_plugin.data.civilcomments import GROUPS, IDENTITIES, read_civilcomments, synthetic_civilcomments
from iada_plugin.metrics import (
    class_accuracies,
    group_accuracies,
    shot_accuracies,
    worst_group_accuracy,
    worst_group_interval,
)
from iada_plugin.runtime.batches import EndlessBatches, meta_dataloader


def test_balanced_by_class():
    labels = [0] * 50 + [1] * 20 + [2] * 11
    meta, rest = balanced_meta_split(labels, 10, seed=3)
    assert sorted(meta + rest) == list(range(81))
    assert np.bincount(np.array(labels)[meta]).tolist() == [10, 10, 10]
    assert balanced_meta_split(torch.tensor(labels), 10, seed=3) == (meta, rest)
    assert balanced_meta_split(labels, 10, seed=4)[0] != meta


def test_balanced_by_overlapping_groups():
    rng = np.random.default_rng(0)
    groups = rng.random((300, 5)) < [0.5, 0.3, 0.2, 0.1, 0.06]
    meta, rest = balanced_meta_split(rng.integers(0, 2, 300), 8, groups=groups)
    drawn = groups[meta].sum(axis=0)
    assert (drawn >= 8).all() and drawn[4] == 8  # the rarest group is drawn first, and exactly
    assert not set(meta) & set(rest)
    by_id, _ = balanced_meta_split([0] * 30, 5, groups=["a"] * 20 + ["b"] * 10)
    assert sum(i < 20 for i in by_id) == 5 == sum(i >= 20 for i in by_id)


def test_no_group_loses_its_last_row():
    groups = np.zeros((8, 2), dtype=bool)
    groups[:3, 0], groups[2:6, 1] = True, True
    for seed in range(50):
        _, rest = balanced_meta_split([0] * 8, 2, groups=groups, seed=seed)
        assert groups[rest].any(axis=0).all()


def test_too_few_rows():
    labels = [0] * 20 + [1] * 10
    with pytest.raises(ValueError, match="class 1 has 10 rows"):
        balanced_meta_split(labels, 10)
    with pytest.warns(UserWarning, match="5 drawn"):
        meta, _ = balanced_meta_split(labels, 10, short="half")
    assert np.bincount(np.array(labels)[meta]).tolist() == [10, 5]
    for bad in (
        {"labels": []},
        {"labels": [[1], [2]]},
        {"labels": labels, "per_group": 0},
        {"labels": labels, "groups": [1]},
    ):
        with pytest.raises(ValueError):
            balanced_meta_split(**bad)


def test_labels_are_read_where_that_is_cheap():
    y = torch.tensor([0, 2, 1, 2])
    tensors = TensorDataset(torch.randn(4, 3), y)
    folder = type("ImageFolder", (torch.utils.data.Dataset,), {"targets": y.tolist()})()
    for data in (tensors, DataLoader(tensors), Dataset.from_dict({"label": y.tolist()}), folder,
                 Dataset.from_dict({"labels": y.tolist()}).with_format("torch")):  # fmt: skip
        assert labels_of(data).tolist() == y.tolist()
    assert labels_of(Subset(tensors, [1, 3])).tolist() == [2, 2]
    for data in ([1, 2], TensorDataset(torch.randn(4, 3)), Dataset.from_dict({"label": [0.5, 0.1]}), None):
        assert labels_of(data) is None


def test_endless_batches():
    batches = iter(EndlessBatches(10, 4, seed=1))
    drawn = [next(batches) for _ in range(10)]
    flat = [i for batch in drawn for i in batch]
    for epoch in range(4):  # every sample once an epoch, in another order
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    later = EndlessBatches(10, 4, seed=1)
    later.position = 7
    assert next(iter(later)) == drawn[7]
    assert sorted(next(iter(EndlessBatches(3, 64, seed=0)))) == [0, 1, 2]
    with pytest.raises(ValueError, match="the meta set is empty"):
        meta_dataloader([], 4, 0)


def test_long_tail_is_the_published_one():
    assert long_tail_counts(10, 4990, 100) == [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]
    labels = np.repeat(np.arange(3), 50)
    rows = long_tail_subset(labels, [40, 20, 5], seed=1)
    assert np.bincount(labels[rows]).tolist() == [40, 20, 5] and len(set(rows)) == 65
    with pytest.raises(ValueError, match="class 0 has 50 rows"):
        long_tail_subset(labels, [60, 1, 1])
    for bad in ((1, 10, 10), (10, 0, 10), (10, 10, 0.5), (10, 10, 100)):
        with pytest.raises(ValueError):
            long_tail_counts(*bad)


# ------------------------------------------------------------------------------------------------ CivilComments


def write(path, rows, drop=()):
    columns = ["id", "comment_text", "split", "toxicity", *IDENTITIES, "identity_any"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [c for c in columns if c not in drop], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows(n=12):
    return [
        {"id": i, "comment_text": f"text {i}, with\na line", "split": ("train", "val", "test")[i % 3],
         "toxicity": 0.5 if i % 2 else 0.49, "male": float(i % 4 == 0), "muslim": "" if i % 5 else 0.75}
        for i in range(n)
    ]  # fmt: skip


def test_civilcomments_layout(tmp_path):
    splits = read_civilcomments(write(tmp_path / "c.csv", rows()))
    train = splits["train"]
    assert train.texts == [f"text {i}, with\na line" for i in (0, 3, 6, 9)]
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert train.groups.shape == (4, 16) and GROUPS[0] == "male, not toxic" and GROUPS[9] == "muslim, toxic"
    assert np.argwhere(train.groups).tolist() == [[0, 0], [0, 8]]
    assert splits["val"].groups[:, 9].sum() == 0 and splits["test"].groups[1].nonzero()[0].tolist() == [9]


@pytest.mark.parametrize("change,drop,message", [
    ({}, ("muslim", "split"), "no column split, muslim"),
    ({"split": "dev"}, (), "line 3: split 'dev'"),
    ({"toxicity": "high"}, (), "line 3: votes"),
    ({"white": 1.5}, (), "line 3: votes"),
])  # fmt: skip
def test_civilcomments_errors(tmp_path, change, drop, message):
    data = rows()
    data[0].update(change)
    with pytest.raises(ValueError, match=message):
        read_civilcomments(write(tmp_path / "c.csv", data, drop))


def test_civilcomments_missing_parts(tmp_path):
    with pytest.raises(FileNotFoundError, match="WILDS"):
        read_civilcomments(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="split 'test' has 0 rows"):
        read_civilcomments(write(tmp_path / "c.csv", [r for r in rows() if r["split"] != "test"]))


def test_the_generated_sample():
    splits = synthetic_civilcomments((900, 300, 300), seed=1)
    again = synthetic_civilcomments((900, 300, 300), seed=1)
    train = splits["train"]
    assert train.texts == again["train"].texts != synthetic_civilcomments((900, 300, 300), seed=2)["train"].texts
    assert (splits["test"].groups.sum(axis=0) > 0).all()
    mentioned = train.groups.any(axis=1)
    assert train.labels[mentioned].mean() > 2 * train.labels[~mentioned].mean()  # the spurious correlation


# ------------------------------------------------------------------------------------------------------ metrics


def test_accuracies_against_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    found = class_accuracies(predictions, labels, 5)
    np.testing.assert_allclose(found[:4], recall_score(labels, predictions, average=None))
    assert np.isnan(found[4])
    groups = rng.random((200, 3)) < 0.4
    correct = labels == predictions
    expected = [correct[groups[:, g]].mean() for g in range(3)]
    np.testing.assert_allclose(group_accuracies(correct, groups), expected)
    assert worst_group_accuracy(correct, groups) == (min(expected), int(np.argmin(expected)))


def test_worst_group_and_its_interval():
    groups = np.zeros((110, 2), dtype=bool)
    groups[:100, 0], groups[100:, 1] = True, True
    correct = np.r_[np.ones(80), np.zeros(20), np.zeros(10)].astype(bool)
    assert worst_group_accuracy(correct, groups) == (0.0, 1)
    assert worst_group_accuracy(correct, groups, min_size=20) == (0.8, 0)
    low, high = worst_group_interval(correct, groups, min_size=20)
    assert 0.70 < low < 0.75 and 0.85 < high < 0.9  # binomial: 0.8 +- 2 * 0.04
    with pytest.raises(ValueError, match="no group has 500 rows"):
        worst_group_accuracy(correct, groups, min_size=500)


def test_many_medium_few():
    assert shot_accuracies([0.9, 0.5, 0.7, 0.1], [500, 100, 20, 19]) == {"many": 0.9, "medium": 0.6, "few": 0.1}
    assert np.isnan(shot_accuracies([0.5], [500])["few"])


def test_more_metrics_against_scikit_learn():
    from sklearn.metrics import confusion_matrix as reference
    from sklearn.metrics import precision_score

    from iada_plugin.metrics import (
        confusion_matrix,
        group_memberships,
        macro_precision,
        weighted_group_accuracy,
    )

    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, 300), rng.integers(0, 4, 300)  # class 4 is never predicted
    assert (confusion_matrix(predictions, labels, 5) == reference(labels, predictions)).all()
    expected = precision_score(labels, predictions, average="macro", zero_division=0)
    assert macro_precision(predictions, labels, 5) == pytest.approx(expected)
    few = labels < 3  # classes without a row do not count
    expected = precision_score(labels[few], predictions[few], average="macro", labels=[0, 1, 2], zero_division=0)
    assert macro_precision(predictions[few], labels[few], 5) == pytest.approx(expected)

    with pytest.raises(ValueError, match=r"predictions must be in 0..2, got 0 to 3"):
        confusion_matrix([0, 3], [0, 0], 3)

    correct, groups = predictions == labels, rng.integers(0, 3, 300)
    member = group_memberships(groups, 3)
    shares = np.array([70, 20, 10])
    own = [correct[groups == g].mean() for g in range(3)]
    assert weighted_group_accuracy(correct, member, shares) == pytest.approx((shares * own).sum() / 100)
    # on data distributed as the training set it is the plain average
    assert weighted_group_accuracy(correct, member, np.bincount(groups)) == pytest.approx(correct.mean())
    with pytest.raises(ValueError, match="no test row of group 3"):
        weighted_group_accuracy(correct, group_memberships(groups, 4), [1, 1, 1, 1])
    with pytest.raises(ValueError, match="each of the 3 groups"):
        weighted_group_accuracy(correct, member, [1, 1])
