"""Reading the labels of a data set or loader without loading its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def labels_of(data: Any) -> torch.Tensor | None:
    """The labels ``[N]`` of a data set or loader if they can be read without loading samples, else ``None``.

    Understands Hugging Face datasets (a column "labels" or "label") and their columns, ``.targets`` or ``.labels``, `TensorDataset`,
    `Subset`, `ConcatDataset`, and loaders over them.
    """
    data = getattr(data, "dataset", data) if isinstance(data, torch.utils.data.DataLoader) else data
    if isinstance(data, torch.utils.data.Subset):
        inner = labels_of(data.dataset)
        return None if inner is None else inner[torch.as_tensor(list(data.indices), dtype=torch.long)]
    if isinstance(data, torch.utils.data.ConcatDataset):
        parts = [labels_of(part) for part in data.datasets]
        return None if any(part is None for part in parts) else torch.cat(parts)  # type: ignore[arg-type]
    found = None
    source, column = getattr(data, "source", None), getattr(data, "column_name", None)
    columns = getattr(data, "column_names", None)
    if column is not None and hasattr(source, "with_format"):  # datasets' lazy Column, which reads row by row
        found = source.with_format(None)[column][:]
    elif columns is not None:
        name = next((c for c in ("labels", "label", "label_ids") if c in columns), None)
        if name is not None and hasattr(data, "__len__"):
            found = data.with_format(None)[name][:]
    elif isinstance(data, torch.utils.data.TensorDataset):
        found = data.tensors[1] if len(data.tensors) == 2 else None  # which of more it is, is not known
    else:
        found = next((getattr(data, name) for name in ("targets", "labels") if hasattr(data, name)), None)
    if found is None:
        return None
    try:
        labels = found.detach().cpu() if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))
    except (TypeError, ValueError):
        return None
    return labels if labels.dim() == 1 and not labels.is_floating_point() else None


def ordered_names(class_names: Any) -> list[str]:
    """Names in the order of classes, of a sequence or of a dict of class to name (keys may be text, as in a JSON file)."""
    if isinstance(class_names, Mapping):
        class_names = [class_names[k] for k in sorted(class_names, key=int)]
    return [str(name) for name in class_names]


def require_all_classes(labels: torch.Tensor, num_classes: int, trained: torch.Tensor | None = None) -> None:
    """Check that a meta set holds every class that is trained.

    Args:
        labels: ``[M]`` labels of the meta set.
        num_classes: C.
        trained: ``[C]`` bool, the classes that occur in training; ``None`` for all.

    Raises:
        ValueError: naming the classes that are missing, or a label out of range.
    """
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"the meta set has the label {int(wrong)}; the classifier has {num_classes} classes.")
    present = torch.bincount(labels.long(), minlength=num_classes) > 0
    missing = (~present if trained is None else trained.cpu() & ~present).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"the meta set has no sample of classes {missing[:10]}: IADA would learn to give them up. Add some of each, for"
            " example with iada_plugin.data.balanced_meta_split."
        )
