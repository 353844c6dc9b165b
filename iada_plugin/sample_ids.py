"""Row numbers of the training samples in the batches of a `DataLoader`, for a report."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

#: Key of the row numbers ``[N]`` in a batch.
SAMPLE_IDS = "sample_ids"


class _Numbered(Dataset[Any]):
    """A map-style data set whose samples come with their number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if hasattr(dataset, "__getitems__"):  # a whole batch at once
            self.__getitems__ = self._get_batch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def _get_batch(self, indices: list[int]) -> list[tuple[int, Any]]:
        return list(zip(indices, self.dataset.__getitems__(indices), strict=True))

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _NumberedCollate:
    """Collates the samples, and adds their numbers to a batch that is a mapping without them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[int, Any]]) -> Any:
        numbers, rows = zip(*samples, strict=True)
        batch = self.collate(list(rows))
        if isinstance(batch, MutableMapping):
            batch.setdefault(SAMPLE_IDS, torch.tensor(numbers))
        return batch


def number_samples(loader: Any) -> Callable[[], None] | None:
    """Add row numbers to the batches of ``loader`` (a `DataLoader`, or Accelerate's around one), under :data:`SAMPLE_IDS`.

    Returns:
        What takes them off again; ``None`` where there are no row numbers (an iterable data set, another loader).
    """
    inner = getattr(loader, "base_dataloader", loader)
    if not isinstance(inner, DataLoader) or isinstance(inner.dataset, IterableDataset) or inner.batch_sampler is None:
        return None
    dataset, collate = inner.dataset, inner.collate_fn
    # Past DataLoader's guard, which is there for its sampler: the wrapper has the same length and order.
    vars(inner)["dataset"], inner.collate_fn = _Numbered(dataset), _NumberedCollate(collate)

    def undo() -> None:
        vars(inner)["dataset"], inner.collate_fn = dataset, collate

    return undo
