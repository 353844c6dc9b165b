"""Image data sets in the file layouts in which they are published. Nothing is downloaded or copied."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

WATERBIRDS_GROUPS = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
CELEBA_GROUPS = ("not blond, woman", "not blond, man", "blond, woman", "blond, man")
_SPLITS = ("train", "val", "test")


@dataclass
class ImageFiles(torch.utils.data.Dataset):
    """Images on disk with labels: a map-style data set that loads ``(image, label)``.

    Attributes:
        paths: N files.
        targets: ``[N]`` class indices.
        groups: ``[N]`` group of each image, or attribute; ``None`` where there are none.
        transform: applied to the PIL image (RGB); ``None`` gives float ``[3, H, W]`` in 0..1.
    """

    paths: list[Path]
    targets: np.ndarray
    groups: np.ndarray | None = None
    transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            image = image.convert("RGB")
        if self.transform is None:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            return pixels, int(self.targets[index])
        return self.transform(image), int(self.targets[index])

    def select(self, rows: Sequence[int]) -> ImageFiles:
        """The given rows."""
        groups = None if self.groups is None else self.groups[rows]
        return ImageFiles([self.paths[i] for i in rows], self.targets[rows], groups, self.transform)


def _image_files(paths: Iterable[str], targets: Any, groups: Any, root: Path, source: Path) -> ImageFiles:
    """Check labels, and that the first and last image are there: all would take minutes on a large set."""
    files = [root / path for path in paths]
    if not files:
        raise ValueError(f"{source}: no image is listed.")
    for path in (files[0], files[-1]):
        if not path.is_file():
            raise FileNotFoundError(f"{path}, listed in {source}, does not exist: is {root} the folder of the images?")
    targets = np.asarray(targets, dtype=np.int64)
    if targets.min() < 0:
        raise ValueError(f"{source}: label {targets.min()} is negative.")
    return ImageFiles(files, targets, None if groups is None else np.asarray(groups, dtype=np.int64))


def _existing(path: Path, hint: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {hint}")
    return path


def read_image_list(path: str | Path, root: str | Path) -> ImageFiles:
    """A list of images, one ``path label`` a line: ImageNet-LT, Places-LT (Liu et al., 2019) and iNaturalist 2018 as
    published with their long-tailed splits (``ImageNet_LT_train.txt``, ``Places_LT_train.txt``,
    ``iNaturalist18_train.txt``).

    Args:
        path: the list.
        root: folder that the listed paths start from.

    Raises:
        FileNotFoundError: no list, or its first or last image is not under ``root``.
        ValueError: a line without a path and a whole number, with its number.
    """
    path = _existing(Path(path), "give a list with one 'path label' a line, such as ImageNet_LT_train.txt.")
    paths, targets = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdigit():
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not 'path label'.")
        paths.append(name)
        targets.append(int(label))
    return _image_files(paths, targets, None, Path(root), path)


def read_glt(path: str | Path, root: str | Path | None = None) -> dict[str, ImageFiles]:
    """ImageNet-GLT and MSCOCO-GLT: the annotation JSON of Tang et al. (2022), ``groups`` being the attributes.

    Splits "train", "val", "test_lt" (as train), "test_bl" (class-balanced: CLT) and "test_bbl" (class- and
    attribute-balanced: GLT; with the annotation file whose name ends in ``inter_bl``: ALT).

    Args:
        path: such as ``imagenet_sup_intra_lt_inter_lt.json`` or ``coco_intra_lt_inter_lt.json``.
        root: folder that the paths in it start from; ``None`` where they are absolute.

    Raises:
        FileNotFoundError: no annotation, or no such image.
        ValueError: no JSON, or a split without labels.
    """
    path = _existing(Path(path), "generate it with the scripts published with the benchmark.")
    try:
        annotation = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    found = {}
    for split in ("train", "val", "test_lt", "test_bl", "test_bbl"):
        part = annotation.get(split)
        if part is None and split.startswith("test"):
            continue  # the class-balanced annotation has no test_lt
        if not isinstance(part, dict) or "label" not in part or not part["label"]:
            if split == "test_lt":
                continue
            raise ValueError(f"{path}: split {split!r} has no labels; it has {', '.join(annotation)}.")
        keys, named = list(part["label"]), part.get("path") or {}
        attributes = [part["attribute"][k] for k in keys] if part.get("attribute") else None
        paths = [named.get(k, k) for k in keys]
        found[split] = _image_files(paths, [part["label"][k] for k in keys], attributes, Path(root or ""), path)
    return found


def read_waterbirds(folder: str | Path) -> dict[str, ImageFiles]:
    """Waterbirds (Sagawa et al., 2020): ``metadata.csv`` (``img_filename``, ``y``, ``split``, ``place``) beside the images.

    Returns:
        "train", "val" and "test", with groups ``2 * y + place`` in the order of ``WATERBIRDS_GROUPS`` (3498, 184, 56 and
        1057 in training).

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong.
    """
    folder = Path(folder)
    rows = _rows(folder / "metadata.csv", ("img_filename", "y", "split", "place"))
    y, place = (_integers(rows, c, folder / "metadata.csv", (0, 1)) for c in ("y", "place"))
    split = _integers(rows, "split", folder / "metadata.csv", (0, 1, 2))
    return _by_split([r["img_filename"] for r in rows], y, 2 * y + place, split, folder, folder / "metadata.csv")


def read_celeba(folder: str | Path) -> dict[str, ImageFiles]:
    """CelebA (Liu et al., 2015), Blond_Hair against Male: ``list_attr_celeba`` and ``list_eval_partition``, as ``.csv`` or as
    the original ``.txt``, beside ``img_align_celeba/``.

    Returns:
        "train", "val" and "test", with groups ``2 * blond + male`` in the order of ``CELEBA_GROUPS``.

    Raises:
        FileNotFoundError, ValueError: what is missing or wrong.
    """
    folder = Path(folder)
    attributes = folder / "list_attr_celeba.csv"
    if attributes.is_file():
        rows = _rows(attributes, ("image_id", "Blond_Hair", "Male"))
        parts = _rows(folder / "list_eval_partition.csv", ("image_id", "partition"))
    else:
        attributes = _existing(folder / "list_attr_celeba.txt", "CelebA needs list_attr_celeba.csv or .txt.")
        lines = attributes.read_text().split("\n")
        names = ["image_id", *(lines[1].split() if len(lines) > 1 else [])]
        rows = [dict(zip(names, line.split(), strict=False)) for line in lines[2:] if line.strip()]
        _require_columns(attributes, names, ("Blond_Hair", "Male"))
        listed = _existing(folder / "list_eval_partition.txt", "CelebA needs list_eval_partition.csv or .txt.")
        pairs = [line.split() for line in listed.read_text().split("\n") if line.strip()]
        parts = [dict(zip(("image_id", "partition"), pair, strict=False)) for pair in pairs]
    part_of = {r["image_id"]: r.get("partition") for r in parts}
    missing = next((r["image_id"] for r in rows if r["image_id"] not in part_of), None)
    if missing is not None:
        raise ValueError(f"{folder}: {missing} has attributes but no partition.")
    for row in rows:
        row["partition"] = part_of[row["image_id"]]
    blond, male = (_integers(rows, c, attributes, (-1, 0, 1)) > 0 for c in ("Blond_Hair", "Male"))
    split = _integers(rows, "partition", attributes, (0, 1, 2))
    images = folder / "img_align_celeba"
    inner = images / "img_align_celeba"  # as Kaggle packs it
    root = inner if inner.is_dir() else images
    y = blond.astype(np.int64)
    return _by_split([r["image_id"] for r in rows], y, 2 * y + male, split, root, attributes)


def read_cifar(folder: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """CIFAR-10 or CIFAR-100 from the Parquet files of the data sets "cifar10" and "cifar100" on the Hugging Face hub.

    Args:
        folder: holds files whose names contain "train" and "test".

    Returns:
        "train" and "test": images uint8 ``[N, 3, 32, 32]`` and labels ``[N]``.

    Raises:
        FileNotFoundError: no such files.
        ValueError: columns other than ``img`` (or ``image``) and ``label`` (or ``fine_label``).
    """
    from datasets import Image, load_dataset
    from tqdm import tqdm

    found = {}
    for split in ("train", "test"):
        files = sorted(str(p) for p in Path(folder).glob(f"*{split}*.parquet"))
        if not files:
            raise FileNotFoundError(f"no *{split}*.parquet in {folder}: give the folder of cifar10's Parquet files.")
        table = load_dataset("parquet", data_files=files, split="train")
        image = next((c for c in ("img", "image") if c in table.column_names), None)
        label = next((c for c in ("label", "fine_label") if c in table.column_names), None)
        if image is None or label is None:
            raise ValueError(f"{files[0]} has the columns {', '.join(table.column_names)}; needed: img and label.")
        table = table.cast_column(image, Image())
        pixels = np.stack([np.asarray(x) for x in tqdm(table[image], desc=f"decode {split}", leave=False)])
        found[split] = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(table[label]))
    return found


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with open(_existing(path, f"a CSV with the columns {', '.join(columns)}."), newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        _require_columns(path, reader.fieldnames or [], columns)
        return list(reader)


def _require_columns(path: Path, found: Sequence[str], columns: Sequence[str]) -> None:
    missing = [c for c in columns if c not in found]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(found)}.")


def _integers(rows: list[dict[str, str]], column: str, path: Path, allowed: Sequence[int]) -> np.ndarray:
    text = {str(value): value for value in allowed}
    for number, row in enumerate(rows, start=1):
        if row.get(column) not in text:
            raise ValueError(f"{path}, row {number}: {column} is {row.get(column)!r}, not one of {', '.join(text)}.")
    return np.array([text[row[column]] for row in rows], dtype=np.int64)


def _by_split(
    paths: list[str], labels: np.ndarray, groups: np.ndarray, split: np.ndarray, root: Path, source: Path
) -> dict[str, ImageFiles]:
    found = {}
    for k, name in enumerate(_SPLITS):
        own = np.flatnonzero(split == k)
        if not len(own):
            raise ValueError(f"{source}: split {name!r} ({k}) has no row.")
        found[name] = _image_files([paths[i] for i in own], labels[own], groups[own], root, source)
    return found
