"""`MarginRecorder`: the margins of training rows, recorded in any loop."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..data.meta import as_labels
from ..perturbation.histories import Histories, margin_and_other
from ..runtime.processes import gather_rows
from .choice import MARGIN_LIMIT, marks
from .find import judge
from .result import WrongLabels


class MarginRecorder:
    """Follows the margins of training rows while a model is trained as it always is: three lines in any loop.

    Keeps the mean margin of each row at the epochs 1, 2, 3, 5, 8, 13, ..., of which :meth:`find_wrong_labels` takes the most
    bimodal one: 16 bytes a row and 2 more for each of them, on ``device``. In several processes each call takes in the samples of
    all of them.

    Args:
        num_rows: R, of the training set.
        device: where the state lives; that of the logits saves a copy a step.

    Raises:
        ValueError: no rows.

    Example:
        >>> recorder = MarginRecorder(4)
        >>> rows = torch.arange(4)
        >>> recorder(torch.tensor([[2.0, 0], [0, 3.0], [1.0, 0], [4.0, 0]]), torch.tensor([0, 1, 1, 0]), rows)
        >>> recorder.epochs, recorder.margins.tolist()
        ([1], [[2.0, 3.0, -1.0, 4.0]])
    """

    def __init__(self, num_rows: int, *, device: torch.device | str = "cpu") -> None:
        self.histories = Histories(num_rows, device=device)
        self.other = torch.zeros(num_rows, device=device, dtype=torch.int32)
        self.epochs: list[int] = []
        self._kept: list[Tensor] = []
        self._seen = 0

    @torch.no_grad()
    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Take in a training batch.

        Args:
            logits: ``[N, C]``, as the loss sees them.
            labels: ``[N]`` class indices; a row with a negative label (ignored by the loss) does not count.
            rows: ``[N]`` row numbers, as from :func:`iada_plugin.with_row_ids`.

        Raises:
            ValueError: shapes that do not fit, or row numbers out of range.
        """
        if logits.dim() != 2 or labels.shape != logits.shape[:1] or rows.shape != labels.shape:
            raise ValueError(
                f"logits {list(logits.shape)}, labels {list(labels.shape)} and rows {list(rows.shape)}: pass [N, C], [N] and [N]."
            )
        device = self.other.device
        counts = labels >= 0
        margin, other = margin_and_other(logits, None, labels.clamp_min(0), MARGIN_LIMIT)
        margin = torch.where(counts, margin, torch.nan)
        columns = (rows.to(device).long(), margin.to(device), labels.to(device).long(), other.to(device))
        rows, margin, labels, other = gather_rows(*columns)
        self.histories.update(rows, margin, labels)
        self.other[rows] = other.to(torch.int32)
        self._seen += len(rows)
        epoch = next(itertools.islice(marks(), len(self.epochs), None))
        if self._seen >= epoch * self.histories.num_rows:
            self.epochs.append(epoch)
            self._kept.append(self._now().half())

    def _now(self) -> Tensor:
        return torch.where(self.histories.visits > 0, self.histories.margin, torch.nan)

    @property
    def margins(self) -> Tensor:
        """``[S, R]`` mean margins up to each of ``epochs``; up to now where no epoch is over. NaN of rows that were not seen."""
        return torch.stack(self._kept or [self._now()]).float()

    def find_wrong_labels(self, trusted_rows: Any, labels: Any = None, **options: Any) -> WrongLabels:
        """The list; see :func:`iada_plugin.find_wrong_labels`, whose other arguments may be given.

        Args:
            trusted_rows: ``[T]`` row numbers or ``[R]`` bool.
            labels: ``[R]``, for rows that were not seen; of the others those that were recorded are judged.

        Raises:
            RuntimeError: nothing was recorded, or not all rows and ``labels`` are not given.
        """
        if not self._seen:
            raise RuntimeError(
                "nothing is recorded: call the recorder with each training batch's logits, labels and rows."
            )
        return judge_histories(self.histories, self.other, trusted_rows, labels, self.margins, **options)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, by name; for a run that is resumed."""
        kept = torch.stack(self._kept) if self._kept else torch.zeros(0, self.histories.num_rows).half()
        own = {"other": self.other, "kept": kept, "epochs": torch.tensor(self.epochs), "seen": torch.tensor(self._seen)}
        return {**own, **self.histories.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there.

        Raises:
            ValueError: it is of another number of rows.
        """
        self.histories.load_state_dict({k: state[k] for k in self.histories.state_dict() if k in state})
        self.other.copy_(state["other"])
        self._kept = list(state["kept"].to(self.other.device))
        self.epochs, self._seen = [int(e) for e in state["epochs"]], int(state["seen"])


def judge_histories(
    histories: Histories,
    other: Tensor,
    trusted_rows: Any,
    labels: Any = None,
    margins: Tensor | None = None,
    **options: Any,
) -> WrongLabels:
    """The list, from what became of each row.

    Args:
        histories: of R rows.
        other: ``[R]`` class of the largest other logit.
        trusted_rows: ``[T]`` row numbers or ``[R]`` bool.
        labels: ``[R]``, of which those are used that the histories do not know: a margin is of the label that the loss has seen.
        margins: ``[S, R]`` to choose from; by default those of the histories.
        **options: of :func:`iada_plugin.find_wrong_labels`.

    Raises:
        RuntimeError: some rows were never seen, and ``labels`` are not given.
        ValueError: ``labels`` of another number of rows.
    """
    known = histories.label.cpu().long()
    if labels is None and (known < 0).any():
        raise RuntimeError(
            f"{int((known < 0).sum())} of {len(known)} rows were not trained on, so that their labels are not known: pass labels=."
        )
    y = torch.from_numpy(as_labels(known if labels is None else labels))
    if len(y) != len(known):
        raise ValueError(f"there are {len(y)} labels, and {len(known)} rows were recorded.")
    y = torch.where(known >= 0, known, y)
    margins = histories.margin[None] if margins is None else margins
    seen = histories.visits.cpu() > 0
    return judge(y, trusted_rows, torch.where(seen, margins.cpu(), torch.nan), other.cpu().long(), **options)
