"""Data protocols: meta splits, and layouts of published data sets."""

from .meta import balanced_meta_split, labels_of

__all__ = ["balanced_meta_split", "labels_of"]
