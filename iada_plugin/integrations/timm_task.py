"""`MetaIADATask`: Meta-IADA in timm's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import IADAConfig
from ..criterion import MetaIADA
from ..perturbation.characteristics import DEFAULT_CHARACTERISTICS, Characteristic
from ..runtime.checks import CUDA_GRAPH_MODES
from ..runtime.row_ids import split_target
from ..warmup import WarmUp

try:
    from timm.task import ClassificationTask
except ImportError as error:
    raise ImportError(
        "MetaIADATask needs timm >= 1.0.23, which has timm.task (pip install -U timm). With an older timm use MetaIADA as"
        " the criterion of the loop."
    ) from error


_NO_OPTIMIZER = "MetaIADATask has no optimizer yet: pass optimizer=..., or call task.set_optimizer(...)."


class MetaIADATask(ClassificationTask):
    """timm's `ClassificationTask` with Meta-IADA as the criterion.

    Make it before EMA, ``compile`` and DDP are set up, as any task. Label smoothing is that of the criterion; losses other than
    cross-entropy are refused; mixup and cutmix may run until class statistics are collected, one epoch before the warm-up ends
    (``--mixup-off-epoch``).

    Args:
        model: the model; its classifier is converted in place.
        criterion: ``None`` or a cross-entropy, of which only the label smoothing is used: train.py's ``train_loss_fn``.
        criterion_kwargs: as for `ClassificationTask`; "ce" only.
        device, dtype, verbose: as for `ClassificationTask`.
        optimizer: the optimizer that trains ``model``; where it is made after the task, call :meth:`set_optimizer`.
        meta_loader, train_set, trusted_rows, steps_per_epoch, class_counts, epochs, config, classifier, characteristics: as for
            `MetaIADA`. With trusted rows the loader is made of ``with_row_ids(train_set, in_target=True)``, with mixup and cutmix off.

    Raises:
        ValueError: naming train.py's flag that has to change, or ``steps_per_epoch`` or ``epochs``.
    """

    engine: MetaIADA | None

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Any] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        *,
        steps_per_epoch: int,
        meta_loader: Iterable[Any] | None = None,
        train_set: Any = None,
        trusted_rows: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        class_counts: Sequence[float] | Tensor | None = None,
        epochs: float | None = None,
        config: IADAConfig | None = None,
        classifier: str | nn.Module | None = None,
        characteristics: Sequence[Characteristic] = DEFAULT_CHARACTERISTICS,
    ) -> None:
        config = IADAConfig.of(config)
        if smoothing := _smoothing(criterion, criterion_kwargs or {}):
            config = replace(config, label_smoothing=smoothing)
        if optimizer is None:  # else said by the engine, below
            WarmUp(config.resolved(trusted_rows is not None), steps_per_epoch, epochs)
        # The base class holds the plain criterion; training calls the engine.
        super().__init__(model, nn.CrossEntropyLoss(), device=device, dtype=dtype, verbose=verbose)
        self._options: dict[str, Any] = {
            "meta_loader": meta_loader,
            "train_set": train_set,
            "trusted_rows": trusted_rows,
            "steps_per_epoch": steps_per_epoch,
            "class_counts": class_counts,
            "epochs": epochs,
            "config": config,
            "classifier": classifier,
            "characteristics": characteristics,
        }
        self.__dict__["engine"] = None
        self._loaded: dict[str, Tensor] | None = None
        if optimizer is not None:
            self.set_optimizer(optimizer)

    def set_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Start Meta-IADA on the model with this optimizer. Call it once, before the first step."""
        if self.engine is not None:
            self.engine.close()
        engine = MetaIADA(self.trainable_module, optimizer, **self._options)
        self.__dict__["engine"] = engine
        if self._loaded is not None:
            engine.load_state_dict(self._loaded)
            self._loaded = None

    def compile(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Compile the model, as `ClassificationTask`; the difference passes stay eager."""
        if self.engine is not None:
            self.engine.capture.mark_compiled(kwargs.get("mode") in CUDA_GRAPH_MODES)
        return super().compile(*args, **kwargs)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Logits and loss of a batch: ``{"loss": [], "output": [N, C]}``.

        Raises:
            RuntimeError: no optimizer was given.
        """
        if self.engine is None:
            raise RuntimeError(_NO_OPTIMIZER)
        output = self.trainable_module(input)
        labels, rows = split_target(target)
        return {"loss": self.engine(output, labels, ids=rows), "output": output}

    def start_fresh(self, step: int) -> None:
        """Go on at optimizer step ``step`` of a run whose checkpoint was made without this task (``load_checkpoint_state(...,
        strict=False)``): the warm-up lasts until statistics are collected, at least.

        Raises:
            RuntimeError: no optimizer was given.
            ValueError: too little of the run is left for that.
        """
        if self.engine is None:
            raise RuntimeError(_NO_OPTIMIZER)
        self.engine.start_fresh(step)

    def pop_metrics(self) -> dict[str, float]:
        """`MetaIADA.pop_metrics` under the same names in every epoch, NaN of what there is not yet: train.py's summary.csv has the
        columns of its first row.

        Raises:
            RuntimeError: no optimizer was given.
        """
        if self.engine is None:
            raise RuntimeError(_NO_OPTIMIZER)
        names = self.engine.metric_names
        found = self.engine.pop_metrics()
        return {name: found.get(name, float("nan")) for name in names}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Meta-IADA's part of a checkpoint: plain tensors. The EMA model has none."""
        return {} if ema or self.engine is None else {"iada": self.engine.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restore :meth:`get_task_state`.

        Raises:
            ValueError: the checkpoint has no Meta-IADA state and ``strict`` is set, or it does not fit.
        """
        if ema:
            return
        if not state or "iada" not in state:
            if strict:
                raise ValueError(
                    "the checkpoint has no Meta-IADA state: it was made without MetaIADATask. Load it with strict=False, and call"
                    " task.start_fresh(step)."
                )
            return
        if self.engine is None:
            self._loaded = state["iada"]
        else:
            self.engine.load_state_dict(state["iada"])


def _smoothing(criterion: Any, kwargs: dict[str, Any]) -> float:
    """By how much train.py's criterion smooths labels; only cross-entropy has IADA logits."""
    kind = type(criterion)
    plain = isinstance(criterion, nn.CrossEntropyLoss) and criterion.weight is None
    timms = kind.__module__.startswith("timm.loss") and kind.__name__ in (
        "LabelSmoothingCrossEntropy",
        "SoftTargetCrossEntropy",
    )
    if criterion is not None and not (plain or timms):
        raise ValueError(
            f"criterion={kind.__name__}: IADA is the loss, in the place of a cross-entropy. Leave --bce-loss and --jsd-loss out, and"
            " class weights (the class prior is in it: beta)."
        )
    if kwargs.get("loss_type") not in (None, "ce"):
        raise ValueError(f"loss_type={kwargs['loss_type']!r}: IADA is the loss; leave --bce-loss and the like out.")
    own = getattr(criterion, "label_smoothing", getattr(criterion, "smoothing", 0.0))
    return float(own or kwargs.get("smoothing") or 0.0)
