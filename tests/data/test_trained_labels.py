"""Class counts and trusted rows go by the labels that the loss sees, not by what a column or an attribute says."""

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset as Table
from models import MLP
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler
from trainers import callback, dataset, trainer

from iada_plugin import IADAConfig, IADAHead, MetaIADA, balanced_meta_split, with_row_ids
from iada_plugin.runtime.batches import meta_dataloader, trained_labels

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
OTHER = "is read with the label"


class Letters(Dataset):
    """As torchvision's EMNIST "letters": labels from 1, put right by a target_transform."""

    targets = (Y + 1).tolist()

    def __len__(self):
        return len(X)

    def __getitem__(self, k):
        return X[k] + torch.rand(1), self.targets[k] - 1


def swapped(batch):
    return {"input_ids": batch["input_ids"], "labels": [2 - v for v in batch["label"]]}


def table():
    return Table.from_dict({"input_ids": [[1]] * 24, "label": [0] * 16 + [1] * 4 + [2] * 4})


@pytest.mark.parametrize("data", [
    Letters(), Subset(Letters(), range(6)), ConcatDataset([Letters(), Letters()]), Subset(ConcatDataset([Letters(), Letters()]), [30, 3, 1]),
    table().with_transform(swapped), DataLoader(Letters(), 5), meta_dataloader(Letters(), 5, 0), meta_dataloader(Letters(), 5, 0, num_workers=1),
    DataLoader(TensorDataset(X, Y), 4, collate_fn=lambda s: (torch.stack([a for a, _ in s]), 2 - torch.stack([b for _, b in s]))),
])  # fmt: skip
def test_labels_that_are_changed_are_not_known(data):
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=OTHER):
        assert trained_labels(data) is None
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("data", [
    TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), 5), Subset(ConcatDataset([TensorDataset(X, Y)] * 2), range(24)),
    table().rename_column("label", "labels").with_transform(lambda batch: batch), with_row_ids(TensorDataset(X, Y)),
    DataLoader(TensorDataset(X, Y), 4, collate_fn=lambda s: (X, torch.eye(3)[Y])),
])  # fmt: skip
def test_labels_that_are_trained_on_or_cannot_be_told_from_them_are_known(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(trained_labels(data)) == 24


def test_a_look_at_samples_opens_no_file_for_good():
    class Lazy(Letters):
        file, targets = None, Y.tolist()

        def __getitem__(self, k):
            self.file = "open"
            return X[k], self.targets[k]

    lazy = Lazy()
    assert (
        len(trained_labels(lazy)) == len(trained_labels(DataLoader(Subset(lazy, range(24)), 5))) == 24
        and lazy.file is None
    )


def make(**options):
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"steps_per_epoch": 4, "epochs": 9, **options}
    return MetaIADA(model, optimizer, **options), optimizer


@pytest.mark.filterwarnings(f"ignore:.*{OTHER}")
def test_a_data_set_with_a_target_transform_trains():
    iada, _ = make(meta_loader=DataLoader(Letters(), 6), class_counts=[8, 8, 8], config=IADAConfig(warmup_epochs=1))
    iada.close()
    train = Letters()
    iada, optimizer = make(train_set=train, trusted_rows=range(9))
    for x, y, ids in DataLoader(with_row_ids(train), 6):
        optimizer.zero_grad()
        iada(iada.model(x), y, ids=ids).backward()
        optimizer.step()
    assert iada.statistics.label_count.tolist() == [8, 8, 8] and iada.step == 4


def test_trusted_rows_are_trained_with_the_label_they_are_trusted_for():
    iada, _ = make(train_set=TensorDataset(X, Y), trusted_rows=[0, 1, 2, 9])
    iada(iada.model(X), torch.where(torch.arange(24) == 5, 0, Y), ids=torch.arange(24))  # row 5 is not trusted
    with pytest.raises(ValueError, match="trusted row 9 is trained with the label 2, and the training set has 0"):
        iada(iada.model(X), torch.where(torch.arange(24) == 9, 2, Y), ids=torch.arange(24))


def test_which_tensor_holds_the_labels_is_not_guessed():
    three = TensorDataset(X, Y, (torch.arange(24) > 5).long())
    with pytest.raises(TypeError, match="pass them as an array"):
        balanced_meta_split(three, 2)
    assert np.bincount(Y[balanced_meta_split(Y, 2)[0]]).tolist() == [2, 2, 2]


def test_value_counts_of_pandas_are_put_in_the_order_of_labels():
    pandas = pytest.importorskip("pandas")
    counts = pandas.Series([0] * 2 + [1] * 9 + [2] * 4).value_counts()
    for expected, given in (([2, 9, 4], counts), ([2, 9, 1], counts.drop(2))):
        head = IADAHead(6, 3)
        head.set_class_counts(given)
        torch.testing.assert_close(head.log_prior.exp(), torch.tensor(expected) / sum(expected))
    iada, _ = make(meta_loader=[(X[Y < 2], Y[Y < 2])], class_counts=counts.drop(2), config=IADAConfig(warmup_epochs=1))
    torch.testing.assert_close(iada.head.log_prior.exp(), torch.tensor([2, 9, 1]) / 12)
    with pytest.raises(ValueError, match="its index must be the classes, 0 to 2"):
        head.set_class_counts(pandas.Series(["cat", "dog"]).value_counts())


def counted(tmp_path, train, **options):
    seen, found = callback(dataset(8, seed=7)), []
    run = trainer(tmp_path, seen, train=train, max_steps=8)
    for name, value in options.items():
        setattr(run, name, value)
    seen.on_epoch_end = lambda *a, **k: found.append(seen.engine.statistics.log_prior().exp())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{OTHER}")
        run.train()
    return found[0]


def test_the_trainer_counts_what_it_trains_on(tmp_path):
    train = dataset(32).map(lambda row, k: {"labels": int(k < 4)}, with_indices=True)
    direct = counted(tmp_path, train)
    torch.testing.assert_close(direct, torch.tensor([28, 4]) / 32)
    turned = train.with_transform(lambda b: {**b, "labels": [1 - v for v in b["labels"]]})
    torch.testing.assert_close(counted(tmp_path, turned), torch.tensor([5, 29]) / 34)
    sampler = WeightedRandomSampler([1.0] * 4 + [0.0] * 28, 32)
    drawn = counted(tmp_path, train, _get_train_sampler=lambda *_: sampler)
    torch.testing.assert_close(drawn, torch.tensor([1, 33]) / 34)


def test_a_split_of_labels_that_are_changed_is_refused():
    for data in (Letters(), table().with_transform(swapped)):
        with pytest.raises(ValueError, match=f"{OTHER}.*as an array"):
            balanced_meta_split(data, 2)


def test_a_lazy_column_is_read_at_once(monkeypatch):
    pytest.importorskip("datasets", minversion="4.0")  # before, ["label"] is a list, and the transform runs to make it
    column = table().with_transform(lambda batch: pytest.fail("the transform runs"))["label"]
    monkeypatch.setattr(type(column), "__iter__", lambda self: pytest.fail("row by row"), raising=False)
    meta, rest = balanced_meta_split(column, 2)
    assert len(meta) == 6 and len(rest) == 18
