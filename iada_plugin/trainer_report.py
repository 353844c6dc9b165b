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

from .capture import Hook
from .distributed import rank, world_size
from .engine import MetaIADA
from .sample_ids import SAMPLE_IDS, number_samples

if TYPE_CHECKING:
    from .report import Report

logger = logging.getLogger(__name__)


class TrainerReport:
    """Sees to it that a report gets row numbers and evaluations while a Trainer trains.

    Args:
        engine: of the run.
        model: with the names of the classes in its config.
        loader: of the training set; its batches carry row numbers until :meth:`remove`.
        options: arguments of the `Report`.
    """

    def __init__(self, engine: MetaIADA, model: nn.Module, loader: Any, options: Mapping[str, Any]) -> None:
        from .report import Report

        names = getattr(getattr(model, "config", None), "id2label", None) or {}
        self.engine = engine
        self.report = Report(engine, **{"class_names": [names[k] for k in sorted(names)] or None, **options})
        self._ids: Tensor | None = None
        self._evaluation: list[tuple[Tensor, Tensor]] = []
        self._undo = number_samples(loader)
        if self._undo is None:
            logger.info("the training set has no row numbers (it is streamed?): the report will name no suspects.")
        # Before all other hooks on the model, whose forward pass does not know this argument.
        self._hook = engine.model.register_forward_pre_hook(Hook(self._before_model), with_kwargs=True, prepend=True)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """The options are those of a `Report`, and it can be made: better missed now than after training.

        Raises:
            ImportError: Matplotlib is not installed.
            TypeError: an unknown option.
        """
        from .report import Report

        known = [n for n in inspect.signature(Report).parameters if n != "iada"]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(f"report_options {', '.join(unknown)}: a Report has the options {', '.join(known)}.")

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if SAMPLE_IDS not in kwargs:
            return None
        if module.training and torch.is_grad_enabled() and not self.engine.capture.busy:
            self._ids = kwargs[SAMPLE_IDS]
        return args, {k: v for k, v in kwargs.items() if k != SAMPLE_IDS}

    def take_ids(self) -> Tensor | None:
        """Row numbers ``[N]`` of the training batch that the model has just seen."""
        ids, self._ids = self._ids, None
        return ids

    def note_evaluation(self, logits: Any, labels: Tensor) -> None:
        """A batch of an evaluation. In several processes samples are repeated to fill batches: left to the user there."""
        if world_size() == 1 and isinstance(logits, Tensor):
            self._evaluation.append((logits.detach().argmax(dim=-1), labels.detach()))

    def forget_evaluation(self) -> None:
        """The batches since the last evaluation were none of one."""
        self._evaluation = []

    def end_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Keep the last evaluation in the warm-up, and the last one of all."""
        parts, self._evaluation = self._evaluation, []
        if not parts:
            return
        predictions, labels = (torch.cat([t.flatten() for t in column]) for column in zip(*parts, strict=True))
        if labels.is_floating_point() or predictions.shape != labels.shape:
            return
        # With several evaluation sets each has its prefix: eval_NAME_loss.
        prefix = next((k.removesuffix("_loss") for k in metrics if k.endswith("_loss")), "eval")
        which = "warm-up" if self.engine.epsilon is None else "Meta-IADA"
        name = which if prefix == "eval" else f"{which}, {prefix.removeprefix('eval_')}"
        self.report.add_evaluation(name, predictions, labels)

    def save(self, folder: Path) -> None:
        """What this process has seen goes into a checkpoint."""
        path = folder / f"iada_report-{rank()}.pt"
        torch.save(self.report.state_dict(), path.with_suffix(".tmp"))  # nothing half-written under its name
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, folder: Path, step: int) -> None:
        """Go on from a checkpoint, where it has something."""
        path = folder / f"iada_report-{rank()}.pt"
        if path.is_file():
            self.report.load_state_dict(torch.load(path, weights_only=True))
        else:
            logger.info("no %s: the report covers the run from step %d on.", path, step)

    def remove(self) -> None:
        """Take the row numbers off the loader's batches, and the hook off the model."""
        self._hook.remove()
        if self._undo is not None:
            self._undo()


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
