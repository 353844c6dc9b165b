"""`LabelAuditCallback`: finds wrong labels in a Hugging Face `Trainer`'s training set, and changes nothing of the training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..data.trusted import check_trusted_rows
from ..runtime.batches import length_of
from ..runtime.capture import Hook
from ..runtime.labels import labels_of
from ..runtime.processes import rank
from ..wrong_labels import MarginRecorder, WrongLabels
from ..wrong_labels.find import check_enough
from .checkpoint import read_tensors, write_tensors
from .checkpointed import CheckpointedCallback
from .trainer_rows import TrainerRows, check_numbered

logger = logging.getLogger(__name__)

AUDIT_FILE = "label_audit.safetensors"


class LabelAuditCallback(CheckpointedCallback):
    """Lists the labels that are wrong, with a bounded share of false alarms, from a training as it always is:
    ``Trainer(..., callbacks=[LabelAuditCallback(trusted_rows, "audit")])``.

    Loss, gradients and random numbers are untouched. What was recorded is in the checkpoints, and goes on from there.

    Args:
        trusted_rows: ``[T]`` row numbers, or ``[R]`` bool, of rows of the training set whose label was checked and found right, drawn
            at random; they are trained on as the rest.
        output_dir: for ``wrong_labels.html`` and ``wrong_labels.csv``, written when training ends; ``None``: nothing is written.
        false_alarms: level of the list.
        samples: ``samples[row]`` is an image, a text, or a row with one, for the page.
        resume_from: "fresh" to go on from a checkpoint that was made without the callback, from where it is.
        **options: of :func:`iada_plugin.find_wrong_labels`: ``adaptive``, ``compare``, ``class_names``.

    Attributes:
        wrong_labels: of the last ``train()``, or ``None``.
        recorder: the :class:`iada_plugin.MarginRecorder`, or ``None`` before training.

    Raises:
        ValueError: at the start of training: trusted rows that do not fit the training set or are too few for the level, or a
            streamed training set.
    """

    state_name = AUDIT_FILE

    def __init__(
        self,
        trusted_rows: Any,
        output_dir: str | Path | None = None,
        *,
        false_alarms: float = 0.1,
        samples: Any = None,
        resume_from: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.trusted_rows, self.output_dir, self.samples = trusted_rows, output_dir, samples
        self.false_alarms, self.options, self.resume_from = false_alarms, options, resume_from
        self.wrong_labels: WrongLabels | None = None
        self.recorder: MarginRecorder | None = None
        self._labels: Tensor | None = None
        self._rows: TrainerRows | None = None
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to record."""
        self.uninstall()
        run = self.begin_run()
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        if length_of(loader) is None or not hasattr(getattr(loader, "dataset", None), "__len__"):
            raise ValueError(
                "the training set is streamed: its samples have no row numbers, so that no list of them can be made. Load it."
            )
        check_numbered(loader, run.trainer)
        num_rows = len(loader.dataset)
        self._labels = labels_of(loader.dataset)
        rows = check_trusted_rows(self.trusted_rows, num_rows, self._labels)
        check_enough(len(rows), self.false_alarms)
        self.recorder = MarginRecorder(num_rows, device=args.device)
        if state.global_step > 0 and self.resume_from != "fresh":
            self._load(self.resumes_from(args, state), state.global_step)
        self.tidy(args, state)
        self._rows = TrainerRows(model, loader)
        self._hook = Hook(self._record).on(model.register_forward_hook, with_kwargs=True)

    def _load(self, checkpoint: Path, step: int) -> None:
        assert self.recorder is not None
        path = self.state_of(checkpoint)
        try:
            self.recorder.load_state_dict(read_tensors(path)[0])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise ValueError(
                f"the run resumes at step {step}, but {path} with what was recorded cannot be used ({error}). Resume from another"
                " checkpoint, or record from here on only with LabelAuditCallback(resume_from='fresh')."
            ) from error

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        assert self._rows is not None and self.recorder is not None and self._run is not None
        if self._run.over:  # by an error or an interrupt: the model is the user's again
            self.uninstall()
            return
        ids = self._rows.take()
        if ids is None:
            raise ValueError(
                "a training batch has no row numbers: its collator leaves samples out, the batch is no dict, or another callback of"
                " iada_plugin takes them (a run with MetaIADACallback(trusted_rows=...) has callback.report.suspects(false_alarms=0.1))."
            )
        logits = (
            outputs["logits"] if isinstance(outputs, Mapping) else outputs[-1 if kwargs.get("labels") is None else 1]
        )
        labels = kwargs.get("labels")
        if labels is None:  # the Trainer keeps them to itself, as for label smoothing
            if self._labels is None:
                raise ValueError(
                    "the model gets no labels, and the training set has no column `labels` or `label` to read them from."
                )
            labels = self._labels.to(ids.device)[ids]
        if labels.is_floating_point() or labels.numel() != len(ids):
            raise ValueError(
                f"labels are {labels.dtype} {list(labels.shape)}: one class index is needed for each sample."
            )
        self.recorder(logits, labels.reshape(-1), ids)

    def takes_part(self, args: TrainingArguments) -> bool:
        """While something is recorded."""
        return args.should_save and self.recorder is not None

    def write_state(self, path: Path, write: bool) -> None:
        """What was recorded."""
        assert self.recorder is not None
        write_tensors({k: v.cpu() for k, v in self.recorder.state_dict().items()}, {}, path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the list, and write it."""
        self.uninstall()
        assert self.recorder is not None
        self.wrong_labels = self.recorder.find_wrong_labels(
            self.trusted_rows, self._labels, false_alarms=self.false_alarms, **self.options
        )
        self.end_run(args, state)
        if self.output_dir is not None and rank() == 0:
            path = self.wrong_labels.write(self.output_dir, samples=self.samples)
            logger.info("%s: %s", path, self.wrong_labels)

    def uninstall(self) -> None:
        """Take the hooks off the model, and the row numbers off the loader."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._rows is not None:
            self._rows.remove()
            self._rows = None
