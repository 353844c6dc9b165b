"""Colored MNIST: colour predicts the label in training and misleads at test (Arjovsky et al., 2019)."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .meta import check_share, whole_numbers

GROUPS = ("low digits, green", "low digits, red", "high digits, green", "high digits, red")


@dataclass
class ColoredDigits:
    """One split.

    Attributes:
        images: ``[N, 2, H, W]`` float32 in 0..1; the digit is in channel 0 (red) or 1 (green).
        labels: ``[N]`` 1 for digits from 5 on, a share of them flipped.
        groups: ``[N]`` ``2 * label + colour``, in the order of ``GROUPS``.
    """

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


def colored_digits(
    images: Any,
    digits: Any,
    *,
    label_noise: float = 0.25,
    colour_noise: tuple[float, float, float] = (0.2, 0.5, 0.9),
    sizes: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> dict[str, ColoredDigits]:
    """Make the splits "train", "val" and "test" of Colored MNIST from images of digits.

    ``label = digit >= 5``, flipped with probability ``label_noise``; the colour follows the label (1: red) and is flipped
    with the split's ``colour_noise``. With the default noise a classifier that does not look at the colour cannot pass
    75 %, and one that does is right in 80 % of training and in 10 % of test.

    Args:
        images: ``[N, H, W]`` grey values, 0..255 (integers) or 0..1.
        digits: ``[N]`` in 0..9.
        label_noise: probability.
        colour_noise: probabilities for train, val and test.
        sizes: rows of the three splits; by default a half, a sixth and a third of all (30,000, 10,000 and 20,000 of
            MNIST's training set).
        seed: of the draws.

    Raises:
        ValueError: shapes that do not fit, a probability outside [0, 1], a negative size, or more rows asked for than there
            are.
    """
    images, digits = np.asarray(images), np.asarray(digits)
    if images.ndim != 3 or digits.shape != images.shape[:1]:
        raise ValueError(f"images must be [N, H, W] and digits [N], got {list(images.shape)} and {list(digits.shape)}.")
    check_share("label_noise", label_noise)
    for noise in colour_noise:
        check_share("colour_noise", noise)
    n = len(digits)
    sizes = (n // 2, n // 6, n - n // 2 - n // 6) if sizes is None else whole_numbers("sizes", sizes)
    if sum(sizes) > n:
        raise ValueError(f"sizes={sizes} are more than the {n} images.")
    grey = images.astype(np.float32) / (255 if np.issubdtype(images.dtype, np.integer) else 1)
    rng = np.random.default_rng(seed)
    ends = np.cumsum(sizes)
    rows = np.split(rng.permutation(n)[: ends[-1]], ends[:-1])
    found = {}
    for name, own, noise in zip(("train", "val", "test"), rows, colour_noise, strict=True):
        labels = (digits[own] >= 5) ^ (rng.random(len(own)) < label_noise)
        red = labels ^ (rng.random(len(own)) < noise)
        coloured = np.zeros((len(own), 2, *images.shape[1:]), dtype=np.float32)
        coloured[np.arange(len(own)), 1 - red.astype(int)] = grey[own]
        found[name] = ColoredDigits(coloured, labels.astype(np.int64), 2 * labels.astype(np.int64) + red)
    return found


def read_mnist(folder: str | Path, train: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's images ``[N, 28, 28]`` uint8 and digits ``[N]`` from its IDX files, gzipped or not.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: a file that is no IDX file of that kind.
    """
    part = "train" if train else "t10k"
    images = _read_idx(Path(folder), f"{part}-images-idx3-ubyte")
    digits = _read_idx(Path(folder), f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or digits.shape != images.shape[:1]:
        raise ValueError(f"{folder}: images {list(images.shape)} and labels {list(digits.shape)} do not fit together.")
    return images, digits.astype(np.int64)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no {name}.gz: give the folder of MNIST's four IDX files.")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    zero, kind, dims = struct.unpack_from(">HBB", content) if len(content) >= 4 else (1, 0, 0)
    if zero != 0 or kind != 8 or len(content) < 4 + 4 * dims:
        raise ValueError(f"{path} is no IDX file of bytes.")
    shape = struct.unpack_from(f">{dims}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} is cut short: {values.size} values, {list(shape)} announced.")
    return values.reshape(shape)
