"""What ``iada-labels`` reads and writes: a CSV of texts or paths of images, a folder of images, and which rows were checked."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.noise import noisy_labels

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SEPARATORS = ",;\t|"
#: What a table that was audited says of rows that were looked at and are not trusted.
MARKS = ("checked", "wrong")
#: Of the built-in sample.
_CHECKED = 200
_RIGHT, _WRONG = ("1", "1.0", "true", "yes", "right"), ("0", "0.0", "false", "no", "wrong")
NO_TRUSTED = (
    "no row is trusted: say which labels were checked with --trusted, a column of 0 and 1 or a CSV with the columns row and trusted. To"
    " begin, draw rows at random and look at them: iada-labels draw DATA.csv --label LABEL --rows 200"
)


class Audited(NamedTuple):
    """The data of an audit."""

    samples: list[Any]  # [R] texts, or paths of images
    names: list[str]  # [C]
    labels: np.ndarray  # [R]
    trusted: np.ndarray  # rows, drawn at random, that were found right
    marked: dict[int, str]  # rows that were looked at and are not trusted: "checked" or "wrong"
    kind: str  # "texts" or "images"
    table: list[dict[str, str]]  # [R], as read
    columns: tuple[str, str]  # of the samples and the labels
    corrected: int = 0  # labels that are right now
    drawn: tuple[int, int] | None = None  # of a random draw: labels found wrong, and all that were looked at
    truth: np.ndarray | None = None  # [R]


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV that has these columns; commas, semicolons, tabs or bars between the fields.

    Raises:
        ValueError: it is no UTF-8, has no rows or other columns, or a row has too few or too many fields.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} in {Path.cwd()}.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel writes a mark at the start
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(_SEPARATORS, key=header.count))
            if missing := [c for c in columns if c not in (reader.fieldnames or ())]:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}."
                )
            rows = list(reader)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as CSV in UTF-8."
        ) from error
    for number, row in enumerate(rows):
        if None in row or any(row[c] is None for c in columns):
            kind = "many" if None in row else "few"
            raise ValueError(f"{path}: row {number} (from 0) has too {kind} fields; put quotes around a text with separators in it.")  # fmt: skip
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def read_table(path: Path, text: str | None, image: str | None, label: str | None, trusted: str | None) -> Audited:
    """A CSV of texts or of paths of images; ``trusted`` names one of its columns, or a CSV of checked rows.

    Raises:
        ValueError: columns that are not there, labels that are empty or all the same, or marks that cannot be read.
    """
    if label is None or (text is None) == (image is None):
        raise ValueError("name the columns of the CSV: --label, and --text or --image.")
    if trusted is None:
        raise ValueError(NO_TRUSTED)
    column = text or image
    assert column is not None
    own = None if Path(trusted).is_file() or trusted.endswith(".csv") else trusted
    rows = read_rows(path, [column, label, *([own] if own else [])])
    for k, row in enumerate(rows):
        row[label] = row[label].strip()
        if not row[label]:
            raise ValueError(f"{path}: row {k} (from 0) has no {label}: fill it in, or leave the row out.")
    names = sorted({row[label] for row in rows}, key=_in_order)
    if len(names) < 2:
        raise ValueError(f"{path}: all labels in the column {label} are {names[0]!r}: there is nothing to tell apart.")
    if len(names) > len(rows) / 2:
        raise ValueError(
            f"{path}: the column {label} has {len(names)} different values in {len(rows)} rows ({names[0]!r:.40}, {names[1]!r:.40}, ...):"
            " name the one with the classes."
        )
    index = {name: k for k, name in enumerate(names)}
    labels = np.array([index[row[label]] for row in rows])
    if own:
        # A 0 in a column of all rows says that nobody looked; a word that somebody did.
        words = [row[own].strip().lower() for row in rows]
        marked = {k: word for k, word in enumerate(words) if word in MARKS}
        right = [k for k, w in enumerate(words) if k not in marked and _mark(w, f"{path}, row {k}, column {own}")]
        changed, drawn = 0, None
    else:
        right, wrong, changed = _take_in(Path(trusted), rows, labels, index)
        marked = dict.fromkeys(wrong, MARKS[1])
        drawn = (len(wrong) + changed, len(wrong) + len(right))
    if not right:
        looked = f"all {len(marked)} labels that were checked are wrong: " if marked else ""
        raise ValueError(looked + NO_TRUSTED)
    values: list[Any] = [row[column] for row in rows]
    if image:
        values = [path.parent / v for v in values]
    kind = "texts" if text else "images"
    return Audited(values, names, labels, np.array(right), marked, kind, rows, (column, label), changed, drawn)


def notices(data: Audited) -> Iterator[str]:
    """What is odd about the data, in words."""
    spelt: dict[str, str] = {}
    for name in data.names:
        if (other := spelt.setdefault(name.casefold(), name)) != name:
            yield f"The labels {other!r} and {name!r} count as two classes."
    if data.kind == "texts":
        if empty := sum(not text.strip() for text in data.samples):
            yield f"{empty} texts are empty."
        count = Counter(data.samples)
        pairs = Counter(text for text, _ in set(zip(data.samples, data.labels.tolist(), strict=True)))
        if more := sum(n for n in count.values() if n > 1):
            several = sum(count[text] for text, n in pairs.items() if n > 1)
            yield f"{more} texts are there more than once, {several} of them with different labels."


def _take_in(
    path: Path, rows: list[dict[str, str]], labels: np.ndarray, index: dict[str, int]
) -> tuple[list[int], list[int], int]:
    """Rows that a CSV of checked ones says are right, and wrong; labels that it corrects are changed in ``labels`` (and are right)."""
    right, wrong, changed = [], [], 0
    seen: set[int] = set()
    for line in read_rows(path, ["row", "trusted"]):
        number = line["row"].strip()
        if not number.isdigit() or int(number) >= len(rows):
            raise ValueError(f"{path}: row {number!r} is not in the data, which has the rows 0 to {len(rows) - 1}.")
        row = int(number)
        if row in seen:
            raise ValueError(f"{path}: row {row} is there twice.")
        seen.add(row)
        if other := [
            c
            for c in line
            if c in rows[row] and c not in ("row", "trusted") and line[c].strip() != rows[row][c].strip()
        ]:
            raise ValueError(
                f"{path}: row {row} has another {other[0]} in the data: it was drawn from other data, or another order."
            )
        mark, better = _mark(line["trusted"], f"{path}, row {row}"), (line.get("right_label") or "").strip()
        if better and (mark is not False or better not in index or index[better] == labels[row]):
            raise ValueError(
                f"{path}: row {row} has the right_label {better!r} and {line['trusted']!r} under trusted: for a label that is wrong"
                f" write 0, and as right_label another one of the data's: {', '.join(list(index)[:20])}."
            )
        if better:
            labels[row] = index[better]
            changed += 1
        if mark or better:
            right.append(row)
        elif mark is False:
            wrong.append(row)
    return right, wrong, changed


def _mark(value: str, where: str) -> bool | None:
    """Whether a label was found right; ``None`` where nobody looked."""
    value = value.strip().lower()
    if value and value not in (*_RIGHT, *_WRONG):
        raise ValueError(f"{where}: {value!r} does not say whether the label was found right: write 1 or 0.")
    return value in _RIGHT if value else None


def _in_order(name: str) -> tuple[int, float, str]:
    return (0, float(name), "") if name.lstrip("-").replace(".", "", 1).isdigit() else (1, 0.0, name)


def read_folder(folder: Path, trusted: str | None) -> Audited:
    """Images in a folder for each class; ``trusted`` is a file with the paths of checked ones.

    Raises:
        ValueError: there are no images, or checked ones that are not there.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} in {Path.cwd()}.")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [
        (p, k)
        for k, name in enumerate(names)
        for p in sorted((folder / name).rglob("*"))
        if p.suffix.lower() in _ENDINGS
    ]
    if len(names) < 2 or not files:
        raise ValueError(
            f"{folder} has {len(names)} folders with {len(files)} images: it must have a folder for each class."
        )
    if trusted is None or not Path(trusted).is_file():
        raise ValueError(f"--trusted must be a file with the paths of checked images below {folder}, one a line.")
    wanted = {line.strip() for line in Path(trusted).read_text(encoding="utf-8").splitlines() if line.strip()}
    place = {p.relative_to(folder).as_posix(): row for row, (p, _) in enumerate(files)}
    if unknown := sorted(wanted - set(place)):
        raise ValueError(f"{trusted}: {unknown[0]} is no image below {folder}.")
    if not wanted:
        raise ValueError(f"{trusted} names no image: write the paths of checked ones, one a line.")
    table = [{"image": str(path), "label": names[k]} for path, k in files]
    return Audited([p for p, _ in files], names, np.array([k for _, k in files]), np.array(sorted(place[w] for w in wanted)),
                   {}, "images", table, ("image", "label"))  # fmt: skip


