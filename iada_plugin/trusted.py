"""From the trusted rows of a training set to what a run needs of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from .config import IADAConfig
from .data.trusted import check_trusted_rows
from .perturbation.reference import TrustedReference
from .runtime.batches import meta_dataloader, trained_labels


def with_reference(
    train_set: Any,
    trusted_rows: Any,
    meta_loader: Iterable[Any] | None,
    class_counts: Sequence[float] | Tensor | None,
    num_classes: int,
    num_features: int,
    config: IADAConfig,
    steps_per_epoch: int,
    epochs: float | None,
    device: torch.device,
) -> tuple[TrustedReference, Iterable[Any], Sequence[float] | Tensor | None]:
    """The reference, and what is not given: a loader of meta batches over the trusted rows, and class counts.

    Args:
        train_set, trusted_rows, meta_loader, class_counts, epochs, steps_per_epoch: as for :class:`iada_plugin.MetaIADA`.
        num_classes, num_features: C and H of the classifier.
        config: settings.
        device: where the histories live.

    Raises:
        ValueError: there is no map-style training set, or rows that cannot be trusted.
    """
    if train_set is None or not hasattr(train_set, "__len__"):
        raise ValueError(
            "trusted_rows are rows of the training set: pass it as train_set=, map-style (a streamed one has no row numbers; load"
            " it, or use meta_loader= without trusted rows)."
        )
    labels = trained_labels(train_set)
    rows = check_trusted_rows(trusted_rows, len(train_set), labels, num_classes)
    if class_counts is None and labels is not None:
        class_counts = torch.bincount(labels.long(), minlength=num_classes)
    known = None  # the labels of meta batches, where they are the trusted rows themselves
    if meta_loader is None:
        known = None if labels is None else labels[rows]
        size = config.meta_batch_size or 64
        meta_loader = meta_dataloader(Subset(train_set, rows.tolist()), size, config.seed)
    reference = TrustedReference(
        rows,
        len(train_set),
        gate=config.gate,
        level=config.gate_level,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        device=device,
        labels=known,
        num_classes=num_classes,
        num_features=num_features,
    )
    return reference, meta_loader, class_counts
