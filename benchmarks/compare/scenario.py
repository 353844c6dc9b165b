"""What a scenario is: samples, published hyperparameters, and how predictions are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iada_plugin import metrics

from .loop import Samples


@dataclass
class Settings:
    """How a scenario is trained; by default as published where the data are, small where they are built in."""

    model: str = "resnet32"
    epochs: int = 200
    batch_size: int = 100
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.8, 0.9)
    gamma: float = 0.01
    warmup_ratio: float = 0.8
    meta_batch_size: int | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scenario:
    """Data of one experiment.

    Attributes:
        name: of the scenario.
        num_classes: C.
        train, meta, test: samples.
        val: samples that select settings and epochs, or ``None``.
        settings: defaults.
        score: predictions and samples to named figures in 0..1, the first of them being what is optimised.
        network: makes an untrained network by name.
        augment: for training batches.
        keep_best: end with the epoch of the best validation score instead of the last.
        class_names: for reports.
        trusted: ``[T]`` rows of ``train`` that are the meta set: its samples are trained along, for every method.
    """

    name: str
    num_classes: int
    train: Samples
    meta: Samples
    test: Samples
    settings: Settings
    score: Callable[[Tensor, Samples], dict[str, float]]
    network: Callable[[str], nn.Module]
    val: Samples | None = None
    augment: Callable[[Tensor], Tensor] | None = None
    keep_best: bool = False
    class_names: Sequence[str] | None = None
    trusted: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Training samples of each class."""
        return torch.bincount(self.train.y, minlength=self.num_classes).tolist()


def train_along(scenario: Scenario) -> Scenario:
    """The same with the meta set's samples among the training samples, as trusted rows, for every method."""
    rows = torch.arange(len(scenario.train), len(scenario.train) + len(scenario.meta))
    return replace(scenario, train=scenario.train.joined(scenario.meta), trusted=rows)


def class_scores(counts: Sequence[int]) -> Callable[[Tensor, Samples], dict[str, float]]:
    """Accuracy, macro accuracy and precision, and many-, medium- and few-shot accuracy."""

    def score(predictions: Tensor, samples: Samples) -> dict[str, float]:
        y, num_classes = samples.y.cpu().numpy(), len(counts)
        per_class = metrics.class_accuracies(predictions.numpy(), y, num_classes)
        return {
            "accuracy": float((predictions.numpy() == y).mean()),
            "macro_accuracy": float(np.nanmean(per_class)),
            **metrics.shot_accuracies(per_class, counts),
            "macro_precision": metrics.macro_precision(predictions.numpy(), y, num_classes),
        }

    return score


def balanced_scores(predictions: Tensor, samples: Samples) -> dict[str, float]:
    """Accuracy and macro precision."""
    found = class_scores([1] * (int(samples.y.max()) + 1))(predictions, samples)
    return {name: found[name] for name in ("accuracy", "macro_precision")}


def group_scores(num_groups: int, train_groups: Tensor, min_size: int = 1) -> Callable[..., dict[str, float]]:
    """Worst-group and average accuracy, and the average weighted by the groups' shares of the training set."""
    sizes = _memberships(train_groups, num_groups).sum(axis=0)

    def score(predictions: Tensor, samples: Samples) -> dict[str, float]:
        correct = (predictions == samples.y.cpu()).numpy()
        groups = _memberships(samples.groups, num_groups)  # type: ignore[arg-type]
        worst, index = metrics.worst_group_accuracy(correct, groups, min_size)
        found = {"worst_group": worst, "average": float(correct.mean())}
        if samples.groups.dim() == 1:  # type: ignore[union-attr]
            found["weighted_average"] = metrics.weighted_group_accuracy(correct, groups, sizes)
        return {**found, "worst_group_index": index, "worst_group_size": int(groups[:, index].sum())}

    score.min_size = min_size  # type: ignore[attr-defined]
    return score


def _memberships(groups: Tensor, num_groups: int) -> np.ndarray:
    values = groups.cpu().numpy()
    return metrics.group_memberships(values, num_groups) if values.ndim == 1 else values.astype(bool)
