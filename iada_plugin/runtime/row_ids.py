"""Row numbers of the training samples in the batches of a `DataLoader`, for a report."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

#: Key of the row numbers ``[N]`` in a batch.
SAMPLE_IDS = "sample_ids"


class _NumberedRows(list[Any]):
    """The samples of a batch, with their row numbers."""

    numbers: list[int]


class _Numbered(Dataset[Any]):
    """A map-style data set that tells the loader, and nobody else, the row numbers of a batch. Whatever is read from it or
    written to it reaches the data set itself."""

    def __init__(self, dataset: Any) -> None:
        self.__dict__["_numbered"] = dataset

    def __len__(self) -> int:
        return len(self._numbered)

    def __getitem__(self, index: Any) -> Any:
        return self._numbered[index]

    def __getitems__(self, indices: list[Any]) -> Any:
        """What a loader asks for: the samples of a batch."""
        inner = self._numbered
        rows = inner.__getitems__(indices) if hasattr(inner, "__getitems__") else [inner[i] for i in indices]
        whole = isinstance(rows, list) and len(rows) == len(indices)
        if not whole or not all(isinstance(i, int) for i in indices):
            return rows  # the data set, or its sampler, has a form of its own
        found = _NumberedRows(rows)
        found.numbers = indices
        return found

    def __getattr__(self, name: str) -> Any:
        if name == "_numbered":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self._numbered, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._numbered, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._numbered, name)


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


def number_samples(loader: Any) -> tuple[int, Callable[[], None]] | None:
    """Add row numbers to the batches of ``loader`` (a `DataLoader`, or Accelerate's around one), under :data:`SAMPLE_IDS`.

    Returns:
        Number of rows, and what takes them off again; ``None`` where there are no row numbers (an iterable data set, another
        loader).
    """
    inner = getattr(loader, "base_dataloader", loader)
    if not isinstance(inner, DataLoader) or isinstance(inner.dataset, IterableDataset) or inner.batch_sampler is None:
        return None
    dataset, collate = inner.dataset, inner.collate_fn

    def put(dataset: Any, collate: Any) -> None:
        # Past DataLoader's guard, which is there for its sampler: the wrapper has the same length and order.
        vars(inner)["dataset"], inner.collate_fn = dataset, collate
        if getattr(inner, "persistent_workers", False):
            inner._iterator = None  # whose workers have the other ones

    put(_Numbered(dataset), _NumberedCollate(collate))
    return len(dataset), lambda: put(dataset, collate)
