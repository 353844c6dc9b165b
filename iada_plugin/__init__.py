"""Meta-IADA: implicit adversarial data augmentation as a drop-in loss for Hugging Face, timm and plain PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

# Imported on first use: a timm user never imports transformers, and the other way round.
_HOME = {
    "IADAConfig": ".config",
    "IADAHead": ".head",
    "MetaIADA": ".criterion",
    "MetaIADACallback": ".integrations.trainer",
    "MetaIADATask": ".integrations.timm_task",
    "Report": ".report",
    "TrustedClassifier": ".integrations.estimator",
    "balanced_meta_split": ".data.meta",
    "meta_dataloader": ".runtime.batches",
    "last_complete_checkpoint": ".integrations.checkpoint",
    "LabelAuditCallback": ".integrations.label_audit",
    "MarginRecorder": ".wrong_labels.margins",
    "WrongLabels": ".wrong_labels.result",
    "find_wrong_labels": ".wrong_labels.find",
    "with_row_ids": ".runtime.row_ids",
    "with_trusted": ".data.trusted",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from .config import IADAConfig as IADAConfig
    from .criterion import MetaIADA as MetaIADA
    from .data.meta import balanced_meta_split as balanced_meta_split
    from .data.trusted import with_trusted as with_trusted
    from .head.layer import IADAHead as IADAHead
    from .integrations.checkpoint import last_complete_checkpoint as last_complete_checkpoint
    from .integrations.estimator import TrustedClassifier as TrustedClassifier
    from .integrations.label_audit import LabelAuditCallback as LabelAuditCallback
    from .integrations.timm_task import MetaIADATask as MetaIADATask
    from .integrations.trainer import MetaIADACallback as MetaIADACallback
    from .report.report import Report as Report
    from .runtime.batches import meta_dataloader as meta_dataloader
    from .runtime.row_ids import with_row_ids as with_row_ids
    from .wrong_labels.find import find_wrong_labels as find_wrong_labels
    from .wrong_labels.margins import MarginRecorder as MarginRecorder
    from .wrong_labels.result import WrongLabels as WrongLabels


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
