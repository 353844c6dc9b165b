"""Targets that are class probabilities: where they can be trained with."""

from __future__ import annotations

from torch import Tensor

from .config import IADAConfig
from .functional.labels import smoothing_of


def check_soft_targets(target: Tensor, config: IADAConfig, *, trusted: bool, step: int, statistics_start: int) -> None:
    """Mixed samples, of mixup and cutmix, have no one label: they can be trained with until class statistics are collected.

    Args:
        target: ``[N, C]`` probabilities.
        config: settings.
        trusted: whether there are trusted rows.
        step: optimizer steps so far.
        statistics_start: the first one whose samples enter the class statistics.

    Raises:
        ValueError: they cannot be trained with here, and why.
    """
    smoothing, expected = smoothing_of(target), config.label_smoothing
    if smoothing is not None and abs(smoothing - expected) > 1e-2:
        raise ValueError(
            f"targets are smoothed by {smoothing:g}, and label_smoothing is {expected:g}: pass"
            f" IADAConfig(label_smoothing={smoothing:g}), so that unmixed samples are trained alike."
        )
    if trusted:
        raise ValueError(
            f"soft targets {list(target.shape)} with trusted rows: a mixed sample has no label of its own that could be right or"
            " wrong. Switch mixup and cutmix off (timm: --mixup 0 --cutmix 0)."
        )
    if config.class_weights is not None:
        raise ValueError(
            f"soft targets {list(target.shape)} with class_weights: a mixed sample is of no one class. Switch mixup and cutmix off, or"
            " leave class_weights out (the class prior makes up for rare classes)."
        )
    if step >= statistics_start:
        raise ValueError(
            f"soft targets {list(target.shape)} at step {step}: from step {statistics_start} on, where class"
            " statistics are collected before the warm-up ends, IADA needs class indices: a mixed sample has the features of no class,"
            " and no perturbation within one. Switch mixup and cutmix off by then (timm: --mixup-off-epoch, or --mixup 0 --cutmix 0)."
        )
