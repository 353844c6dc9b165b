"""Data protocols: meta splits, long tails, label noise, groups, attribute clusters, and published file layouts."""

from .clusters import GLTSplits, attribute_clusters, glt_splits
from .colored_mnist import ColoredDigits, colored_digits, read_mnist
from .images import ImageFiles, read_celeba, read_cifar, read_glt, read_image_list, read_waterbirds
from .long_tail import long_tail_counts, long_tail_subset
from .meta import as_labels, balanced_meta_split, labels_of
from .noise import noisy_labels, transition_matrix
from .trusted import check_trusted_rows, with_trusted

__all__ = [
    "ColoredDigits",
    "GLTSplits",
    "ImageFiles",
    "as_labels",
    "attribute_clusters",
    "balanced_meta_split",
    "check_trusted_rows",
    "colored_digits",
    "glt_splits",
    "labels_of",
    "long_tail_counts",
    "long_tail_subset",
    "noisy_labels",
    "read_celeba",
    "read_cifar",
    "read_glt",
    "read_image_list",
    "read_mnist",
    "read_waterbirds",
    "transition_matrix",
    "with_trusted",
]
