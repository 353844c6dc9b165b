"""The paper's scenarios as data: what is trained, on what it is measured, and the published hyperparameters.

Every builder takes ``data=None`` for a built-in sample (no download), or the folder or file of a published data set.
The meta set is always disjoint from training, validation and test samples.
"""

from __future__ import annotations

from typing import Any

from .features import cifar_features, comment_features, reuters_features
from .finetuned import cifar_finetuned, comments_finetuned
from .groups import colored_mnist
from .images import generalized_long_tail, label_noise, load_digits, long_tailed_images
from .scenario import Scenario, Settings, train_along
from .texts import comments, reuters

__all__ = [
    "Scenario",
    "Settings",
    "cifar_features",
    "cifar_finetuned",
    "colored_mnist",
    "comment_features",
    "comments",
    "comments_finetuned",
    "generalized_long_tail",
    "label_noise",
    "load_digits",
    "long_tail",
    "long_tailed_images",
    "reuters",
    "reuters_features",
    "train_along",
]


def long_tail(data: str | None = None, *, meta_per_class: int = 10, seed: int = 0, **options: Any) -> Scenario:
    """:func:`long_tailed_images`, or :func:`reuters` where ``data`` is a Parquet file of texts (no other options)."""
    if data is not None and str(data).endswith(".parquet"):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: the texts of {data} have their own long tail.")
        return reuters(data, meta_per_class=meta_per_class, seed=seed)
    return long_tailed_images(data, meta_per_class=meta_per_class, seed=seed, **options)
