"""Row numbers of the training samples in the batches of a `DataLoader`: what a sample's history goes by."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .labels import labels_of

#: Key of the row numbers ``[N]`` in a batch.
SAMPLE_IDS = "sample_ids"


class _Around(Dataset[Any]):
    """A map-style data set around another one. Whatever else is read from it or written to it reaches that one."""

    def __init__(self, dataset: Any) -> None:
        self.__dict__["_numbered"] = dataset

    def __len__(self) -> int:
        return len(self._numbered)

    def _samples(self, indices: list[Any]) -> Any:
        """What a loader asks for: the samples of a batch."""
        inner = self._numbered
        return inner.__getitems__(indices) if hasattr(inner, "__getitems__") else [inner[i] for i in indices]

    def __getattr__(self, name: str) -> Any:
        if name == "_numbered" or name.startswith("__"):  # not there yet, in a copy; and what makes the copy
            raise AttributeError(name)
        return getattr(self._numbered, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._numbered, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._numbered, name)


class WithRowIds(_Around):
    """See :func:`with_row_ids`."""

    def __init__(self, dataset: Any, in_target: bool) -> None:
        super().__init__(dataset)
        self.__dict__["_in_target"] = in_target

    def __getitem__(self, index: Any) -> Any:
        return self._numbered_sample(self._numbered[index], index)

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        """What a loader asks for: the samples of a batch."""
        samples = self._samples(indices)
        if not isinstance(samples, list) or len(samples) != len(indices):
            raise TypeError(f"{type(self._numbered).__name__}.__getitems__ gave a {type(samples).__name__} for {len(indices)} rows:"
                            " with_row_ids needs a list of as many samples.")  # fmt: skip
        return [self._numbered_sample(sample, i) for sample, i in zip(samples, indices, strict=True)]

    @property
    def targets(self) -> Any:
        """The data set's own, or its labels where they can be read at once."""
        inner = self._numbered
        return inner.targets if hasattr(inner, "targets") else labels_of(inner)

    def _numbered_sample(self, sample: Any, index: Any) -> Any:
        try:
            row = operator.index(index)
        except TypeError:
            raise TypeError(f"index {index!r:.80} is no row number: with_row_ids reads one row at a time.") from None
        row += len(self) if row < 0 else 0
        if isinstance(sample, Mapping):
            if SAMPLE_IDS in sample:
                raise ValueError(f"a sample has {SAMPLE_IDS!r} already: wrap a data set once, or rename that column.")
            return {**sample, SAMPLE_IDS: row}
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            size = f" of {len(sample)}" if isinstance(sample, (tuple, list)) else ""
            raise ValueError(
                f"a sample is a {type(sample).__name__}{size}: with_row_ids needs (input, target), or a dict."
            )
        if not self._in_target:
            return (*sample, row)
        try:
            label = operator.index(sample[1])
        except TypeError:
            raise ValueError(
                f"a target is {sample[1]!r:.80}: in_target=True needs a class index (switch off what makes soft targets)."
            ) from None
        # An array: both torch's collate function and every timm's make [N, 2] of it.
        return sample[0], np.array([label, row], dtype=np.int64)


def with_row_ids(dataset: Any, *, in_target: bool = False) -> WithRowIds:
    """The data set with each sample's row number: ``(input, target)`` becomes ``(input, target, row)``, and a dict gets the key
    "sample_ids". Nothing is copied, and whatever else is read from or written to the data set reaches it.

    Wrap the whole training set, last: a `Subset` of the result keeps the row numbers of the whole, the result of a `Subset` has its
    own. Not needed under the Hugging Face Trainer, where the callback sees to it.

    Args:
        dataset: map-style, of ``(input, target)`` or dicts.
        in_target: for a loader whose samples must be ``(input, target)``, such as timm's: the target is ``[label, row]``, of which
            the loader makes ``[N, 2]``, for :func:`split_target`. Mixup and cutmix must be off.

    Raises:
        TypeError: a streamed data set, whose samples have no row number.

    Example:
        >>> loader = DataLoader(with_row_ids([(0.5, 1), (0.7, 0)]), batch_size=2)
        >>> for input, target, rows in loader:
        ...     print(target, rows)
        tensor([1, 0]) tensor([0, 1])
    """
    streamed = isinstance(dataset, IterableDataset) or type(dataset).__name__ == "IterableDataset"
    if isinstance(dataset, DataLoader):
        raise TypeError(
            "with_row_ids was given a DataLoader: wrap its data set, DataLoader(with_row_ids(dataset), ...)."
        )
    if streamed or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"a {type(dataset).__name__} is streamed: its samples have no row number. Without them there are no sample histories, and"
            " so no trusted rows, no gate and no list of suspect labels; the rest works. Load it as a map-style data set for them."
        )
    return WithRowIds(dataset, in_target)


