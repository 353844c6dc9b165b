"""Joining trusted rows to a training set, and checking which they are."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import iada_plugin
from iada_plugin.data import check_trusted_rows, labels_of, with_trusted


class Pictures(Dataset):
    def __init__(self, targets, transform=None):
        self.targets, self.transform = targets, transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        x = torch.full((2,), float(i))
        return x if self.transform is None else self.transform(x), self.targets[i]


class Double:
    """A transform whose repr is its address."""

    def __call__(self, x):
        return 2 * x


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_pairs(kind):
    train, clean = (kind([[1.0], [2.0], [3.0]]), kind([0, 1, 1])), (kind([[4.0]]), kind([0]))
    (x, y), rows = with_trusted(train, clean)
    assert type(x) is type(train[0]) and x[:, 0].tolist() == [1, 2, 3, 4] and y.tolist() == [0, 1, 1, 0]
    assert rows.tolist() == [3] and rows.dtype == torch.long


def test_map_style_data_sets():
    joined, rows = with_trusted(Pictures([0, 1, 2]), Pictures([1, 2]))
    assert len(joined) == 5 and rows.tolist() == [3, 4] and joined[3][1] == 1
    assert labels_of(joined).tolist() == [0, 1, 2, 1, 2] == labels_of(DataLoader(joined)).tolist()
    joined, rows = iada_plugin.with_trusted(*(TensorDataset(torch.randn(n, 2), torch.arange(n)) for n in (4, 2)))
    assert labels_of(joined).tolist() == [0, 1, 2, 3, 0, 1] and rows.tolist() == [4, 5]
    assert labels_of(with_trusted([(1, 0)], Pictures([1]))[0]) is None


def test_a_transform_is_set_on_both_parts():
    joined, _ = with_trusted(Pictures([0, 1]), Pictures([1, 0]))
    joined.transform = lambda x: x + 100
    assert joined[1][0][0] == 101 and joined[3][0][0] == 101 and joined.transform is joined.datasets[1].transform
    assert not hasattr(with_trusted([(1, 0)], [(1, 0)])[0], "transform")


def test_trusted_rows_that_are_transformed_otherwise_are_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_trusted(Pictures([0, 1], Double()), Pictures([1], Double()))
    with pytest.warns(UserWarning, match="Double object> and clean by None"):
        with_trusted(Pictures([0, 1], Double()), Pictures([1]))


def test_hugging_face_data_sets():
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]})
    clean = datasets.Dataset.from_dict({"label": [1], "text": ["d"]})
    joined, rows = with_trusted(train, clean)
    assert joined["text"][:] == ["a", "b", "c", "d"] and joined["label"][:] == [0, 1, 0, 1] and rows.tolist() == [3]
    joined, _ = with_trusted(train.with_format("torch", columns=["label"]), clean)
    assert torch.equal(joined[3]["label"], torch.tensor(1)) and set(joined[3]) == {"label"}
    joined, _ = with_trusted(train.with_transform(lambda rows: {"n": [2 * v for v in rows["label"]]}), clean)
    assert joined[3] == {"n": 2}


def test_hugging_face_data_sets_that_do_not_fit():
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(ValueError, match="train has the columns text, which clean has not"):
        with_trusted(train, train.remove_columns("text"))
    with pytest.raises(ValueError, match="clean has the columns more, which train has not"):
        with_trusted(train, train.add_column("more", [1, 2]))
    named = train.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    with pytest.raises(ValueError, match=r"'label' is Value.* in train and ClassLabel.* in clean"):
        with_trusted(train, named)
    with pytest.raises(TypeError, match="streamed"):
        with_trusted(train.to_iterable_dataset(), train)
    with pytest.raises(TypeError, match="a Dataset and clean a TensorDataset"):
        with_trusted(train, TensorDataset(torch.arange(3)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("train", "clean", "error", "message"),
    [
        (Stream(), Pictures([0]), TypeError, "train is streamed"),
        (Pictures([0]), Stream(), TypeError, "clean is streamed"),
        (Pictures([0]), Pictures([]), ValueError, "clean is empty"),
        (Pictures([]), Pictures([0]), ValueError, "train is empty"),
        (Pictures([0]), ([1], [0]), TypeError, "a Pictures and clean a tuple"),
        (Pictures([0]), 3, TypeError, "clean a int"),
        ({"train": Pictures([0])}, Pictures([0]), TypeError, "train is a dict"),
        (([[1.0]], [0]), ([[1.0, 2.0]], [0]), ValueError, r"inputs of train are float64 \[1, 1\]"),
        (([[1.0]], [0]), ([[1.0]], [0.5]), ValueError, "labels of train are int64"),
        (([1.0], [0]), (torch.ones(1), [0]), TypeError, "inputs of train are a ndarray"),
        (([1.0], [0]), ([1.0, 2.0], [0]), ValueError, "clean has 2 inputs and 1 labels"),
        (([1.0], [0]), (np.zeros(0), np.zeros(0, int)), ValueError, "clean is empty"),
    ],
)
def test_what_does_not_fit(train, clean, error, message):
    with pytest.raises(error, match=message):
        with_trusted(train, clean)


@pytest.mark.parametrize(
    "rows", [[4, 1], np.array([1, 4]), torch.tensor([4, 1], dtype=torch.int32), [False, True, False, False, True]]
)
def test_trusted_rows(rows):
    found = check_trusted_rows(rows, 5)
    assert found.tolist() == [1, 4] and found.dtype == torch.long


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 5], "trusted row 5 is out of range: the training set has 5 rows, 0 to 4"),
        ([-1, 2], "trusted row -1 is out of range"),
        ([1, 3, 1], "trusted row 1 is given twice"),
        ([0.0, 1.0], "torch.float32"),
        (["a"], "trusted rows are no numbers"),
        ([[0, 1]], r"\[1, 2\]"),
        ([], "there are no trusted rows"),
        ([False] * 5, "there are no trusted rows"),
        ([True] * 4, r"mask of shape \[4\]; the training set has 5 rows"),
    ],
)
def test_bad_trusted_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        check_trusted_rows(rows, 5)


def test_classes_of_trusted_rows():
    labels = [0, 0, 1, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trusted_rows([0, 2, 4], 5, labels)
        check_trusted_rows([0], 2, [0, 0])
    with pytest.warns(UserWarning, match=r"class 2: "):
        check_trusted_rows([0, 2], 5, labels)
    with pytest.warns(UserWarning, match=r"class 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 2 more"):
        check_trusted_rows([0, 2, 4], 5, labels, num_classes=15)
    with pytest.raises(ValueError, match="all 2 trusted rows are of class 0, of 3 classes"):
        check_trusted_rows([0, 1], 5, labels)
    with pytest.raises(ValueError, match=r"labels have shape \[4\]; the training set has 5 rows"):
        check_trusted_rows([0, 1], 5, labels[:4])
