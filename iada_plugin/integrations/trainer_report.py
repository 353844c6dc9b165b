"""A `Report` of a Trainer's run: row numbers of the samples, evaluations, checkpoints, and the writing of it."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..criterion import MetaIADA
from ..report.recorder import MAX_ID, are_row_numbers
from ..runtime.labels import ordered_names
from ..runtime.processes import rank, world_size
from .trainer_rows import TrainerRows

if TYPE_CHECKING:
    from ..report.report import Report

logger = logging.getLogger(__name__)


class TrainerReport:
    """Sees to it that a report gets row numbers and evaluations while a Trainer trains.

    Args:
        engine: of the run.
        model: with the names of the classes in its config.
        rows: of the training set.
        options: arguments of the `Report`.
    """

    def __init__(self, engine: MetaIADA, model: nn.Module, rows: TrainerRows, options: Mapping[str, Any]) -> None:
        from ..report.report import Report

        self.engine = engine
        self._candidate: tuple[Tensor, Tensor] | None = None
        self._evaluation: list[tuple[Tensor, Tensor]] = []
        self._without_ids = not rows.number
        self.report = Report(
            engine, **{"class_names": _class_names(model, engine), **self._sized(options, rows.number)}
        )

    def _sized(self, options: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """The options, checked against the training set now rather than in the middle of training."""
        truth = options.get("true_labels")
        if truth is not None and not rows:
            raise ValueError(
                "true_labels are known by row number, and a streamed training set has none: leave them out."
            )
        if truth is not None and len(truth) < rows:
            raise ValueError(f"true_labels has {len(truth)} values; the training set has {rows} rows.")
        samples = options.get("samples")
        if rows and hasattr(samples, "__len__") and len(samples) != rows:
            raise ValueError(
                f"samples has {len(samples)} entries; the training set has {rows} rows, and they go by row number."
            )
        return {"max_id": max(rows, MAX_ID), **options}

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """The options are those of a `Report`, and it can be made: better missed now than after training.

        Raises:
            ImportError: Matplotlib is not installed.
            TypeError: an unknown option.
        """
        from ..report.figures import require_matplotlib
        from ..report.report import Report

        require_matplotlib()
        known = [n for n in inspect.signature(Report).parameters if n != "iada"]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f"report_options {', '.join(unknown)}: a Report has the options {', '.join(known)}.")

    def fitting(self, ids: Any, n: int) -> Tensor | None:
        """``ids``, if they are the row numbers ``[n]`` of a batch of ``n`` samples. Where a batch has none that fit (its collator
        leaves samples out, say), the report goes on without any."""
        if self._without_ids:
            return None
        if not are_row_numbers(ids, n):
            found = f"row numbers {ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else "no row numbers"
            warnings.warn(f"a training batch of {n} samples has {found}: the report will name no suspects.")
            self._without_ids = True
            self.report.forget_ids()
            return None
        return ids  # type: ignore[no-any-return]

    def note_pass(self, outputs: Any, labels: Any) -> None:
        """A pass in eval mode, which may be one of an evaluation."""
        self._candidate = None
        logits = None
        if isinstance(outputs, Mapping):
            logits = outputs.get("logits")
        elif isinstance(outputs, tuple) and len(outputs) > 1:
            logits = outputs[1]
        if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
            return
        if logits.dim() == 2 and not labels.is_floating_point():
            predictions, labels = logits.detach().argmax(dim=1), labels.detach().flatten()
            if predictions.shape == labels.shape:
                self._candidate = predictions, labels

    def end_prediction_step(self) -> None:
        """The last pass was one of an evaluation. In several processes samples are repeated to fill batches: left to the user."""
        if self._candidate is not None and world_size() == 1:
            self._evaluation.append(self._candidate)
        self._candidate = None

    def forget_evaluation(self) -> None:
        """What was predicted since the last evaluation belongs to none."""
        self._evaluation, self._candidate = [], None

    def end_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Keep the last evaluation in the warm-up, and the last one of all."""
        parts, self._evaluation = self._evaluation, []
        if not parts:
            return
        predictions, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        known = (labels >= 0) & (labels < len(self.report.class_names))  # -100 is ignored by the loss, too
        if not bool(known.any()):
            return
        # With several evaluation sets each has its prefix: eval_NAME_loss.
        prefix = next((k.removesuffix("_loss") for k in metrics if k.endswith("_loss")), "eval")
        which = "warm-up" if self.engine.step <= self.engine.warmup.steps else "Meta-IADA"
        name = which if prefix == "eval" else f"{which}, {prefix.removeprefix('eval_')}"
        self.report.add_evaluation(name, predictions[known], labels[known])

    def save(self, folder: Path) -> None:
        """What this process has seen goes into a checkpoint."""
        path = folder / f"iada_report-{rank()}.pt"
        torch.save(self.report.state_dict(), path.with_suffix(".tmp"))  # nothing half-written under its name
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, folder: Path, step: int) -> None:
        """Go on from a checkpoint, where it has something."""
        path = folder / f"iada_report-{rank()}.pt"
        if not path.is_file():
            logger.info("no %s: the report covers the run from step %d on.", path, step)
            return
        try:
            self.report.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:
            warnings.warn(
                f"{path} cannot be used ({type(error).__name__}: {error}): the report covers the run from step {step} on."
            )


def _class_names(model: nn.Module, engine: MetaIADA) -> list[str] | None:
    """From the model's config, where it has as many as the classifier has outputs."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    try:
        ordered = ordered_names(names)
    except (TypeError, ValueError):
        return None
    return ordered if len(ordered) == engine.head.out_features else None


def write_report(report: Report, folder: str | Path) -> None:
    """Write a report at the end of ``train()``; what comes after it must not be lost for a picture."""
    if report.empty:
        warnings.warn(f"no report in {folder}: no step was trained after the warm-up.")
        return
    try:
        path = report.write(folder)
    except Exception as error:
        warnings.warn(f"the report could not be written ({type(error).__name__}: {error}): train() is over and complete;"
                      " callback.report.write(folder) tries again.")  # fmt: skip
    else:
        logger.info("wrote the report %s", path)
