"""What became of each training sample so far, by its row number: a sample's history tells a wrong label from a hard one, its
state of the moment does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Margins are kept within so many nats, so that one wild step cannot outweigh a history.
MARGIN_LIMIT = 8.0
#: Values are added up as multiples of 2^-32: whole numbers, whose sum is the same in every order on every device.
_UNIT = 2.0**32


def adjusted_margin(logits: Tensor, log_prior: Tensor | None, labels: Tensor, limit: float = MARGIN_LIMIT) -> Tensor:
    """The margin of :func:`margin_and_other`."""
    return margin_and_other(logits, log_prior, labels, limit)[0]


def margin_and_other(
    logits: Tensor, log_prior: Tensor | None, labels: Tensor, limit: float = MARGIN_LIMIT
) -> tuple[Tensor, Tensor]:
    """Own logit less the largest other one, of the logits that the loss sees, in nats: ``[N]``, within ``+-limit``; and the class of
    that one ``[N]``.

    Plain logits mislead where classes are rare: their samples have small margins with right labels, too.

    Args:
        logits: ``[N, C]`` plain logits.
        log_prior: ``[C]`` log class proportions, added to them; ``None`` for none.
        labels: ``[N]`` class indices.
        limit: in nats.
    """
    z = logits.detach().float()
    z = z if log_prior is None else z + log_prior.float()
    own = z.gather(1, labels[:, None])
    largest, other = z.scatter(1, labels[:, None], -torch.inf).max(dim=1)
    return (own.squeeze(1) - largest).clamp(-limit, limit), other


class Histories:
    """Running mean margin of each training row, on the device; 12 bytes a row, 16 with its nearness.

    A row's mean is the plain mean of its first ``1 / rate`` visits, and forgets at ``rate`` a visit afterwards. In several
    processes each gives the rows of all of them (see :func:`~iada_plugin.runtime.processes.gather_rows`): the result is then
    the same bit for bit, in whatever order they come. A step costs what its rows cost, however many there are in all, and
    never waits for an accelerator.

    Args:
        num_rows: R, of the training set.
        device: where the state lives.
        rate: least share of a visit in the mean, in (0, 1].
        nearness: follow that, too.

    Attributes:
        margin: ``[R]`` float32, running mean margin in nats; 0 before the first visit.
        visits: ``[R]`` int32.
        label: ``[R]`` int32, the label at the last visit; -1 before the first.
        nearness: ``[R]`` float32, running mean nearness to the trusted rows of its class (:mod:`.prototypes`), where it is followed.

    Raises:
        ValueError: no rows, or a rate outside (0, 1].
    """

    def __init__(
        self, num_rows: int, *, device: torch.device | str, rate: float = 0.05, nearness: bool = False
    ) -> None:
        if not isinstance(num_rows, int) or num_rows < 1:
            raise ValueError(
                f"num_rows={num_rows!r:.80} must be a whole number, at least 1: that of rows of the training set, len(train)."
            )
        if not 0 < rate <= 1:
            raise ValueError(
                f"rate={rate} must be in (0, 1]: the least share of a visit in a row's mean, such as 0.05."
            )
        self.num_rows, self.rate = num_rows, rate
        self.margin = torch.zeros(num_rows, device=device)
        self.visits = torch.zeros(num_rows, device=device, dtype=torch.int32)
        self.label = torch.full((num_rows,), -1, device=device, dtype=torch.int32)
        self.nearness = torch.zeros(num_rows, device=device) if nearness else None

    @torch.no_grad()
    def update(
        self,
        rows: Tensor,
        margin: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        nearness: Tensor | None = None,
    ) -> None:
        """Take in the samples of one optimizer step, ``[N]`` each and of all processes.

        A row that occurs more than once is visited as often, one visit after the other, from its smallest margin up. A margin
        that is not finite does not count.

        Args:
            rows: ``[N]`` row numbers.
            margin: ``[N]``, see :func:`adjusted_margin`.
            labels: ``[N]`` class indices.
            weight: ``[N]`` which samples count (0 or 1); ``None``: all.
            nearness: ``[N]``, where that is followed, too.

        Raises:
            ValueError: shapes that do not fit, or (on a CPU) a row number out of range.
        """
        self._check(rows, margin=margin, labels=labels, weight=weight, nearness=nearness)
        if not rows.shape[0]:
            return
        step = _Step.of(rows, margin, labels, weight)
        before = self.visits.index_select(0, step.rows).float()
        after = before + step.visits
        number = (before + step.rank).clamp_min(1)  # which visit of its row each one is
        share = (1 / number).clamp_min(self.rate) * self._kept(number, after)
        left = self._kept(before, after)
        means = [(self.margin, step.values)]
        if self.nearness is not None and nearness is not None:
            means.append((self.nearness, nearness.clamp(-MARGIN_LIMIT, MARGIN_LIMIT)[step.order]))
        for mean, values in means:
            values = torch.where(step.counts, values * share, 0)
            total = step.total_of((values * _UNIT).round().long()).float() / _UNIT
            old = mean.index_select(0, step.rows)
            # Every occurrence of a row writes the same values.
            mean.index_copy_(0, step.rows, torch.where(step.visits > 0, old * left + total, old))
        last = step.total_of(torch.where(step.counts & (step.rank == step.visits), step.labels, 0))
        label = torch.where(step.visits > 0, last.to(torch.int32), self.label.index_select(0, step.rows))
        self.visits.index_copy_(0, step.rows, after.to(self.visits.dtype))
        self.label.index_copy_(0, step.rows, label)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        found = {"margin": self.margin, "visits": self.visits, "label": self.label}
        return found if self.nearness is None else {**found, "nearness": self.nearness}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors in.

        Raises:
            ValueError: they are of another number of rows, or lack what is kept here; nothing is changed then.
        """
        own = self.state_dict()
        if missing := sorted(set(own) - set(state)):
            raise ValueError(
                f"this state of sample histories has no {', '.join(missing)}: it was saved with other settings."
            )
        for name in own:
            if state[name].shape != (self.num_rows,):
                raise ValueError(
                    f"this state is of {state[name].shape[0]} training rows, and there are {self.num_rows} now: histories go by"
                    " row number. Resume with the training set that the run was begun with, or start afresh."
                )
        for name, value in own.items():
            value.copy_(state[name])

    def _check(self, rows: Tensor, **columns: Tensor | None) -> None:
        if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise ValueError(f"rows are {rows.dtype} {list(rows.shape)}: they must be row numbers, integers [N].")
        for name, column in columns.items():
            if column is not None and column.shape != rows.shape:
                raise ValueError(
                    f"{name} has shape {list(column.shape)}: one is needed for each of {rows.shape[0]} rows."
                )
        if rows.device.type == "cpu":  # elsewhere reading them costs a wait, and the indexing asserts it
            wrong = rows[(rows < 0) | (rows >= self.num_rows)]
            if wrong.numel():
                raise ValueError(f"row {int(wrong[0])} is not in 0..{self.num_rows - 1}: the histories are of {self.num_rows}"
                                 " training rows.")  # fmt: skip

    def _kept(self, start: Tensor, end: Tensor) -> Tensor:
        """What is left of a mean of ``start`` visits after visit ``end``: the product of ``1 - max(1 / k, rate)`` over the visits
        k in between. Up to ``1 / rate`` it is ``(k - 1) / k``, which telescopes; from there on ``1 - rate``."""
        plain = float(int(1 / self.rate + 1e-6))
        telescoped = start.clamp(max=plain) / end.clamp(1, plain)
        return telescoped * (1 - self.rate) ** (end.clamp_min(plain) - start.clamp_min(plain))


