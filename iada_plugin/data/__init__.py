"""Data protocols: meta splits, long tails, and layouts of published data sets."""

from .long_tail import long_tail_counts, long_tail_subset
from .meta import balanced_meta_split, labels_of

__all__ = ["balanced_meta_split", "labels_of", "long_tail_counts", "long_tail_subset"]
