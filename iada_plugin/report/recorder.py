"""What happens to the samples during training, kept at bounded memory: the data behind a report."""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime.processes import world_size
from .streams import Curve, Reservoir

#: Batches wait on their device for so many optimizer steps before they are copied.
_STEPS_WAITING = 64
#: Ids are below this by default.
MAX_ID = 2_000_000
#: One value a sample and epoch; and one a sample.
_PER_EPOCH = ("epsilon", "loss", "contradicted")
_RINGS = (*_PER_EPOCH, "label", "predicted")
_PLAIN = ("seconds", "first_step", "last_step", "with_ids", "_held", "_epoch", "_world_size")
_KINDS = ("warm-up", "IADA loss", "meta step")


class Recorder:
    """Follows the training batches after the warm-up.

    Of every sample with an id: epsilon, loss and whether the model contradicted the label in each of the last ``epochs`` epochs, its
    label and the last prediction (``9 epochs + 8`` bytes a sample). Of a random part of all samples: the characteristics too. Of every
    epoch: how many samples of each class were adversarial, and the time of a step. In several processes each follows its own
    batches, and :meth:`merged` puts them together.

    Args:
        num_classes: C.
        num_characteristics: K.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: how many of the last epochs are kept.
        capacity: rows with characteristics, over these epochs.
        max_id: ids are below this.
        true_labels: ``[n]`` true label of the sample of each id, where it is known.
        step: optimizer steps so far.
    """

    def __init__(
        self,
        num_classes: int,
        num_characteristics: int,
        steps_per_epoch: float,
        *,
        epochs: int = 5,
        capacity: int = 10_000,
        max_id: int = MAX_ID,
        true_labels: Any = None,
        step: int = 0,
    ) -> None:
        self.num_classes, self.steps_per_epoch, self.epochs, self.max_id = num_classes, steps_per_epoch, epochs, max_id
        self.true_labels = None if true_labels is None else np.asarray(true_labels).astype(np.int64)
        self._limit = max_id if true_labels is None else min(max_id, len(true_labels))
        self.with_ids: bool | None = None  # not known before the first batch
        self._capacity, self._part = capacity, max(1, capacity // epochs)
        self._world_size = world_size()
        self._columns = 4 + num_characteristics
        self.reservoirs: dict[int, Reservoir] = {}
        #: Per epoch: ``[C, 3]`` samples, adversarial ones and sum of epsilon of each class; ``[2, 3]`` of right and wrong labels.
        self.by_class: dict[int, np.ndarray] = {}
        self.by_truth: dict[int, np.ndarray] = {}
        self.meta_loss = Curve()
        #: Per epoch and kind of step: first quartile, median and third quartile of its seconds.
        self.seconds: dict[int, dict[str, list[float]]] = {}
        self.first_step: int | None = None
        self.last_step = step
        self.epsilon, self.loss = (np.full((epochs, 0), np.nan, np.float32) for _ in range(2))
        self.contradicted = np.zeros((epochs, 0), bool)
        self.label, self.predicted = (np.zeros(0, np.int32) for _ in range(2))
        self._held: dict[int, int] = {}  # which epoch each row of the rings holds
        self._waiting: list[list[Tensor]] = []
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._steps = 0
        self._epoch = int(step // steps_per_epoch)  # of the batches to come
        self._times: dict[str, Reservoir] = {}
        self._clock: float | None = None

    # ------------------------------------------------------------------------------------------------ from the engine

    def check(self, ids: Tensor | None, n: int) -> None:
        """The ids of a batch of ``n`` samples can be used.

        Raises:
            ValueError: they are no row numbers ``[n]``, or some batches have them and others not.
        """
        if ids is not None:
            if not are_row_numbers(ids, n):
                found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(f"ids are {found}: pass the row numbers of the batch's {n} samples, integers [{n}].")
            if ids.device.type == "cpu":  # else when they are copied
                _check_range(ids.numpy(), self._limit)
        if self.with_ids is None:
            if self.true_labels is not None and ids is None:
                raise ValueError(
                    "true_labels are known by sample id: pass ids= with each batch, or leave true_labels out."
                )
            self.with_ids = ids is not None
            if ids is None:
                warnings.warn(
                    "the batches have no sample ids: the report will name no suspects. Pass iada(output, target, ids=rows), the row"
                    " numbers of the batch in the training set."
                )
        if self.with_ids != (ids is not None):
            raise ValueError("some batches have sample ids and others not: pass ids= with all of them, or with none.")

    def see(self, samples: dict[str, Tensor], logits: Tensor, ids: Tensor | None) -> list[Tensor]:
        """What is kept of a training batch until its step is over: labels, predictions, epsilon and loss ``[N]``, characteristics
        ``[N, K]`` and ids ``[N]``, of logits ``[N, C]``. The user may write the next batch into the same labels and ids."""
        columns = [
            samples["labels"].clone(),
            logits.detach().argmax(dim=1),
            samples["epsilon"].detach(),
            samples["loss"],
        ]
        return [*columns, samples["f"], *([] if ids is None else [ids.clone()])]

    def forget_ids(self) -> None:
        """Go on without ids, as if no batch had had any."""
        self.with_ids, self.true_labels = False, None
        self._waiting = [columns[:5] for columns in self._waiting]

    def commit(self, step: Any, samples: dict[str, Tensor]) -> None:
        """A step (:class:`iada_plugin.step.Step`) is over."""
        self._waiting += [columns for batch in step.seen for observer, columns in batch if observer is self]
        if step.meta is not None:
            self._losses.append(step.meta)
        self._end_step(step.number, 2 if step.meta is not None else int(step.augmented))

    def _end_step(self, step: int, kind: int) -> None:
        """Optimizer step ``step`` (from 0) is over: 0 one of the warm-up, 1 without a meta step, 2 with one."""
        now = time.perf_counter()
        epoch, following = int(step // self.steps_per_epoch), int((step + 1) // self.steps_per_epoch)
        if self._clock is not None:
            name = _KINDS[kind]
            if name not in self._times:
                self._times[name] = Reservoir(2000, 1)
            self._times[name].add(np.array([[now - self._clock]]))
        self._clock = now
        self.last_step = step
        self._steps += 1
        if kind and self.first_step is None:
            self.first_step = step
        self._epoch = epoch
        if self._steps >= _STEPS_WAITING or following != epoch:
            self.drain()
        if following != epoch:
            self._note_times()
            self._times, self._epoch = {}, following

    def drain(self) -> None:
        """Take in what waits on the device."""
        waiting, self._waiting = self._waiting, []
        losses, self._losses, self._steps = self._losses, [], 0
        if losses:
            values, fine = (
                torch.stack([t.detach().to(torch.float32) for t in part]).cpu() for part in zip(*losses, strict=True)
            )
            for value in values[fine > 0].tolist():
                self.meta_loss.add(value)
        if not waiting:
            return
        labels, predicted, epsilon, loss, f, *ids = (
            torch.cat(part).cpu().numpy() for part in zip(*waiting, strict=True)
        )
        good = np.isfinite(epsilon) & np.isfinite(loss) & np.isfinite(f).all(axis=1)
        labels, predicted, epsilon, loss, f, *ids = (part[good] for part in (labels, predicted, epsilon, loss, f, *ids))
        if not len(labels):
            return
        _add_counts(self.by_class, self._epoch, labels, epsilon, self.num_classes)
        number = ids[0].astype(np.int64) if ids else np.full(len(labels), -1)
        if ids:
            self._keep(number, labels, predicted, epsilon, loss)
            if self.true_labels is not None:
                wrong = (self.true_labels[number] != labels).astype(np.int64)
                _add_counts(self.by_truth, self._epoch, wrong, epsilon, 2)
        if self._epoch not in self.reservoirs:
            for old in [e for e in self.reservoirs if e <= self._epoch - self.epochs]:
                del self.reservoirs[old]
            self.reservoirs[self._epoch] = Reservoir(self._part, self._columns, seed=self._epoch)
        self.reservoirs[self._epoch].add(np.column_stack([number, labels, epsilon, loss, f]))

    def _keep(
        self, ids: np.ndarray, labels: np.ndarray, predicted: np.ndarray, epsilon: np.ndarray, loss: np.ndarray
    ) -> None:
        _check_range(ids, self._limit)
        highest = int(ids.max())
        if highest >= self.label.size:
            self._grow(max(highest + 1, min(2 * self.label.size, self._limit)))
        row = self._epoch % self.epochs
        if self._held.get(row) != self._epoch:
            self._held[row] = self._epoch
            self.epsilon[row], self.loss[row] = np.nan, np.nan
        self.epsilon[row, ids], self.loss[row, ids] = epsilon, loss
        self.contradicted[row, ids] = predicted != labels
        self.label[ids], self.predicted[ids] = labels, predicted

    def _grow(self, size: int) -> None:
        more = size - self.label.size
        for name in _PER_EPOCH:
            values = getattr(self, name)
            setattr(
                self, name, np.pad(values, ((0, 0), (0, more)), constant_values=0 if values.dtype == bool else np.nan)
            )
        self.label, self.predicted = (np.pad(t, (0, more), constant_values=-1) for t in (self.label, self.predicted))

    def _note_times(self) -> None:
        if self._times:
            quartiles = {k: np.quantile(r.rows, [0.25, 0.5, 0.75]).tolist() for k, r in self._times.items()}
            self.seconds[self._epoch] = quartiles

    # -------------------------------------------------------------------------------------------------- for the report

    def merged(self) -> Recorder:
        """What all processes have seen, in each of them; has to be called in all.

        Raises:
            RuntimeError: there are not as many processes as in training.
        """
        if world_size() != self._world_size:
            raise RuntimeError(
                f"{self._world_size} processes have trained, of which {world_size()} can be asked what they have seen: call"
                " suspects() and write() before dist.destroy_process_group()."
            )
        if world_size() == 1:
            self.drain()
            self._note_times()
            return self
        own = self.state_dict()
        parts: list[dict[str, Any]] = [{} for _ in range(world_size())]
        dist.all_gather_object(parts, own)
        whole, *others = (self._copy_of(part) for part in parts)
        for other in others:
            whole._join(other)
        return whole

    def _copy_of(self, state: dict[str, Any]) -> Recorder:
        found = Recorder(self.num_classes, self._columns - 4, self.steps_per_epoch, epochs=self.epochs, capacity=self._capacity,
                         max_id=self.max_id, true_labels=self.true_labels)  # fmt: skip
        found.load_state_dict(state)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What this process has seen, for a run that is resumed: tensors, numbers and lists, fit for ``torch.load``'s
        ``weights_only``."""
        self.drain()
        self._note_times()
        found: dict[str, Any] = {name: torch.from_numpy(getattr(self, name).copy()) for name in _RINGS}
        for name in ("by_class", "by_truth"):
            found[name] = {k: torch.from_numpy(v.copy()) for k, v in getattr(self, name).items()}
        found["reservoirs"] = {k: (torch.from_numpy(r.rows.copy()), r.seen) for k, r in self.reservoirs.items()}
        found["meta_loss"] = self.meta_loss.state()
        for name in _PLAIN:
            found[name] = copy.deepcopy(getattr(self, name))
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it is of other classes, characteristics or ``epochs``, or of one of another number of processes.
        """
        rows = [r for r, _ in state["reservoirs"].values()]
        same = all(v.shape[0] == self.num_classes for v in state["by_class"].values())
        same &= all(r.shape[1] == self._columns for r in rows) and state["epsilon"].shape[0] == self.epochs
        if not same or state["_world_size"] != self._world_size:
            raise ValueError(
                "this state of a report is of other classes, characteristics, epochs or processes than this one has."
            )
        for name in _RINGS:
            setattr(self, name, state[name].numpy().copy())
        for name in ("by_class", "by_truth"):
            setattr(self, name, {k: v.numpy().copy() for k, v in state[name].items()})
        for epoch, (kept, seen) in state["reservoirs"].items():
            self.reservoirs[epoch] = Reservoir(self._part, self._columns, seed=epoch)
            self.reservoirs[epoch].fill(kept.numpy(), seen)
        self.meta_loss = Curve.of(state["meta_loss"])
        for name in _PLAIN:
            setattr(self, name, copy.deepcopy(state[name]))

    def _join(self, other: Recorder) -> None:
        """Add what another process has seen."""
        for own, theirs in ((self.by_class, other.by_class), (self.by_truth, other.by_truth)):
            for epoch, counts in theirs.items():
                own[epoch] = own[epoch] + counts if epoch in own else counts
        for epoch, part in other.reservoirs.items():
            if epoch not in self.reservoirs:
                self.reservoirs[epoch] = part
                continue
            # As many rows of each as it has seen a share of all.
            seen = self.reservoirs[epoch].seen + part.seen
            rows = [_share(r, min(self._part, seen), seen) for r in (self.reservoirs[epoch], part)]
            self.reservoirs[epoch] = Reservoir(self._part, self._columns, seed=epoch)
            self.reservoirs[epoch].fill(np.concatenate(rows), seen)
        size = max(self.label.size, other.label.size)
        self._grow(size)
        other._grow(size)
        known = other.label >= 0
        self.label[known], self.predicted[known] = other.label[known], other.predicted[known]
        for row, epoch in other._held.items():
            if epoch > self._held.get(row, -1):
                self._held[row] = epoch
                self.epsilon[row], self.loss[row] = np.nan, np.nan
            if epoch == self._held[row]:
                seen = ~np.isnan(other.epsilon[row])
                for name in _PER_EPOCH:
                    getattr(self, name)[row, seen] = getattr(other, name)[row, seen]

    def rows(self) -> dict[str, np.ndarray]:
        """A random part of the samples of the last epochs: id (-1 where not known), label, epsilon and loss ``[R]``, and the
        characteristics ``[R, K]``."""
        parts = [r.rows for _, r in sorted(self.reservoirs.items())]
        kept = np.concatenate(parts) if parts else np.empty((0, self._columns))
        return {
            "id": kept[:, 0].astype(int),
            "label": kept[:, 1].astype(int),
            "epsilon": kept[:, 2],
            "loss": kept[:, 3],
            "f": kept[:, 4:],
        }

    def samples(self) -> dict[str, np.ndarray]:
        """Every sample with an id that was seen in the last epochs: id, label, predicted, epochs (how many of the last ones),
        mean epsilon, mean loss, and the share of epochs in which the model contradicted the label, ``[S]`` each."""
        seen = ~np.isnan(self.epsilon)
        ids = np.flatnonzero(seen.any(axis=0))
        count = seen[:, ids].sum(axis=0)
        mean = (np.nansum(t[:, ids], axis=0, dtype=np.float64) / count for t in (self.epsilon, self.loss))
        found = dict(zip(("epsilon", "loss"), mean, strict=True))
        found["contradicted"] = (self.contradicted & seen)[:, ids].sum(axis=0) / count
        found |= {
            "id": ids,
            "label": self.label[ids].astype(int),
            "predicted": self.predicted[ids].astype(int),
            "epochs": count,
        }
        if self.true_labels is not None:
            found["true_label"] = self.true_labels[ids]
        return found


def _add_counts(into: dict[int, np.ndarray], epoch: int, group: np.ndarray, epsilon: np.ndarray, groups: int) -> None:
    counts = np.stack([np.bincount(group, w, groups) for w in (None, epsilon > 0, epsilon)], axis=1)
    into[epoch] = into[epoch] + counts if epoch in into else counts


def are_row_numbers(ids: Any, n: int) -> bool:
    """Whether ``ids`` are integers ``[n]``."""
    integers = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool
    return integers and ids.shape == (n,)


def _check_range(ids: np.ndarray, limit: int) -> None:
    wrong = ids[(ids < 0) | (ids >= limit)]
    if wrong.size:
        raise ValueError(
            f"sample id {wrong[0]} is not in 0..{limit - 1}: ids are row numbers of the training set, below the number of"
            " true_labels where these are given, and below max_id."
        )


def _share(reservoir: Reservoir, wanted: int, of: int) -> np.ndarray:
    rows = np.random.default_rng(0).permutation(reservoir.rows)
    return rows[: round(wanted * reservoir.seen / of)]
