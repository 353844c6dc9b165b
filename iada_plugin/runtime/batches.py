"""The endless stream of meta batches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from .capture import LABEL_KEYS
from .failures import MetaLoaderError
from .isolation import rng_state, seed_rng, set_rng_state
from .labels import labels_of
from .processes import rank, world_size


class EndlessBatches(Sampler[list[int]]):
    """Shuffled batches without end; batch k is a function of seed and k, so a resumed run goes on exactly.

    Args:
        size: number of samples.
        batch_size: over all processes, each of which gets its slice.
        seed: of the shuffles.
        with_seeds: yield ``(index, seed)`` for :class:`SeededSamples`.
    """

    def __init__(self, size: int, batch_size: int, seed: int, with_seeds: bool = False) -> None:
        self.size, self.batch_size, self.seed = size, min(batch_size, size), seed
        self.position, self.with_seeds = 0, with_seeds

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        number = self.position
        place = number * self.batch_size
        epoch, start = divmod(place, self.size)
        order = self._order(epoch)
        while True:
            batch = order[start : start + self.batch_size]
            start += self.batch_size
            if start >= self.size:
                epoch, start = epoch + 1, start - self.size
                order = self._order(epoch)
                batch = batch + order[:start]
            own = batch[rank() :: world_size()]
            first = (self.seed * 1_000_003 + number) * self.batch_size + rank()
            yield [(i, first + k * world_size()) for k, i in enumerate(own)] if self.with_seeds else own  # type: ignore[misc]
            number += 1


class SeededSamples(Dataset[Any]):
    """A data set whose samples, read in a worker process, are augmented from a seed of their own: what a worker has drawn
    before would be lost with it.

    Args:
        dataset: the map-style data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        seed_rng(torch.device("cpu"), seed % 2**32)
        return self.dataset[index]

    @property
    def targets(self) -> Tensor | None:
        """Labels, where they can be read at once."""
        return labels_of(self.dataset)


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
    with_workers = bool(options.get("num_workers"))
    sampler = EndlessBatches(len(dataset), batch_size, seed, with_workers)
    if sampler.batch_size < world_size():
        raise ValueError(
            f"a meta batch of {sampler.batch_size} samples cannot be shared by {world_size()} processes: meta_batch_size"
            f" counts over all processes (the meta set has {len(dataset)} samples)."
        )
    samples = SeededSamples(dataset) if with_workers else dataset
    return DataLoader(samples, batch_sampler=sampler, collate_fn=collate_fn, **options)