def check_rows(ids: Any, n: int, num_rows: int) -> None:
    """Row numbers are integers ``[n]`` below ``num_rows``; their range is looked at on a CPU only.

    Raises:
        ValueError: naming what is wrong.
    """
    integers = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool
    if not integers or ids.shape != (n,):
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"ids are {found}: pass the row numbers of the batch's {n} samples, integers [{n}].")
    if ids.device.type == "cpu":
        wrong = ids[(ids < 0) | (ids >= num_rows)]
        if wrong.numel():
            raise ValueError(
                f"row {int(wrong[0])} is not in 0..{num_rows - 1}: ids are row numbers of the training set, which has {num_rows} rows."
            )


def split_target(target: Any) -> tuple[Any, Tensor | None]:
    """Labels ``[N]`` and row numbers ``[N]`` of a target ``[N, 2]`` of ``with_row_ids(dataset, in_target=True)``.

    Any other target, such as labels ``[N]`` or soft ones ``[N, C]``, is given back as it is, with ``None``. (One-hot targets of whole
    numbers and two classes look alike and are no targets for IADA.)
    """
    if isinstance(target, Tensor) and target.dtype == torch.int64 and target.dim() == 2 and target.shape[1] == 2:
        return target[:, 0].contiguous(), target[:, 1].contiguous()
    return target, None


class _NumberedRows(list[Any]):
    """The samples of a batch, with their row numbers."""

    numbers: list[int]


class _Numbered(_Around):
    """A map-style data set that tells the loader, and nobody else, the row numbers of a batch."""

    def __getitem__(self, index: Any) -> Any:
        return self._numbered[index]

    def __getitems__(self, indices: list[Any]) -> Any:
        """What a loader asks for: the samples of a batch."""
        rows = self._samples(indices)
        whole = isinstance(rows, list) and len(rows) == len(indices)
        if not whole or not all(isinstance(i, int) for i in indices):
            return rows  # the data set, or its sampler, has a form of its own
        found = _NumberedRows(rows)
        found.numbers = indices
        return found


class _NumberedCollate:
    """Collates the samples, and adds their numbers to a batch that is a mapping without them."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        numbered = isinstance(samples, _NumberedRows)
        batch = self.collate(list(samples) if numbered else samples)
        if numbered and isinstance(batch, MutableMapping):
            batch.setdefault(SAMPLE_IDS, torch.tensor(samples.numbers))
        return batch


def is_numbered(loader: Any) -> bool:
    """Whether ``loader`` draws row numbers."""
    inner = getattr(loader, "base_dataloader", loader)
    mapped = isinstance(inner, DataLoader) and not isinstance(inner.dataset, IterableDataset)
    return mapped and inner.batch_sampler is not None


def number_samples(loader: Any) -> tuple[int, Callable[[], None]] | None:
    """Add row numbers to the batches of ``loader`` (a `DataLoader`, or Accelerate's around one), under :data:`SAMPLE_IDS`.

    Returns:
        Number of rows, and what takes them off again; ``None`` where there are no row numbers (an iterable data set, another
        loader).
    """
    if not is_numbered(loader):
        return None
    inner = getattr(loader, "base_dataloader", loader)
    dataset, collate = inner.dataset, inner.collate_fn

    def put(dataset: Any, collate: Any) -> None:
        # Past DataLoader's guard, which is there for its sampler: the wrapper has the same length and order.
        vars(inner)["dataset"], inner.collate_fn = dataset, collate
        if getattr(inner, "persistent_workers", False):
            inner._iterator = None  # whose workers have the other ones

    put(_Numbered(dataset), _NumberedCollate(collate))
    return len(dataset), lambda: put(dataset, collate)
