"""`CheckpointedCallback`: a callback with a state of its own in each checkpoint of a `Trainer`'s."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoint import complete, staged_file, state_file
from .trainer_run import TrainerRun


class CheckpointedCallback(TrainerCallback):
    """The Trainer writes its checkpoint, and deletes old ones, before it tells its callbacks: the state is staged on disk before that,
    and moved into the checkpoint afterwards, so that a kill at any moment leaves a checkpoint with its state or none at all.

    A subclass names its file ``state_name`` and writes it in :meth:`write_state`; it calls :meth:`begin_run` and :meth:`end_run`.
    """

    state_name: str

    def __init__(self) -> None:
        self._run: TrainerRun | None = None
        self._staged: int | None = None

    def write_state(self, path: Path, write: bool) -> None:
        """Write the state to ``path``, if ``write`` is set; a process that does not write may have to collect it all the same."""
        raise NotImplementedError

    def takes_part(self, args: TrainingArguments) -> bool:
        """Whether :meth:`write_state` is to be called in this process."""
        return args.should_save

    def begin_run(self) -> TrainerRun:
        """The Trainer's run that begins now."""
        self._run, self._staged = TrainerRun(), None
        return self._run

    def folder(self, args: TrainingArguments) -> Path:
        """Where checkpoints go."""
        return Path(args.output_dir or ".") if self._run is None else self._run.folder(args)

    def checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The checkpoint of the present step."""
        return self.folder(args) / f"checkpoint-{state.global_step}"

    def resumes_from(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The checkpoint that the run was told to resume from, or that of the present step."""
        told = None if self._run is None else self._run.resumed_from
        return Path(told or self.checkpoint(args, state))

    def tidy(self, args: TrainingArguments, state: TrainerState) -> None:
        """Of an earlier run that was killed: what belongs into the present checkpoint goes there, other staged files go away."""
        if not args.should_save:
            return
        complete(self.folder(args), state.global_step, self.state_name)
        stem, _, _ = self.state_name.partition(".")
        for stale in self.folder(args).glob(f".{stem}-*"):
            stale.unlink(missing_ok=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stage the state where a checkpoint is due."""
        self._stage(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stage the state where a checkpoint is due."""
        self._stage(args, state, control)

    def _stage(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if control.should_save:
            if args.should_save:  # a folder that the Trainer is about to write over is incomplete until it has done so
                for name in (self.state_name, "trainer_state.json"):
                    (self.checkpoint(args, state) / name).unlink(missing_ok=True)
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.takes_part(args):
            self._staged = state.global_step
            os.makedirs(self.folder(args), exist_ok=True)
            self.write_state(staged_file(self.folder(args), state.global_step, self.state_name), args.should_save)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint that the Trainer has just written."""
        if self._staged != state.global_step:  # save_strategy="best" decides after the evaluation
            self._write(args, state)
        self._complete(args, state)
        self._staged = None

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer uploads a checkpoint before it says that it was saved: it has to be complete by then."""
        self._complete(args, state)

    def _complete(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.takes_part(args) and args.should_save:
            complete(self.folder(args), state.global_step, self.state_name)

    def end_run(self, args: TrainingArguments, state: TrainerState) -> None:
        """What was staged for a checkpoint that the Trainer did not write is of no use."""
        if args.should_save:
            staged_file(self.folder(args), state.global_step, self.state_name).unlink(missing_ok=True)

    def state_of(self, checkpoint: Path) -> Path:
        """The state file of a checkpoint."""
        return state_file(checkpoint, self.state_name)
