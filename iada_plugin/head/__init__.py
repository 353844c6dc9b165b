"""The classifier's last layer: `IADAHead`, and finding, converting and restoring it in a model."""

from .convert import convert_to_iada, restore_linear
from .find import find_classifier
from .layer import IADAHead

__all__ = ["IADAHead", "convert_to_iada", "find_classifier", "restore_linear"]
