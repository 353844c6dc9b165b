"""Running a method on a scenario, and the methods that are settings of the IADA loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from iada_plugin.config import IADAConfig
from iada_plugin.criterion import MetaIADA
from iada_plugin.meta.schedules import SCHEDULES
from iada_plugin.metrics import auroc
from iada_plugin.runtime.isolation import seed_rng

from .loop import Batches, Samples, fit, predict
from .scenario import Scenario, Settings


@dataclass
class Run:
    """What a method may look at. ``config`` holds settings of `IADAConfig` that were asked for."""

    scenario: Scenario
    settings: Settings
    train: Samples
    meta: Samples
    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    seed: int
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> Tensor:
        """``[C]`` training samples of each class."""
        return torch.bincount(self.train.y, minlength=self.scenario.num_classes)

    def meta_batches(self, config: IADAConfig) -> Batches:
        """Batches of the meta set, augmented as in training."""
        size = self.settings.meta_batch_size or SCHEDULES[config.schedule].meta_batch(config, self.settings.batch_size)
        size = math.ceil(len(self.meta) / math.ceil(len(self.meta) / size))  # no small rest
        return Batches(self.meta, size, augment=self.scenario.augment)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        title: for tables.
        criterion: makes ``criterion(output, y, rows) -> loss``; `fit` tells what else it may have.
        add_meta: train on the meta samples too.
        finish: called after training, with the run and the criterion.
    """

    title: str
    criterion: Callable[[Run], Any]
    add_meta: bool = False
    finish: Callable[[Run, Any], None] | None = None


class CrossEntropy:
    """Cross-entropy; keeps each sample's last loss, the usual signal of a wrong label."""

    def __init__(self, run: Run) -> None:
        self.signal = torch.zeros(len(run.train), device=run.train.y.device)

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Mean loss."""
        loss = F.cross_entropy(output, y, reduction="none")
        self.signal[rows] = loss.detach()
        return loss.mean()


class IADA:
    """Meta-IADA as `fit` calls it; keeps each sample's signal, large for wrong labels: where trusted rows are the reference, whether
    the label is let go and its mean margin, otherwise its last epsilon with its sign turned."""

    def __init__(self, run: Run, engine: type[MetaIADA] = MetaIADA, as_reference: bool = True, **config: Any) -> None:
        if fixed := sorted(set(config) & set(run.config)):
            raise ValueError(f"this method has its own {', '.join(fixed)}: use 'iada' to choose.")
        trusted = run.scenario.trusted if as_reference else None
        fixed_warmup = {"warmup_ratio": run.settings.warmup_ratio} if trusted is None else {}
        config = {**fixed_warmup, "seed": run.seed, **run.settings.config, **run.config, **config}
        settings = IADAConfig(**config).resolved(trusted is not None)
        reference = {"class_counts": run.counts} if trusted is None else {
            "train_set": TensorDataset(run.train.x, run.train.y), "trusted_rows": trusted}  # fmt: skip
        self.engine = engine(
            run.model, run.optimizer, meta_loader=run.meta_batches(settings), steps_per_epoch=run.steps_per_epoch,
            epochs=run.settings.epochs, config=settings, **reference,
        )  # fmt: skip
        #: Epochs that must not be selected as the method's result.
        self.warmup_epochs = 0 if trusted is not None else math.ceil(self.engine.warmup.steps / run.steps_per_epoch)
        self.signal = torch.zeros(len(run.train), device=run.train.y.device)

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """The engine's loss."""
        loss = self.engine(output, y, ids=rows)
        if self.engine.epsilon is not None:
            self.signal[rows] = -self.engine.epsilon.to(self.signal.dtype)
        return loss

    def pop_metrics(self) -> dict[str, float]:
        """The engine's log."""
        return self.engine.pop_metrics()

    def close(self) -> None:
        """Give the classifier back as it was."""
        self.engine.close()


def iada_method(title: str, as_reference: bool = True, **config: Any) -> Method:
    """Meta-IADA with these settings of `IADAConfig`; ``as_reference=False``: with the trusted rows as a meta set only."""
    return Method(title, lambda run: IADA(run, as_reference=as_reference, **config))


#: epsilon = 0 and the covariances as estimated: no meta step.
_NOTHING_LEARNED = {"meta_lr": 0.0, "covariance_lr": 0.0}

#: The published meta step: a virtual step in every step.
PAPER_STEP = {"schedule": "lookahead", "meta_every": 1, "meta_momentum": 0.0}
#: The perturbation and the warm-up as published, too.
PAPER = {
    **PAPER_STEP,
    "epsilon_range": (-1, 1),
    "perturbation_scale": "unit",
    "perturbation_size": 1.0,
    "fixed_shift": False,
    "prior_in_warmup": False,
}

