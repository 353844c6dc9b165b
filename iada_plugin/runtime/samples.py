"""What a row of a data set looks like to a person: a picture or a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def content_of(samples: Any, index: Any) -> Any:
    """The image ``[H, W]`` or ``[H, W, 3]``, or the text, of a sample.

    Raises:
        ValueError: there is none, or it cannot be shown.
    """
    try:
        samples = getattr(samples, "iloc", samples)  # pandas: by place, not by the index it came with
        row = samples[index] if hasattr(samples, "__getitem__") else samples(index)
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"samples[{index!r}] cannot be had ({type(error).__name__}: {error}): samples must give an image or a text for a row"
            " number, as a list, a data set or a function does."
        ) from error
    row = row.to_dict() if hasattr(row, "iloc") else row
    if isinstance(row, Mapping):
        pictures = [v for v in row.values() if hasattr(v, "convert") or getattr(v, "ndim", 0) >= 2]
        texts = sorted((v for v in row.values() if isinstance(v, str)), key=len)  # the longest is no key or name
        row = pictures[0] if pictures else texts[-1] if texts else str(dict(row))
    elif isinstance(row, (tuple, list)):
        row = row[0]
    return row if isinstance(row, str) else as_image(row)


def as_image(picture: Any) -> np.ndarray:
    """``[H, W]`` or ``[H, W, 3]`` in 0..1. Two channels become red and green.

    Raises:
        ValueError: it has another shape.
    """
    if hasattr(picture, "convert"):  # PIL: palettes and transparency
        picture = picture.convert("L" if picture.mode in ("1", "L", "I", "F") else "RGB")
    values = np.asarray(picture.detach().cpu().float() if hasattr(picture, "detach") else picture, dtype=float)
    if values.ndim == 3 and values.shape[0] in (1, 2, 3) and values.shape[2] not in (1, 2, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim == 3 and values.shape[2] == 2:
        values = np.concatenate([values, np.full_like(values[:, :, :1], values.min())], axis=2)
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[2] == 3):
        raise ValueError(
            f"an image has the shape {list(values.shape)}: give [H, W], or [C, H, W] or [H, W, C] with one to three channels."
        )
    low, high = values.min(), values.max()
    return (values - low) / (high - low if high > low else 1)
