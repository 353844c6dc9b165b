"""`MetaIADACallback`: Meta-IADA in a Hugging Face `Trainer`, by one argument."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler
from tqdm import tqdm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ..config import IADAConfig
from ..criterion import MetaIADA
from ..data.trusted import check_trusted_rows, with_trusted
from ..meta.schedules import SCHEDULES
from ..perturbation.characteristics import DEFAULT_CHARACTERISTICS, Characteristic
from ..runtime.batches import length_of, meta_dataloader, trained_labels
from ..runtime.capture import LABEL_KEYS, Hook
from ..runtime.checks import CUDA_GRAPH_MODES, REENTRANT
from ..runtime.row_ids import SAMPLE_IDS
from .checkpoint import STATE_FILE, load_state, save_state
from .checkpointed import CheckpointedCallback
from .trainer_report import TrainerReport, write_report
from .trainer_rows import TrainerRows, check_numbered

if TYPE_CHECKING:
    from ..report.report import Report


class MetaIADACallback(CheckpointedCallback):
    """Trains a Trainer's classifier with Meta-IADA: ``Trainer(..., callbacks=[MetaIADACallback(meta_dataset=meta)])``.

    The loss is taken over by a hook on the model for the length of ``train()``: cross-entropy in warm-up, Meta-IADA
    afterwards. Evaluation, saving and the model class are untouched, and ``save_pretrained`` gives a plain checkpoint.

    Logged with the training loss: ``iada/epsilon_mean``, ``iada/epsilon_std``, ``iada/adversarial_ratio``,
    ``iada/meta_loss``. In a plain ``callbacks=[...]`` entry they reach the progress bar and ``state.log_history`` only,
    because TensorBoard and W&B stand before it; :meth:`attach_to` puts it in front of them.

    Args:
        meta_dataset: small, clean, class-balanced set (a `datasets.Dataset` or map-style torch data set), prepared like
            the training set; disjoint from it. See :func:`iada_plugin.data.balanced_meta_split`. :meth:`attach_to` joins it to
            the training data, as trusted rows.
        config: settings.
        trusted_rows: row numbers, or a mask, of the samples of the Trainer's training set whose label was checked. They take the
            place of ``meta_dataset``, and labels that do not look like theirs are let go; see `MetaIADA`.
        class_counts: ``[C]`` training samples per class. Default: the training set's label column if it has one, else
            counted during warm-up.
        classifier: name of the classifier's last layer where it is not found by itself.
        characteristics: functions ``BatchState -> [N]``.
        resume_from: the checkpoint folder that holds the state, or "fresh" to resume a run that has none. Default: the one that
            the Trainer resumes from.
        report_dir: folder for a :class:`iada_plugin.Report`, written when training ends. Samples are told by their row number in
            the training set; evaluations during training are part of it (in one process).
        report_options: arguments of the `Report`, such as ``true_labels``, ``samples`` and ``epochs``.

    Attributes:
        engine: the :class:`iada_plugin.MetaIADA`, while training.
        report: the `Report` of the last ``train()``, or ``None``.
    """

    state_name = STATE_FILE

    def __init__(
        self,
        meta_dataset: Any = None,
        config: IADAConfig | None = None,
        *,
        trusted_rows: Any = None,
        class_counts: Sequence[float] | Tensor | None = None,
        classifier: str | None = None,
        characteristics: Sequence[Characteristic] = DEFAULT_CHARACTERISTICS,
        resume_from: str | Path | None = None,
        report_dir: str | Path | None = None,
        report_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (meta_dataset is None) == (trusted_rows is None):
            raise ValueError(
                "MetaIADACallback needs samples with right labels: pass trusted_rows=, rows of the training set, or meta_dataset=, a"
                " set of its own; not both."
            )
        if meta_dataset is not None:
            self._check_meta_set(meta_dataset)
        self.meta_dataset, self.trusted_rows = meta_dataset, trusted_rows
        self.config = IADAConfig.of(config)
        self.class_counts = class_counts
        self.classifier = classifier
        self.characteristics = characteristics
        self.resume_from = resume_from
        self.report_dir, self.report_options = report_dir, dict(report_options or {})
        if report_dir is not None:
            TrainerReport.check(self.report_options)
        self.engine: MetaIADA | None = None
        self._phase = ""
        self.report: Report | None = None
        self._watch: TrainerReport | None = None
        self._own_loss_seen = self._unlabelled = False
        self._rows: TrainerRows | None = None
        self._hooks: list[Hook] = []  # on the model

    @staticmethod
    def _check_meta_set(meta_dataset: Any) -> None:
        map_style = hasattr(meta_dataset, "__len__") and hasattr(meta_dataset, "__getitem__")
        if not map_style or isinstance(meta_dataset, (Mapping, str)):
            raise TypeError(
                f"meta_dataset is a {type(meta_dataset).__name__}: it must be a map-style data set (with a length), such as"
                " one split of a DatasetDict; it is small, so load a streamed one into memory."
            )
        if len(meta_dataset) == 0:
            raise ValueError("the meta set is empty: pass at least one sample a class.")

    # ---------------------------------------------------------------------------------------------------- front doors

    def attach_to(self, trainer: Trainer, join: bool = True) -> MetaIADACallback:
        """Add this callback to a Trainer in front of its reporters, so that they get the ``iada/`` scalars too.

        Args:
            trainer: the Trainer.
            join: a ``meta_dataset`` is joined to the Trainer's training set, as trusted rows that are trained along.

        Raises:
            ValueError: the Trainer computes its loss outside the model.
        """
        _check_loss(trainer)
        if join and self.meta_dataset is not None:
            trainer.train_dataset, self.trusted_rows = with_trusted(trainer.train_dataset, self.meta_dataset)
            self.meta_dataset = None
        if self in trainer.callback_handler.callbacks:
            trainer.remove_callback(self)
        trainer.callback_handler.callbacks.insert(1, self)  # the flow callback, which decides what is due, stays first
        return self

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps_per_epoch: int,
        epochs: float | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> MetaIADA:
        """The engine for a timm or plain loop, on this callback's meta set and settings.

        Args:
            model, optimizer, steps_per_epoch, epochs: as for :class:`iada_plugin.MetaIADA`.
            collate_fn: makes a batch of meta samples, as in a `DataLoader`.

        Returns:
            The criterion: ``loss = engine(model(input), target)``. ``meta_batch_size`` is 64 unless configured.
        """
        if self.meta_dataset is None:
            raise ValueError(
                "attach() has no training set to take trusted rows from: use MetaIADA(train_set=..., trusted_rows=...)."
            )
        size = self.config.meta_batch_size or 64
        return MetaIADA(
            model,
            optimizer,
            meta_loader=meta_dataloader(self.meta_dataset, size, self.config.seed, collate_fn),
            class_counts=self.class_counts,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            config=self.config,
            classifier=self.classifier,
            characteristics=self.characteristics,
        )

    # ------------------------------------------------------------------------------------------------- Trainer events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the loss. Runs again whenever the Trainer starts over (``auto_find_batch_size``, a second train)."""
        self.uninstall()
        run = self.begin_run()
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        trainer = run.trainer
        _check_arguments(args, model)
        _check_loss(trainer)
        batches = length_of(loader)
        steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps) if batches else state.max_steps
        trusted = {}
        if self.trusted_rows is not None:
            if batches is None:
                raise ValueError(
                    "the training set is streamed: its samples have no row numbers, so there can be no trusted rows. Load it, or pass"
                    " meta_dataset= instead."
                )
            check_numbered(loader, trainer)
            trusted = {"train_set": loader.dataset, "trusted_rows": self.trusted_rows}
        self.engine = MetaIADA(
            model,
            kwargs["optimizer"],
            meta_loader=self._meta_loader(args, state, loader),
            **trusted,
            class_counts=self.class_counts if self.class_counts is not None else _class_counts(loader, model),
            steps_per_epoch=steps_per_epoch,
            epochs=state.max_steps / steps_per_epoch,
            config=self.config,
            classifier=self.classifier,
            characteristics=self.characteristics,
        )
        if args.torch_compile:
            self.engine.capture.mark_compiled(args.torch_compile_mode in CUDA_GRAPH_MODES)
        self._own_loss_seen, self._unlabelled, self._phase = False, False, ""
        self._hooks = [Hook(self._replace_loss).on(self.engine.model.register_forward_hook, with_kwargs=True)]
        if trainer is not None:
            self._hooks.append(Hook(self._check_run).on(self.engine.model.register_forward_pre_hook, prepend=True))
        try:
            if self.report_dir is not None or self.trusted_rows is not None:
                capture = self.engine.capture
                self._rows = TrainerRows(self.engine.model, loader, busy=lambda: capture.busy)
            if self.report_dir is not None:
                self._watch = TrainerReport(self.engine, model, self._rows, self.report_options)
                self.report = self._watch.report
            if state.global_step > 0:
                self._resume(args, state)
        except Exception:
            self.uninstall()
            raise
        self.tidy(args, state)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.engine is not None
        if self.resume_from == "fresh":
            self.engine.start_fresh(state.global_step)
            return
        folder = Path(self.resume_from or self.resumes_from(args, state))
        try:
            load_state(self.engine, self.state_of(folder))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the run resumes at step {state.global_step}, but {error}. Resume from"
                " iada_plugin.last_complete_checkpoint(output_dir), name the folder with"
                " MetaIADACallback(resume_from=...), or start the method anew with resume_from='fresh'."
            ) from error
        if self._watch is not None:
            self._watch.load(folder, state.global_step)

    def _meta_loader(self, args: TrainingArguments, state: TrainerState, train_loader: Any) -> Any:
        """Meta samples get the column filter and the collator of the training samples."""
        dataset = self.meta_dataset
        if dataset is None:
            rows = check_trusted_rows(self.trusted_rows, len(train_loader.dataset)).tolist()
            whole = train_loader.dataset
            dataset = whole.select(rows) if hasattr(whole, "select") else Subset(whole, rows)
        wanted = getattr(getattr(train_loader, "dataset", None), "column_names", None) or []
        wanted = [c for c in wanted if c != SAMPLE_IDS]
        own = getattr(dataset, "column_names", None)
        if wanted and own:
            missing = [c for c in wanted if c not in own]
            if missing:
                raise ValueError(
                    f"meta_dataset lacks the columns {missing} of the training set (it has {own}): prepare both alike"
                    " (tokenizer, renamed label column)."
                )
            dataset = dataset.remove_columns([c for c in own if c not in wanted])
        # auto_find_batch_size lowers the state's batch size, not the argument's.
        config = self.config.resolved(self.trusted_rows is not None)
        size = SCHEDULES[config.schedule].meta_batch(  # type: ignore[index]
            config, (state.train_batch_size or args.train_batch_size) * args.world_size
        )
        return meta_dataloader(
            dataset,
            size,
            self.config.seed,
            self._collator(train_loader),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )

    def _collator(self, train_loader: Any) -> Any:
        """What makes batches of samples; the Trainer's where ``get_train_dataloader`` was overridden to give another kind of loader."""
        found = getattr(train_loader, "collate_fn", None) or getattr(
            self._run and self._run.trainer, "data_collator", None
        )
        if found is None:
            raise ValueError(
                f"the training loader is a {type(train_loader).__name__} without a collate_fn, by which meta batches are made: return a"
                " DataLoader from get_train_dataloader."
            )
        return found

    def _check_run(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook on the model: after a ``train()`` that was broken off, which says so to nobody, it is the user's again."""
        if self._run is not None and module.training and torch.is_grad_enabled() and self._run.over:
            self.uninstall()

    def takes_part(self, args: TrainingArguments) -> bool:
        """Sharded parameters are collected in all processes."""
        return self.engine is not None and (args.should_save or self.engine.capture.sharded)

    def write_state(self, path: Path, write: bool) -> None:
        """The engine's."""
        assert self.engine is not None
        save_state(self.engine, path, write=write)

    def _replace_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """Forward hook on the model: the training loss in its outputs becomes the engine's."""
        engine = self.engine
        if engine is None or engine.capture.busy:
            return None
        labels = next((kwargs[k] for k in LABEL_KEYS[:3] if kwargs.get(k) is not None), None)
        if not (module.training and torch.is_grad_enabled()):
            if self._watch is not None and not module.training:
                self._watch.note_pass(outputs, labels)
            return None
        if labels is None:
            self._unlabelled = True
            return None  # a further pass of a training_step, which has a loss of its own; where it was the only one, see on_step_end
        kind = getattr(getattr(module, "config", None), "problem_type", None)
        if labels.is_floating_point() or kind in ("regression", "multi_label_classification"):
            raise ValueError(
                f"labels are {labels.dtype} of shape {list(labels.shape)} (problem_type={kind!r}): IADA needs one class index"
                " per sample. Regression and multi-label problems are not supported."
            )
        labels = labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
        is_mapping = isinstance(outputs, Mapping)
        # Under whatever name the model returns them, they are the classifier's.
        own = engine.logits_seen
        logits = outputs.get("logits", own) if is_mapping else outputs[1] if _are_logits(outputs) else own
        if not self._own_loss_seen:
            self._own_loss_seen = True
            _check_own_loss(outputs, logits, labels, kwargs.get("num_items_in_batch"))
        ids = None if self._rows is None else self._rows.take()
        if self.trusted_rows is None and self._watch is not None:
            ids = self._watch.fitting(ids, len(labels))
        loss = engine(logits, labels, kwargs.get("num_items_in_batch"), ids)
        if is_mapping:
            outputs["loss"] = loss
            return outputs
        return (loss, *outputs[1:])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stage the state where a checkpoint is due; check that the loss really was replaced."""
        if self.engine is not None and not self.engine.trained:
            if self._unlabelled and not self._own_loss_seen:
                raise ValueError(_LOSS_OUTSIDE)
            raise RuntimeError(
                "the loss of MetaIADACallback was not the one that was trained in the first step: the Trainer's compute_loss"
                " makes its own (a subclass?), or it trains another module than it gave its callbacks. Let compute_loss"
                " return outputs.loss, or use MetaIADA as the criterion there."
            )
        if self.engine is not None and (phase := self.engine.phase) != self._phase:
            self._phase = phase
            if state.is_world_process_zero and not args.disable_tqdm:
                tqdm.write(f"Meta-IADA after step {state.global_step}: {phase}.")
        super().on_step_end(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint that the Trainer has just written."""
        super().on_save(args, state, control, **kwargs)
        folder = self.checkpoint(args, state)
        if self._watch is not None and folder.is_dir():
            self._watch.save(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the ``iada/`` scalars to a log of the training loss."""
        if self.engine is None or logs is None or "loss" not in logs:
            return
        metrics = self.engine.pop_metrics()
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What an evaluation that was broken off has left is of no use."""
        if self._watch is not None:
            self._watch.forget_evaluation()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take note of an evaluation's batch for the report."""
        if self._watch is not None:
            self._watch.end_prediction_step()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the predictions of the last evaluation in the warm-up and of the last one of all for the report."""
        if self._watch is not None:
            self._watch.end_evaluation(metrics or {})

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Predictions in between are no evaluation."""
        if self._watch is not None:
            self._watch.forget_evaluation()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model back as it was, and write the report."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best and self.engine is not None and self.engine.reference is None:
            step = Path(best).name.rpartition("-")[2]
            if step.isdigit() and int(step) <= self.engine.warmup.steps:
                warnings.warn(
                    f"the best model, of step {step}, is one of the warm-up of {self.engine.warmup.steps} steps: it was trained without"
                    " Meta-IADA. Choose a metric_for_best_model that leaves the warm-up out (docs/trainer.md, The best epoch)."
                )
        self.uninstall()
        self.end_run(args, state)
        if self.report is not None and self.report_dir is not None:
            write_report(self.report, self.report_dir)

    def uninstall(self) -> None:
        """Remove every hook and restore the classifier, after an interrupted ``train()`` for instance."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._watch = None
        if self._rows is not None:
            self._rows.remove()
            self._rows = None
        if self.engine is not None:
            self.engine.close()
            self.engine = None


_LOSS_OUTSIDE = (
    "the labels do not reach the model, so its loss cannot be replaced: label_smoothing_factor, compute_loss_func or a"
    " compute_loss of your own moves the loss out of it. IADA is the loss: use neither, set label_smoothing_factor=0, and smooth labels by"
    " IADAConfig(label_smoothing=...)."
)


def _check_loss(trainer: Any) -> None:
    """The Trainer, where it is known, leaves the loss to the model."""
    if getattr(trainer, "label_smoother", None) is not None or getattr(trainer, "compute_loss_func", None) is not None:
        raise ValueError(_LOSS_OUTSIDE)


def _are_logits(outputs: Any) -> bool:
    """A tuple of a loss and logits ``[N, C]``."""
    return isinstance(outputs, tuple) and len(outputs) > 1 and isinstance(outputs[1], Tensor) and outputs[1].dim() == 2


def _check_own_loss(outputs: Any, logits: Tensor, labels: Tensor, num_items: Any) -> None:
    """The model's own loss is cross-entropy and nothing else: the rest of it would be dropped.

    Raises:
        ValueError: it is not.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(own, Tensor) or own.numel() != 1:
        return
    total = F.cross_entropy(logits.detach().float(), labels.long(), reduction="sum")
    value, tolerance = float(own.detach()), 1e-3 if logits.dtype == torch.float32 else 3e-2
    expected = [float(total) / len(labels), *([] if num_items is None else [float(total) / float(num_items)])]
    if math.isfinite(value) and all(abs(value - e) > tolerance * max(1.0, abs(e)) for e in expected):
        raise ValueError(
            f"the model's own loss is {value:.4g} where the cross-entropy of its logits is {expected[0]:.4g}: it has further terms (an"
            " auxiliary head, a regulariser, class weights), which MetaIADACallback would leave out. Have the model return the"
            " cross-entropy alone (IADA has the class prior in it; weights: IADAConfig(class_weights=...)), or add the other terms to"
            " MetaIADA in a loop or compute_loss of your own."
        )


def _check_arguments(args: TrainingArguments, model: nn.Module) -> None:
    """What cannot work, said before the first step."""
    if args.label_smoothing_factor:
        raise ValueError(_LOSS_OUTSIDE)
    if args.n_gpu > 1:
        raise ValueError(
            "the Trainer would wrap the model in DataParallel, which copies it in every step. Launch with torchrun"
            " --nproc_per_node N, or use one GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    config = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    if kind in ("regression", "multi_label_classification") or getattr(config, "num_labels", 2) == 1:
        raise ValueError(
            f"the model is set up for {kind or 'regression (num_labels=1)'}: IADA needs a softmax over classes. Use"
            " num_labels >= 2 and problem_type='single_label_classification'."
        )
    options = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
        raise ValueError(REENTRANT)


def _class_counts(loader: Any, model: nn.Module) -> Tensor | None:
    """``[C]`` from the training set's label column, or ``None`` where it has none that can be read at once."""
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    dataset = getattr(loader, "dataset", None)
    kinds = getattr(dataset, "features", None) or {}
    kind = kinds.get("labels", kinds.get("label")) if isinstance(kinds, dict) else None
    if str(getattr(kind, "dtype", "")).startswith("float"):
        raise ValueError(
            "the training set's labels are floats, which transformers takes for multi-label data: cast them,"
            " dataset.cast_column('labels', Value('int64')). IADA needs one class index per sample."
        )
    sampler = loader
    while inner := [found for n in ("batch_sampler", "sampler") if (found := getattr(sampler, n, None)) is not None]:
        sampler = inner[0]
    if num_labels is None or isinstance(sampler, WeightedRandomSampler):
        return None  # what is drawn counts
    labels = trained_labels(loader if isinstance(loader, DataLoader) else dataset)
    if labels is None:
        return None
    wrong = labels[(labels < 0) | (labels >= num_labels)]
    if wrong.numel():
        raise ValueError(f"the training set has the label {int(wrong[0])}; the model has {num_labels} classes.")
    return torch.bincount(labels.long(), minlength=num_labels)
