"""The Trainer whose callback is called: which one it is, and whether its `train()` still runs. It tells its callbacks neither."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

_CALLBACKS = "transformers.trainer_callback"


class TrainerRun:
    """To be made in ``on_train_begin``: the function that has called the callbacks is the Trainer's loop.

    Attributes:
        trainer: the Trainer, ``None`` where it cannot be told.
        resumed_from: the checkpoint folder that it resumes from, where it does.
    """

    def __init__(self) -> None:
        self._code, self._thread = None, threading.get_ident()
        found: dict[str, Any] = {}
        inside = False
        for frame, _ in traceback.walk_stack(None):
            handler = frame.f_globals.get("__name__") == _CALLBACKS
            if inside and not handler:
                self._code, found = frame.f_code, frame.f_locals
                break
            inside = handler
        self._caller = found.get("self")
        self.trainer: Any = self._caller if isinstance(self._caller, Trainer) else None
        self.resumed_from, self._trial = found.get("resume_from_checkpoint"), found.get("trial")

    @property
    def over(self) -> bool:
        """Whether the loop has returned, or raised. Known in its own thread only."""
        if self._code is None or threading.get_ident() != self._thread:
            return False
        frames = traceback.walk_stack(None)
        return not any(f.f_code is self._code and f.f_locals.get("self") is self._caller for f, _ in frames)

    def folder(self, args: TrainingArguments) -> Path:
        """Where checkpoints go: a hyperparameter search has a folder for each of its runs."""
        if self._trial is not None and hasattr(self.trainer, "_get_output_dir"):
            return Path(self.trainer._get_output_dir(self._trial))
        return Path(args.output_dir or ".")
