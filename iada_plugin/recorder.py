"""What happens to the samples during training, kept at bounded memory: the data behind a report."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import world_size
from .streams import Curve, Reservoir

#: Batches wait on their device for so many optimizer steps before they are copied.
_STEPS_WAITING = 64
#: One value a sample, or one a sample and epoch.
_RINGS = ("epsilon", "loss", "contradicted", "label", "predicted")
_KINDS = ("warm-up", "IADA loss", "meta step")


class Recorder:
    """Follows the training batches after the warm-up.

    Of every sample with an id: epsilon, loss and whether the model contradicted the label in each of the last ``epochs`` epochs, its label
    and the last prediction
    (about ``9 epochs + 8`` bytes a sample). Of a random part of all samples: the characteristics too. Of every epoch: how
    many samples of each class were adversarial, and the time of a step. In several processes each follows its own batches, and
    :meth:`merged` puts them together.

    Args:
        num_classes: C.
        num_characteristics: K.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: how many of the last epochs are kept.
        capacity: rows with characteristics, over these epochs.
        max_id: ids are below this.
        true_labels: ``[n]`` true label of the sample of each id, where it is known.
    """

    def __init__(
        self,
        num_classes: int,
        num_characteristics: int,
        steps_per_epoch: float,
        *,
        epochs: int = 5,
        capacity: int = 10_000,
        max_id: int = 2_000_000,
        true_labels: Any = None,
    ) -> None:
        self.num_classes, self.steps_per_epoch, self.epochs, self.max_id = num_classes, steps_per_epoch, epochs, max_id
        self.true_labels = None if true_labels is None else np.asarray(true_labels).astype(np.int64)
        self._limit = max_id if true_labels is None else min(max_id, len(true_labels))
        self.with_ids: bool | None = None  # not known before the first batch
        self._part = max(1, capacity // epochs)
        self._columns = 4 + num_characteristics
        self.reservoirs: dict[int, Reservoir] = {}
        #: Per epoch: ``[C, 3]`` samples, adversarial ones and sum of epsilon of each class; ``[2, 3]`` of right and wrong labels.
        self.by_class: dict[int, np.ndarray] = {}
        self.by_truth: dict[int, np.ndarray] = {}
        self.meta_loss = Curve()
        #: Per epoch and kind of step: first quartile, median and third quartile of its seconds.
        self.seconds: dict[int, dict[str, list[float]]] = {}
        self.first_step: int | None = None
        self.last_step = 0
        self.epsilon, self.loss = (np.full((epochs, 0), np.nan, np.float32) for _ in range(2))
        self.contradicted = np.zeros((epochs, 0), bool)
        self.label, self.predicted = (np.zeros(0, np.int32) for _ in range(2))
        self._held: dict[int, int] = {}  # which epoch each row of the rings holds
        self._waiting: list[list[Tensor]] = []
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._steps = 0
        self._epoch = 0
        self._times: dict[str, Reservoir] = {}
        self._clock: float | None = None

    # ------------------------------------------------------------------------------------------------ from the engine

    def check(self, ids: Tensor | None, n: int) -> None:
        """The ids of a batch of ``n`` samples can be used.

        Raises:
            ValueError: they are no row numbers ``[n]``, or some batches have them and others not.
        """
        if ids is not None:
            if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.shape != (n,):
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
        if self.with_ids != (ids is not None):
            raise ValueError("some batches have sample ids and others not: pass ids= with all of them, or with none.")

    def add(self, labels: Tensor, logits: Tensor, f: Tensor, loss: Tensor, epsilon: Tensor, ids: Tensor | None) -> None:
        """A training batch: labels, loss and epsilon ``[N]``, logits ``[N, C]``, characteristics ``[N, K]``, ids ``[N]``."""
        # The user may write the next batch into the same labels and ids.
        columns = [labels.clone(), logits.detach().argmax(dim=1), epsilon.detach(), loss, f]
        self._waiting.append(columns if ids is None else [*columns, ids.clone()])

    def add_meta_loss(self, loss: Tensor, fine: Tensor) -> None:
        """One meta step's loss ``[]``, and whether it was finite ``[]``."""
        self._losses.append((loss, fine))

    def end_step(self, step: int, kind: int) -> None:
        """Optimizer step ``step`` (from 0) is over: 0 one of the warm-up, 1 without a meta step, 2 with one."""
        now = time.perf_counter()
        epoch = int(step // self.steps_per_epoch)
        if epoch != self._epoch:
            self._close_times()
            self._epoch = epoch
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
        # An epoch's batches are counted under its number.
        if self._steps >= _STEPS_WAITING or int((step + 1) // self.steps_per_epoch) != epoch:
            self.drain()

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
        if not len(ids):
            return
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
        for name in ("epsilon", "loss", "contradicted"):
            values = getattr(self, name)
            setattr(
                self, name, np.pad(values, ((0, 0), (0, more)), constant_values=0 if values.dtype == bool else np.nan)
            )
        self.label, self.predicted = (np.pad(t, (0, more), constant_values=-1) for t in (self.label, self.predicted))

    def _close_times(self) -> None:
        times, self._times = self._times, {}
        if times:
            self.seconds[self._epoch] = {k: np.quantile(r.rows, [0.25, 0.5, 0.75]).tolist() for k, r in times.items()}

    # -------------------------------------------------------------------------------------------------- for the report

    def merged(self) -> Recorder:
        """What all processes have seen, in each of them; has to be called in all."""
        self.drain()
        if self._times:
            times = self._times
            self._close_times()
            self._times = times
        if world_size() == 1:
            return self
        own = {k: v for k, v in vars(self).items() if not k.startswith("_") or k == "_held"}
        parts: list[dict[str, Any]] = [{} for _ in range(world_size())]
        dist.all_gather_object(parts, own)
        whole = Recorder(self.num_classes, self._columns - 4, self.steps_per_epoch, epochs=self.epochs,
                         capacity=self._part * self.epochs, max_id=self.max_id, true_labels=self.true_labels)  # fmt: skip
        vars(whole).update(parts[0])
        for part in parts[1:]:
            whole._join(part)
        return whole

    def state_dict(self) -> dict[str, Any]:
        """What this process has seen, for a run that is resumed: tensors, numbers and lists, fit for ``torch.load``'s
        ``weights_only``. The clock of the present epoch is not in it."""
        self.drain()
        found = {name: torch.from_numpy(getattr(self, name).copy()) for name in _RINGS}
        for name in ("by_class", "by_truth"):
            found[name] = {k: torch.from_numpy(v.copy()) for k, v in getattr(self, name).items()}
        found["reservoirs"] = {k: (torch.from_numpy(r.rows.copy()), r.seen) for k, r in self.reservoirs.items()}
        found["meta_loss"] = (list(self.meta_loss._points), list(self.meta_loss._open), self.meta_loss.width)
        found |= {"seconds": copy.deepcopy(self.seconds), "held": dict(self._held), "first_step": self.first_step, "with_ids": self.with_ids}  # fmt: skip
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it is of other classes, characteristics or ``epochs``.
        """
        rows = [r for r, _ in state["reservoirs"].values()]
        same = all(v.shape[0] == self.num_classes for v in state["by_class"].values())
        if not same or any(r.shape[1] != self._columns for r in rows) or state["epsilon"].shape[0] != self.epochs:
            raise ValueError("this state of a report is of other classes, characteristics or epochs than this one has.")
        for name in _RINGS:
            setattr(self, name, state[name].numpy().copy())
        for name in ("by_class", "by_truth"):
            setattr(self, name, {k: v.numpy().copy() for k, v in state[name].items()})
        for epoch, (kept, seen) in state["reservoirs"].items():
            self.reservoirs[epoch] = Reservoir(self._part, self._columns, seed=epoch)
            self.reservoirs[epoch].fill(kept.numpy(), seen)
        self.meta_loss._points, self.meta_loss._open, self.meta_loss.width = (copy.copy(v) for v in state["meta_loss"])
        self.seconds, self._held = copy.deepcopy(state["seconds"]), dict(state["held"])
        self.first_step, self.with_ids = state["first_step"], state["with_ids"]

    def _join(self, part: dict[str, Any]) -> None:
        for own, other in ((self.by_class, part["by_class"]), (self.by_truth, part["by_truth"])):
            for epoch, counts in other.items():
                own[epoch] = own[epoch] + counts if epoch in own else counts
        for epoch, other in part["reservoirs"].items():
            if epoch not in self.reservoirs:
                self.reservoirs[epoch] = other
                continue
            # As many rows of each as it has seen a share of all.
            mine = self.reservoirs[epoch]
            seen = mine.seen + other.seen
            rows = [_share(r, min(self._part, seen), seen) for r in (mine, other)]
            mine._kept, mine.seen = np.concatenate(rows), seen
        self._grow(max(self.label.size, part["label"].size))
        known = np.flatnonzero(part["label"] >= 0)
        self.label[known], self.predicted[known] = part["label"][known], part["predicted"][known]
        for row, epoch in part["_held"].items():
            if epoch >= self._held.get(row, -1):
                if epoch != self._held.get(row):
                    self._held[row] = epoch
                    self.epsilon[row], self.loss[row] = np.nan, np.nan
                seen = np.flatnonzero(~np.isnan(part["epsilon"][row]))
                for name in ("epsilon", "loss", "contradicted"):
                    getattr(self, name)[row, seen] = part[name][row, seen]

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
    weights: Iterator[np.ndarray | None] = iter((None, epsilon > 0, epsilon))
    counts = np.stack([np.bincount(group, weights=w, minlength=groups) for w in weights], axis=1)
    into[epoch] = into[epoch] + counts if epoch in into else counts


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