def built_in() -> Audited:
    """scikit-learn's digits, a tenth of them with a wrong label, and 200 that were drawn at random and checked."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    truth, names = digits.target, [str(k) for k in range(10)]
    labels = noisy_labels(truth, "uniform", 0.1, seed=0)[0]
    drawn = np.random.default_rng(0).permutation(len(labels))[:_CHECKED]
    found = int((labels[drawn] != truth[drawn]).sum())
    labels[drawn] = truth[drawn]
    table = [{"image": f"digit {k}", "label": names[c]} for k, c in enumerate(labels)]
    images = list((digits.images * (255 / 16)).astype(np.uint8))
    return Audited(
        images, names, labels, np.sort(drawn), {}, "images", table, ("image", "label"), found, (found, _CHECKED), truth
    )


def write_corrected(path: Path, data: Audited, labels: np.ndarray, checked: np.ndarray) -> None:
    """The table with its labels corrected, and a column ``trusted``: 1 of the trusted rows, ``checked`` of those that were looked at,
    ``wrong`` where the right label is not known; paths of images as seen from its folder."""
    column, label_column = data.columns
    marks = np.full(len(labels), "", dtype=object)
    for row, mark in data.marked.items():
        marks[row] = mark
    marks[checked] = MARKS[0]
    marks[data.trusted] = "1"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*data.table[0], "trusted"])))
        writer.writeheader()
        for row, sample, label, mark in zip(data.table, data.samples, labels, marks, strict=True):
            value = os.path.relpath(sample, path.parent) if isinstance(sample, Path) else row[column]
            writer.writerow({**row, column: value, label_column: data.names[label], "trusted": mark})


def write_drawn(path: Path, data: Path, columns: Sequence[str], size: int, seed: int) -> None:
    """Rows of a CSV, drawn at random, with columns to be filled in by who looks at them.

    Raises:
        ValueError: columns that are not there, more rows than there are, or a file that is there already.
    """
    rows = read_rows(data, columns)
    if not 0 < size <= len(rows):
        raise ValueError(f"--rows {size}: {data} has {len(rows)} rows.")
    if path.exists():
        raise ValueError(f"{path} is there already, perhaps with what was checked: name another --output.")
    drawn = np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *columns, "trusted", "right_label"])
        writer.writerows([row, *(rows[row][c] for c in columns), "", ""] for row in drawn.tolist())
