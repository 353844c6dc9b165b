"""Meta-IADA: implicit adversarial data augmentation as a drop-in loss for Hugging Face, timm and plain PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use: a timm user never imports transformers, and the other way round.
_HOME = {
    "IADAConfig": ".config",
    "IADAHead": ".head",
    "MetaIADA": ".engine",
    "MetaIADACallback": ".callback",
    "MetaIADATask": ".timm_task",
    "Report": ".report",
    "balanced_meta_split": ".data.meta",
    "meta_dataloader": ".batches",
    "last_complete_checkpoint": ".checkpoint",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from .batches import meta_dataloader as meta_dataloader
    from .callback import MetaIADACallback as MetaIADACallback
    from .checkpoint import last_complete_checkpoint as last_complete_checkpoint
    from .config import IADAConfig as IADAConfig
    from .data.meta import balanced_meta_split as balanced_meta_split
    from .engine import MetaIADA as MetaIADA
    from .head import IADAHead as IADAHead
    from .report import Report as Report
    from .timm_task import MetaIADATask as MetaIADATask


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
