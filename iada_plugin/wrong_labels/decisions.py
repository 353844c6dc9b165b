"""What a person has decided on the page, taken in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.meta import as_labels
from .tables import read_rows


def with_decisions(labels: Any, decisions: str | Path | Sequence[str | Path]) -> tuple[np.ndarray, np.ndarray]:
    """Take in the CSV that the page exports: labels found wrong are corrected.

    The rows that were looked at are right now, but no trusted rows: they were the most suspect ones, and a corrected label fits its
    sample as few others do. As a reference they would make right labels look wrong: in 24 draws of one data set the share of wrong
    labels was estimated at 23 to 45 % after a hundred such rows, where it was 19 %.

    Args:
        labels: ``[R]`` as they were when the list was made.
        decisions: path of the CSV: columns row, label, decision (right or wrong), new_label; or those of several rounds, in order.

    Returns:
        Labels ``[R]`` to train on, and the numbers of the rows that were looked at, for ``find_wrong_labels(checked_rows=...)``.

    Raises:
        ValueError: columns or values that do not fit, or a row that has another label now than it had on the page.
    """
    found = as_labels(labels).copy()
    checked: set[int] = set()
    for path in [decisions] if isinstance(decisions, (str, Path)) else decisions:
        _take_in(found, checked, path)
    return found, np.array(sorted(checked), dtype=int)


def _take_in(found: np.ndarray, checked: set[int], decisions: str | Path) -> None:
    for number, line in enumerate(read_rows(Path(decisions), ("row", "label", "decision", "new_label")), start=2):
        where = f"{decisions}, line {number}"
        try:
            row, label, new = (int(line[k]) for k in ("row", "label", "new_label"))
        except ValueError:
            raise ValueError(
                f"{where}: row, label and new_label must be whole numbers, as the page exports them."
            ) from None
        if not 0 <= row < len(found):
            raise ValueError(f"{where}: row {row} is not in 0..{len(found) - 1}.")
        if line["decision"] not in ("right", "wrong") or new < 0 or (line["decision"] == "right") != (new == label):
            raise ValueError(
                f"{where}: {line['decision']!r} with the label {label} and the new label {new}: pass 'right' with the same label, or"
                " 'wrong' with another one."
            )
        if found[row] not in (label, new):
            raise ValueError(
                f"{where}: row {row} had the label {label} on the page and has {found[row]} here: these decisions are of other data, or"
                " of another order of the rows."
            )
        found[row] = new
        checked.add(row)