@dataclass
class _Step:
    """The samples of a step, sorted by row, and within a row by value and label: in an order that is their own."""

    order: Tensor  # [N] which sample of the batch each one is
    rows: Tensor  # [N]
    values: Tensor  # [N] float32, 0 where a sample does not count
    labels: Tensor  # [N] int64
    counts: Tensor  # [N] bool
    rank: Tensor  # [N] 1, 2, ...: which of its row's visits in this step a counted sample is
    visits: Tensor  # [N] how many its row has in this step
    place: Tensor | None  # [N] which of the step's different rows it is of; None where all are different

    @classmethod
    def of(cls, rows: Tensor, values: Tensor, labels: Tensor, weight: Tensor | None) -> _Step:
        counts = torch.isfinite(values)
        counts = counts if weight is None else counts & (weight > 0)
        rows, labels = rows.long(), labels.long()
        values = torch.where(counts, values.detach().float(), 0)
        if rows.device.type == "cpu" and rows.unique().shape == rows.shape:  # no row twice: nothing to put in order
            own = torch.arange(len(rows))
            return cls(own, rows, values, labels, counts, counts.long(), counts.long(), None)
        order = labels.argsort(stable=True)
        for key in (values, rows):
            order = order[key[order].argsort(stable=True)]
        rows, values, labels, counts = (t[order] for t in (rows, values, labels, counts))
        first = torch.ones_like(counts)
        first[1:] = rows[1:] != rows[:-1]
        number = counts.long().cumsum(0)
        rank = number - torch.where(first, number - counts.long(), 0).cummax(0).values
        step = cls(order, rows, values, labels, counts, rank, rank, first.long().cumsum(0) - 1)
        step.visits = step.total_of(counts.long())
        return step

    def total_of(self, whole: Tensor) -> Tensor:
        """The sum over its row of whole numbers ``[N]``, for each sample: ``[N]``."""
        if self.place is None:
            return whole
        return torch.zeros_like(whole).index_add_(0, self.place, whole).index_select(0, self.place)