METHODS: dict[str, Method] = {
    "ce": Method("cross-entropy", CrossEntropy),
    "iada": iada_method("Meta-IADA"),
    "iada_gate": iada_method("Meta-IADA, gate only", alpha=0.0, **_NOTHING_LEARNED),
    "iada_early": iada_method("Meta-IADA, perturbations in nats from a fifth of the run", perturbation_scale="margin", alpha=0.0,
                              warmup_ratio=0.2),
    "iada_online": iada_method("Meta-IADA, cheap meta step", schedule="online", meta_every=5),
    "iada_paper": iada_method("Meta-IADA, paper's perturbation", False, **PAPER),
    "isda": iada_method("ISDA", False, beta=0.0, **_NOTHING_LEARNED),
    "isda_prior": iada_method("ISDA + prior", False, **_NOTHING_LEARNED),
    "metasaug": iada_method("MetaSAug + prior", False, meta_lr=0.0, **PAPER_STEP),
}  # fmt: skip


def make_optimizer(model: nn.Module, settings: Settings) -> tuple[torch.optim.Optimizer, Any]:
    """Optimizer and learning-rate schedule (x ``gamma`` at ``milestones``, shares of the run)."""
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay
        )
    elif settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    else:
        raise ValueError(f"optimizer={settings.optimizer!r} is none of 'sgd', 'adamw'.")
    milestones = [round(share * settings.epochs) for share in settings.milestones]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, settings.gamma)


def run_method(
    scenario: Scenario,
    method: Method,
    *,
    settings: Settings | None = None,
    seed: int = 0,
    device: str = "cpu",
    config: dict[str, Any] | None = None,
    test: bool = True,
) -> dict[str, Any]:
    """Train one method on one scenario.

    Every method starts from the same weights (``seed``) and has the same epochs and optimizer.

    Args:
        scenario: data.
        method: how to train.
        settings: by default the scenario's.
        seed: of weights, order, augmentation and the method.
        device: to train on.
        config: settings of `IADAConfig`, for the methods that have one.
        test: score the test samples; off while settings are chosen.

    Returns:
        ``metrics`` (test), ``validation``, ``config`` (of the IADA loss, where the method has it), ``curve``, ``seconds``, ``predictions`` and, where true labels are known,
        ``noise_auroc``: how well the method's per-sample signal ranks wrong labels first.
    """
    settings = settings or scenario.settings
    seed_rng(torch.device(device), seed)
    model = scenario.network(settings.model).to(device)
    if next(model.parameters()).is_floating_point() and any(p.dim() == 4 for p in model.parameters()):
        model = model.to(memory_format=torch.channels_last)
    train, meta = scenario.train.to(device), scenario.meta.to(device)
    if method.add_meta:
        train = train.joined(meta)
    batches = Batches(train, settings.batch_size, augment=scenario.augment, rows=True)
    optimizer, scheduler = make_optimizer(model, settings)
    run = Run(scenario, settings, train, meta, model, optimizer, len(batches), seed, config or {})
    seed_rng(torch.device(device), seed + 1)  # the same batches for every method until one of them draws differently
    criterion = method.criterion(run)
    val = None if scenario.val is None else scenario.val.to(device)

    def validate(model: nn.Module) -> float:
        return next(iter(scenario.score(predict(model, val), scenario.val).values()))  # type: ignore[arg-type]

    first = getattr(criterion, "warmup_epochs", 0) if scenario.keep_best and val is not None else None
    curve, seconds = fit(
        model, batches, criterion, optimizer, settings.epochs, scheduler=scheduler,
        validate=None if val is None else validate, keep_best_after=first, description=method.title,
    )  # fmt: skip
    start = time.perf_counter()
    if hasattr(criterion, "close"):
        criterion.close()
    if method.finish is not None:
        method.finish(run, criterion)
    seconds += time.perf_counter() - start
    found: dict[str, Any] = {"curve": curve, "seconds": round(seconds, 1)}
    if val is not None:
        found["validation"] = scenario.score(predict(model, val), scenario.val)  # type: ignore[arg-type]
    if hasattr(criterion, "engine"):
        found["config"] = criterion.engine.config.to_dict()
    if test:
        predictions = predict(model, scenario.test.to(device))
        found |= {"metrics": scenario.score(predictions, scenario.test), "predictions": predictions}
    found["noise_auroc"] = _noise_auroc(criterion, train)
    return found


def _noise_auroc(criterion: Any, train: Samples) -> float | None:
    """Area under the ROC curve of the criterion's signal as a detector of wrong labels."""
    signal = getattr(criterion, "signal", None)
    if signal is None or train.clean is None or not bool((wrong := train.clean != train.y).any()):
        return None
    return auroc(signal.cpu().numpy(), wrong.cpu().numpy())


def with_overrides(settings: Settings, **overrides: Any) -> Settings:
    """Settings with everything that is not ``None`` in its place."""
    return replace(settings, **{k: v for k, v in overrides.items() if v is not None})
