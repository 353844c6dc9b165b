"""Row numbers through real loaders: torch's, timm's, and what Hugging Face data sets go through."""

import copy
import importlib.util
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import iada_plugin
from iada_plugin.data import labels_of, with_trusted
from iada_plugin.runtime.row_ids import number_samples, split_target, with_row_ids

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


class Rows(Dataset):
    """Samples that tell which row they are."""

    def __init__(self, n=10, form=lambda i, y: (torch.full((3,), float(i)), y)):
        self.targets, self.form, self.transform = [i % 3 for i in range(n)], form, None

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.form(i, self.targets[i])


def pair(i, y):
    return torch.full((3,), float(i)), y


def record(i, y):
    return {"x": float(i), "labels": y}


@pytest.mark.parametrize("workers", [0, 2])
def test_input_and_target(workers):
    dataset = iada_plugin.with_row_ids(Rows(form=pair))
    seen = []
    for x, y, rows in DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers):
        assert rows.dtype == torch.long and torch.equal(x[:, 0].long(), rows) and torch.equal(y, rows % 3)
        seen += rows.tolist()
    assert sorted(seen) == list(range(10))


def test_dicts():
    for batch in DataLoader(with_row_ids(Rows(form=record)), batch_size=4, shuffle=True):
        assert torch.equal(batch["x"].long(), batch["sample_ids"])


def test_hugging_face_data_sets():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"x": [0, 1, 2, 3], "label": [0, 1, 0, 1]})
    wrapped = with_row_ids(dataset)
    for batch in DataLoader(wrapped, batch_size=3, shuffle=True):
        assert torch.equal(batch["x"], batch["sample_ids"])
    assert wrapped[-1]["sample_ids"] == 3 and labels_of(wrapped).tolist() == [0, 1, 0, 1]
    with pytest.raises(TypeError, match="no row number"):
        wrapped[:2]
    with pytest.raises(TypeError, match="is streamed"):
        with_row_ids(dataset.to_iterable_dataset())


def test_labels_are_readable():
    wrapped = with_row_ids(Rows())
    assert labels_of(wrapped).tolist() == wrapped.targets == [i % 3 for i in range(10)]
    tensors = TensorDataset(torch.randn(4, 2), torch.arange(4))
    for inner, labels in ((tensors, [0, 1, 2, 3]), (Subset(tensors, [3, 1]), [3, 1])):
        assert labels_of(DataLoader(with_row_ids(inner))).tolist() == labels
    joined, rows = with_trusted(tensors, tensors)
    found = with_row_ids(joined)
    assert labels_of(found).tolist() == [0, 1, 2, 3] * 2 and [found[i][2] for i in rows.tolist()] == [4, 5, 6, 7]
    assert labels_of(with_row_ids([(1, 0)])) is None


def test_a_subset_keeps_the_numbers_of_the_whole():
    assert Subset(with_row_ids(Rows()), [7])[0][2] == 7
    assert with_row_ids(Subset(Rows(), [7]))[0][2] == 0


def test_what_is_set_reaches_the_data_set():
    inner = Rows()
    wrapped = with_row_ids(inner)
    wrapped.transform = "new"
    wrapped.targets = [2] * 10
    assert inner.transform == "new" and wrapped[0][1] == 2 and len(wrapped) == 10
    del wrapped.transform
    assert not hasattr(inner, "transform")


def test_copies():
    for wrapped in (with_row_ids([(1.0, 0), (2.0, 1)], in_target=True), with_row_ids([(1.0, 0), (2.0, 1)])):
        for other in (pickle.loads(pickle.dumps(wrapped)), copy.deepcopy(wrapped), copy.copy(wrapped)):
            assert len(other) == 2 and str(other[1]) == str(wrapped[1])


def test_targets_with_rows_and_without():
    dataset = with_row_ids(Rows(form=pair), in_target=True)
    for x, target in DataLoader(dataset, batch_size=4, shuffle=True):
        labels, rows = split_target(target)
        assert target.shape == (len(x), 2) and torch.equal(x[:, 0].long(), rows) and torch.equal(labels, rows % 3)
    for plain in (torch.tensor([0, 1]), torch.rand(4, 2), torch.zeros(3, 4, dtype=torch.long), [0, 1]):
        labels, rows = split_target(plain)
        assert labels is plain and rows is None