class MetaBatches:
    """Batches ``((args, kwargs), labels)`` on a device, from a loader that starts over whenever it ends.

    Which batch comes next is a function of ``position``, for every loader whose order depends on the random state at its
    start only (any `DataLoader` without a generator of its own): each pass over it starts from a known seed.

    Attributes:
        drawn: batches used so far.
        opened: seed under which the loader's present pass began.
        within: batches drawn in it.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise TypeError(f"meta_loader is a {type(loader).__name__}: pass a loader of batches (input, target).")
        if length_of(loader) == 0:
            raise ValueError("meta_loader is empty: IADA needs clean, balanced batches to learn its perturbations on.")
        self.loader, self.device = loader, device
        self.drawn, self.opened, self.within = 0, 0, 0
        self._iterator: Iterator[Any] | None = None
        self._waiting: Any = None

    def peek(self, seed: int) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Tensor]:
        """A first batch to look at; nothing is used up."""
        first = self.draw(seed)
        if self._iterator is not self.loader:  # one that cannot be iterated again keeps it for later
            self._iterator = self._waiting = None
            self.opened = self.within = 0
        return first

    def draw(self, seed: int) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Tensor]:
        """The next batch, read under ``seed``; the same one again until :meth:`commit`.

        Raises:
            ValueError: the loader yields nothing (any more).
            MetaLoaderError: it raised.
        """
        if self._waiting is None:
            seed_rng(self.device, seed)
            args, kwargs, labels = split_batch(self._read(seed))
            to = lambda t: t.to(self.device, non_blocking=True)  # noqa: E731
            self._waiting = tree_map_only(Tensor, to, ((args, kwargs), labels))
        return self._waiting  # type: ignore[no-any-return]

    def commit(self) -> None:
        """The batch drawn last was used."""
        self._waiting = None
        self.drawn += 1

    def close(self) -> None:
        """Let go of the loader's present pass, and so of its worker processes."""
        self._iterator = self._waiting = None

    def _read(self, seed: int) -> Any:
        for _ in range(2):
            try:
                if self._iterator is None:
                    self._open(seed)
                batch = next(self._iterator)  # type: ignore[arg-type]
            except StopIteration:
                self._iterator = None
                continue
            except Exception as error:
                self.drawn += 1  # it is left out
                self.within += not self.shared_out
                raise MetaLoaderError(f"reading a meta batch raised {type(error).__name__}: {error}") from error
            self.within += not self.shared_out
            return batch
        raise ValueError("meta_loader yields nothing (any more): pass a loader that can be iterated again and again.")

    def _open(self, seed: int) -> None:
        if self.shared_out:
            self.loader.batch_sampler.position = self.drawn  # type: ignore[attr-defined]
        else:
            self.opened, self.within = seed, 0
        self._iterator = self._iterate(seed)

    def _iterate(self, seed: int) -> Iterator[Any]:
        """The loader from its start. Seeded again afterwards, so that making it, which draws, leaves no trace in a batch."""
        seed_rng(self.device, seed)
        iterator = iter(self.loader)
        seed_rng(self.device, seed)
        return iterator

    @property
    def shared_out(self) -> bool:
        """The loader is :func:`meta_dataloader`'s, which can start anywhere and gives each process its share."""
        return isinstance(getattr(self.loader, "batch_sampler", None), EndlessBatches)

    @property
    def position(self) -> tuple[int, int, int]:
        """``drawn``, ``opened`` and ``within``, not counting a batch that was not used yet."""
        waiting = self._waiting is not None and not self.shared_out
        return self.drawn, self.opened, self.within - waiting

    def move_to(self, position: Sequence[int]) -> None:
        """Go on as from there; a loader other than :func:`meta_dataloader`'s reads again what it had read.

        Raises:
            ValueError: the loader is shorter than the one of ``position``; nothing is changed then.
        """
        if tuple(position) == self.position:
            return
        drawn, opened, within = position
        once = self._iterator is not None and self._iterator is self.loader  # cannot be read again
        if once and self.drawn:
            warnings.warn(
                "the meta_loader can be read only once and goes on where it is, not where the state was saved."
            )
        elif within:
            # One that can be read once was looked at already.
            self._iterator = self._replay(opened, within - once, self.loader if once else None)
        elif not once:
            self._iterator = None
        self._waiting = None
        self.drawn, self.opened, self.within = drawn, opened, within

    def _replay(self, seed: int, count: int, iterator: Any) -> Iterator[Any]:
        parts = (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None))
        if any(getattr(part, "generator", None) is not None for part in parts):
            warnings.warn(
                "the meta_loader draws from a generator of its own: restore that yourself, or the order of the meta batches"
                " is another one than before."
            )
        states = rng_state(self.device)
        try:
            iterator = self._iterate(seed) if iterator is None else iterator
            for k in range(count):
                try:
                    next(iterator)
                except StopIteration:
                    raise ValueError(
                        f"the state was saved after {count} batches of the meta_loader, which now ends after {k}: resume"
                        " with the same meta set and batch size."
                    ) from None
                except Exception:  # it was left out then, too
                    continue
            return iterator
        finally:
            set_rng_state(self.device, states)


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Positional arguments, keyword arguments and labels of a batch ``(input, target)`` or ``{..., "labels": ...}``.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS[:3]:
            if key in batch:
                return (), {k: v for k, v in batch.items() if k not in LABEL_KEYS}, _labels(batch[key])
        raise ValueError(f"a meta batch has no 'labels', only {', '.join(map(str, batch))}: name it so, or yield"
                         " (input, target).")  # fmt: skip
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch[0], _labels(batch[1])
        return ((), dict(inputs), labels) if isinstance(inputs, Mapping) else ((inputs,), {}, labels)
    raise ValueError(
        f"a meta batch is a {type(batch).__name__}: it must be (input, target) or a dict with 'labels'. Wrap your loader."
    )


#: Samples that are read to see whether labels are what the columns of a data set say.
LOOKED_AT = 16


def trained_labels(data: Any) -> Tensor | None:
    """:func:`labels_of` a data set or loader ``[N]``; ``None`` where they are unknown, or not those that its samples come with (with a
    warning)."""
    labels = labels_of(data)
    if labels is None or (wrong := changed_label(data, labels)) is None:
        return labels
    warnings.warn(
        f"{wrong}: they are not used, and classes are counted during the warm-up. class_counts gives the counts at once."
    )
    return None


def changed_label(data: Any, labels: Tensor) -> str | None:
    """Whether the samples of a data set or loader come with other labels than :func:`labels_of` it, in words: transforms and collators
    may change them. Read for that are a few samples, of different classes; where these cannot be read or have soft labels, ``None``."""
    dataset, collate = (data.dataset, data.collate_fn) if isinstance(data, DataLoader) else (data, None)
    dataset = dataset.dataset if isinstance(dataset, SeededSamples) else dataset
    if not len(labels) or not hasattr(dataset, "__getitem__"):
        return None
    first = np.unique(labels.numpy(), return_index=True)[1][: LOOKED_AT // 2]
    rows = np.union1d(first, np.linspace(0, len(labels) - 1, LOOKED_AT // 2).astype(int)).tolist()
    states = rng_state(torch.device("cpu"))
    try:
        dataset = copy.copy(
            dataset
        )  # a file that is opened with the first sample must not be shared with worker processes
        if isinstance(dataset, Subset):
            dataset.dataset = copy.copy(dataset.dataset)
        samples = [dataset[row] for row in rows]
        found = (
            torch.stack([split_batch(s)[2] for s in samples]) if collate is None else split_batch(collate(samples))[2]
        )
    except Exception:  # said where it is trained on
        return None
    finally:
        set_rng_state(torch.device("cpu"), states)
    if found.shape != (len(rows),) or found.is_floating_point() or bool((found == labels[rows]).all()):
        return None
    k = int((found != labels[rows]).int().argmax())
    return (
        f"row {rows[k]} of a {type(dataset).__name__} is read with the label {int(found[k])}, and its labels say {int(labels[rows[k]])} (a"
        " transform or collator changes them)"
    )


def _labels(labels: Any) -> Tensor:
    """Labels as a tensor, ``[M, 1]`` flattened."""
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a meta batch's labels are no numbers ({error}): they must be class indices [M].") from error
    return labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
