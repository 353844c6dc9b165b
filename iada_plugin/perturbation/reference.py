"""The trusted rows of a run as its reference: histories of all rows, and what the gate makes of them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .histories import Histories, adjusted_margin
from .prototypes import FOLDS, MOST_BYTES, Prototypes
from .trusted import GATES

logger = logging.getLogger(__name__)

#: Epochs after which the gate begins, or a third of a shorter run.
GATE_START = 3
#: Perturbations begin where the learning rate has fallen to this share of its largest value at the latest: published runs start them
#: after its first drop. At a high rate the classifier adapts to them, which did great harm on small networks.
LOW_RATE = 0.25
#: The training set counts as fitted from this accuracy on, of the rows that are kept, over an epoch.
FITTED = 0.85


class TrustedReference:
    """Follows each training row's margin, and once an epoch decides which rows are let go; 21 bytes a row.

    Args:
        rows: ``[T]`` numbers of the trusted rows, sorted.
        num_rows: R, of the training set.
        gate: name of the gate, or "none".
        level: of the gate.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: length of the run, or ``None``.
        device: where the state lives.
        labels: ``[T]`` of the trusted rows, where they are known.
        num_classes, num_features: C and H of the classifier; with 0 rows are judged by margins alone.

    Attributes:
        prototypes: class means of the trusted rows, or ``None``.
        weight: ``[R]`` weight of each row in the loss, 0 for one that is let go; the mean is 1 where rows are weighed.
        histories: what became of each row so far.
        accuracy: training accuracy of the kept rows in the last whole epoch, 0 before.
    """

    def __init__(
        self,
        rows: Tensor,
        num_rows: int,
        *,
        gate: str,
        level: float,
        steps_per_epoch: int,
        epochs: float | None,
        device: torch.device,
        labels: Tensor | None = None,
        num_classes: int = 0,
        num_features: int = 0,
    ) -> None:
        self.rows, self.steps_per_epoch = rows.to(device), steps_per_epoch
        self.labels = None if labels is None else labels.to(device)
        means = 4 * FOLDS * num_classes * num_features
        self.prototypes: Prototypes | None = None
        if gate != "none" and means > MOST_BYTES:
            logger.info(
                "Meta-IADA: class means of trusted rows would take %d MB and are not kept: rows are judged by margins alone.",
                means >> 20,
            )
        elif gate != "none" and means > 0:
            self.prototypes = Prototypes(
                *(rows, num_rows, num_classes, num_features),
                steps_per_epoch=steps_per_epoch,
                device=device,
                labels=labels,
            )
        self.histories = Histories(num_rows, device=device, nearness=self.prototypes is not None)
        start = GATE_START if epochs is None else max(1, min(GATE_START, int(epochs // 3)))
        self.start = start * steps_per_epoch
        self.gate = None if gate == "none" else GATES[gate](level, min_visits=min(2, start), groups="auto")
        self.weight = torch.ones(num_rows, device=device)
        self.accuracy = 0.0
        self._rate = self._peak_rate = 0.0
        self._fit = torch.zeros(2, device=device)  # kept samples of this epoch, and those that were predicted right

    def check_labels(self, labels: Tensor, ids: Tensor, always: bool) -> None:
        """Trusted rows among a batch with labels and row numbers ``[N]`` have the label that they are trusted for. On an accelerator only
        looked at where ``always`` is set.

        Raises:
            ValueError: one has another.
        """
        if self.labels is None or not (always or labels.device.type == "cpu"):
            return
        place = torch.searchsorted(self.rows, ids.long()).clamp_max(len(self.rows) - 1)
        wrong = (self.rows[place] == ids) & (self.labels[place] != labels)
        if wrong.any():
            k = int(wrong.int().argmax())
            raise ValueError(
                f"trusted row {int(ids[k])} is trained with the label {int(labels[k])}, and the training set has {int(self.labels[place[k]])}"
                " for it, with which meta batches come: have the data set give the labels that the loss sees."
            )

    def observe(
        self, features: Tensor, logits: Tensor, log_prior: Tensor | None, labels: Tensor, ids: Tensor
    ) -> dict[str, Tensor]:
        """Columns of a step: what the histories learn of a micro-batch with features ``[N, H]``, logits ``[N, C]``, labels and row
        numbers ``[N]``."""
        ids = ids.long()
        found = {"row": ids, "row_margin": adjusted_margin(logits, log_prior, labels)}
        if self.prototypes is not None:
            found |= {"row_nearness": self.prototypes.nearness(features, labels, ids), "features": features.detach()}
        return found

    def weights(self, ids: Tensor) -> Tensor:
        """Weight ``[N]`` of each sample in the loss."""
        return self.weight[ids.long()]

    @torch.no_grad()
    def commit(self, step: Any, samples: dict[str, Tensor]) -> None:
        """Follow the samples of a step; at the end of an epoch, refresh the gate."""
        if "row" not in samples:
            return
        rows, margin = samples["row"], samples["row_margin"]
        labels = samples["labels"]
        self.histories.update(rows, margin, labels, nearness=samples.get("row_nearness"))
        if self.prototypes is not None:
            self.prototypes.update(samples["features"], labels, rows)
        kept = self.weight[rows]
        self._fit += torch.stack([kept.sum(), (kept * (margin > 0)).sum()])
        following = step.number + 1
        if following % self.steps_per_epoch == 0:
            kept, right = self._fit.tolist()
            self.accuracy = right / max(kept, 1.0)
            self._fit.zero_()
            if self.gate is not None and not self.gate.weighs and following >= self.start:
                known = None if self.prototypes is None else self.prototypes.known(self.histories.label)
                self.weight.copy_(self.gate.refresh(self.histories, self.rows, known))

    def evidence(self) -> Tensor:
        """What a list of wrong labels goes by: mean margins ``[R]``; where each row has a nearness, too, the mean of both, that scaled to
        the deviation of the margins. No look is taken at which rows are trusted."""
        histories = self.histories
        known = None if self.prototypes is None else self.prototypes.known(histories.label)
        if known is None or histories.nearness is None or not bool(known[histories.label >= 0].all()):
            return histories.margin
        seen = histories.visits > 0
        scale = histories.margin[seen].std() / histories.nearness[seen].std().clamp_min(1e-12)
        return (histories.margin + scale * histories.nearness) / 2

    def begun(self, step: int) -> bool:
        """Whether the gate has been refreshed by that step."""
        return step >= self.start

    def phase(self, step: int) -> str:
        """What becomes of the rows in that step, in words."""
        if self.gate is None:
            return "all rows are kept"
        if not self.begun(step):
            return f"rows are followed, and judged from step {self.start} on"
        if self.gate.weighs:
            return "rows are weighed by how often their like is trusted"
        return "rows whose label looks wrong are let go"

    def follow_rate(self, rate: float) -> None:
        """Take in the learning rate of a step."""
        self._rate, self._peak_rate = rate, max(rate, self._peak_rate)

    def settled(self) -> bool:
        """Whether perturbations may begin: the learning rate has fallen, and the model fits the rows that are kept. Before, they do harm
        (on a network that does not fit clean, balanced data they let half of it go)."""
        return self.accuracy >= FITTED and self._rate <= LOW_RATE * self._peak_rate

    def let_go(self) -> float:
        """Share of the rows that are let go."""
        return float((self.weight == 0).float().mean())

    def state_dict(self) -> dict[str, Tensor]:
        """Histories, weights, and how well the model fits."""
        found = {f"histories.{k}": v for k, v in self.histories.state_dict().items()}
        weighs = self.gate is not None and self.gate.weighs
        if self.prototypes is not None:
            found |= {f"prototypes.{k}": v for k, v in self.prototypes.state_dict().items()}
        return {
            **found,
            "weight": self.weight,
            "weighs": torch.tensor(weighs),
            "fit": self._fit,
            "accuracy": torch.tensor(self.accuracy, dtype=torch.float64),
            "rate": torch.tensor([self._rate, self._peak_rate], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.histories.load_state_dict(
            {k.removeprefix("histories."): v for k, v in state.items() if k.startswith("histories.")}
        )
        if self.prototypes is not None:
            self.prototypes.load_state_dict(
                {k.removeprefix("prototypes."): v for k, v in state.items() if k.startswith("prototypes.")}
            )
        self.weight.copy_(state["weight"])
        self._fit.copy_(state["fit"])
        self.accuracy = float(state["accuracy"])
        self._rate, self._peak_rate = state["rate"].tolist()
        if self.gate is not None:
            self.gate.weighs = bool(state["weighs"])