@needs_timm
@pytest.mark.parametrize("prefetcher", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_timm_loader(tmp_path, prefetcher, workers):
    """Pictures of one colour: the row, times ten. The loader sets its transform on what it is given."""
    from PIL import Image
    from timm.data import ImageDataset, create_loader

    for i in range(10):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i * 10,) * 3).save(tmp_path / str(i % 2) / f"{i}.png")
    inner = ImageDataset(str(tmp_path))
    options = {"no_aug": True, "is_training": True, "use_prefetcher": prefetcher, "num_workers": workers,
               "persistent_workers": workers > 0}  # fmt: skip
    loader = create_loader(with_row_ids(inner, in_target=True), (3, 16, 16), 5, mean=(0, 0, 0), std=(1, 1, 1),
                           device=torch.device("cpu"), **options)  # fmt: skip
    seen = []
    for x, target in loader:
        labels, rows = split_target(target)
        assert x.shape == (5, 3, 16, 16) and labels.shape == (5,) and target.dtype == torch.long
        for i, (picture, label) in enumerate(zip(x, labels.tolist(), strict=True)):
            own = int(rows[i])
            assert label == inner.reader[own][1]
            number = int(inner.filename(own, basename=True).removesuffix(".png"))
            assert float(picture.mean()) * 255 == pytest.approx(10 * number, abs=0.5)
        seen += rows.tolist()
    assert sorted(seen) == list(range(10))


@needs_timm
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda x: (x, x)])
def test_timm_fast_collate(kind):
    from timm.data.loader import fast_collate

    if isinstance(kind(np.zeros(1)), tuple) and importlib.util.find_spec("timm.task") is None:
        pytest.skip("older timm copies each target of several views as a number")
    dataset = with_row_ids([(kind(np.full((3, 4, 4), i, dtype=np.uint8)), 5 + i) for i in range(3)], in_target=True)
    x, target = fast_collate([dataset[i] for i in (2, 0)])
    labels, rows = split_target(target)
    copies = len(x) // 2
    assert (
        labels.tolist() == [7, 5] * copies
        and rows.tolist() == [2, 0] * copies
        and x[:, 0, 0, 0].tolist() == rows.tolist()
    )


def test_older_timm_collate():
    """timm before 1.0.31 makes targets so."""
    dataset = with_row_ids([(0, 4), (0, 6)], in_target=True)
    target = torch.tensor([dataset[i][1] for i in (1, 0)], dtype=torch.int64)
    assert [part.tolist() for part in split_target(target)] == [[6, 4], [1, 0]]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("dataset", [Stream(), iter([1]), (i for i in range(3))])
def test_a_stream_is_refused(dataset):
    with pytest.raises(TypeError, match=r"is streamed.*no trusted rows, no gate and no list of suspect labels"):
        with_row_ids(dataset)


@pytest.mark.parametrize(
    ("sample", "in_target", "error", "message"),
    [
        (3.0, False, ValueError, "a sample is a float: "),
        ((1, 2, 3), False, ValueError, "a tuple of 3: "),
        ({"sample_ids": 0}, False, ValueError, "has 'sample_ids' already"),
        ((1, 0.5), True, ValueError, "a target is 0.5"),
        ((1, torch.tensor([0.5, 0.5])), True, ValueError, "soft targets"),
    ],
)
def test_samples_that_do_not_fit(sample, in_target, error, message):
    with pytest.raises(error, match=message):
        with_row_ids([sample], in_target=in_target)[0]


def test_a_loader_is_no_data_set():
    with pytest.raises(TypeError, match=r"DataLoader\(with_row_ids\(dataset\), \.\.\.\)"):
        with_row_ids(DataLoader(Rows()))


def test_numbering_a_loader_and_back():
    loader = DataLoader(Rows(form=record), batch_size=4, shuffle=True)
    n, undo = number_samples(loader)
    assert n == 10 and all(torch.equal(batch["x"].long(), batch["sample_ids"]) for batch in loader)
    undo()
    assert all("sample_ids" not in batch for batch in loader)
