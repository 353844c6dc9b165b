"""The endless stream of meta batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Sampler

from .capture import split_batch
from .distributed import rank, world_size


class EndlessBatches(Sampler[list[int]]):
    """Shuffled batches without end; batch k is a function of seed and k, so a resumed run goes on exactly.

    Args:
        size: number of samples.
        batch_size: over all processes, each of which gets its slice.
        seed: of the shuffles.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = size, min(batch_size, size), seed
        self.position = 0

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        place = self.position * self.batch_size
        epoch, start = divmod(place, self.size)
        order = self._order(epoch)
        while True:
            batch = order[start : start + self.batch_size]
            start += self.batch_size
            if start >= self.size:
                epoch, start = epoch + 1, start - self.size
                order = self._order(epoch)
                batch = batch + order[:start]
            yield batch[rank() :: world_size()]


def length_of(loader: Any) -> int | None:
    """``len(loader)``, or ``None`` where it has no end or does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def meta_dataloader(
    dataset: Any, batch_size: int, seed: int, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Any
) -> DataLoader:
    """An endless, seeded, rank-sliced `DataLoader` over a meta set. ``options`` go to the `DataLoader`.

    Raises:
        ValueError: the set is empty, or a batch has fewer samples than there are processes.
    """
    if len(dataset) == 0:
        raise ValueError(
            "the meta set is empty: IADA learns its perturbations on it. Pass at least one sample a class."
        )
    sampler = EndlessBatches(len(dataset), batch_size, seed)
    if sampler.batch_size < world_size():
        raise ValueError(
            f"a meta batch of {sampler.batch_size} samples cannot be shared by {world_size()} processes: meta_batch_size"
            f" counts over all processes (the meta set has {len(dataset)} samples)."
        )
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn, **options)


class MetaBatches:
    """Iterator over ``((args, kwargs), labels)`` on a device, starting over whenever the loader ends.

    Raises:
        ValueError: from ``next``, when the loader yields nothing at all.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        if length_of(loader) == 0:
            raise ValueError("meta_loader is empty: IADA needs clean, balanced batches to learn its perturbations on.")
        self.loader, self.device, self.drawn = loader, device, 0
        self._iterator: Iterator[Any] | None = None
        self._first: Any = None

    def __iter__(self) -> MetaBatches:
        return self

    def peek(self) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Tensor]:
        """The first batch, which ``next`` gives again."""
        self.open()
        one_shot = self._iterator is self.loader
        first = next(self)
        self.drawn = 0
        self._iterator = self.loader if one_shot else None  # type: ignore[assignment]
        self._first = first if one_shot else None
        return first

    def open(self) -> None:
        """Make the loader's iterator, if there is none; a `DataLoader` draws a random number for it."""
        if self._iterator is None:
            self._iterator = iter(self.loader)

    def __next__(self) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Tensor]:
        if self._first is not None:
            first, self._first = self._first, None
            self.drawn += 1
            return first
        for _ in range(2):
            self.open()
            try:
                batch = next(self._iterator)  # type: ignore[arg-type]
                break
            except StopIteration:
                self._iterator = None
        else:
            raise ValueError(
                "meta_loader yields nothing (any more): pass a loader that can be iterated again and again."
            )
        self.drawn += 1
        args, kwargs, labels = tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), split_batch(batch))
        return (args, kwargs), labels

    def skip_to(self, drawn: int) -> None:
        """Go on as after ``drawn`` batches: exact with :func:`meta_dataloader`, else from the loader's start."""
        self.drawn = drawn
        self._iterator = self._first = None
        sampler = getattr(self.loader, "batch_sampler", None)
        if isinstance(sampler, EndlessBatches):
            sampler.position = drawn
