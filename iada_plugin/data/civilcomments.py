"""CivilComments in the layout of WILDS, and a generated sample of the same layout."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
GROUPS = tuple(f"{identity}, {kind}" for identity in IDENTITIES for kind in ("not toxic", "toxic"))
SPLITS = ("train", "val", "test")


@dataclass
class Comments:
    """Rows of one split.

    Attributes:
        texts: N comments.
        labels: ``[N]`` 1 for toxic.
        groups: ``[N, 16]`` memberships of the overlapping identity x label groups, in the order of ``GROUPS``.
    """

    texts: list[str]
    labels: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: list[int]) -> Comments:
        """The given rows."""
        return Comments([self.texts[i] for i in rows], self.labels[rows], self.groups[rows])


def _comments(texts: list[str], toxicity: np.ndarray, identities: np.ndarray) -> Comments:
    """Threshold votes (``[N]``, ``[N, 8]``) at 0.5, as WILDS does."""
    labels = (toxicity >= 0.5).astype(np.int64)
    mentioned = identities >= 0.5
    groups = np.stack([mentioned & (labels == 0)[:, None], mentioned & (labels == 1)[:, None]], axis=2)
    return Comments(texts, labels, groups.reshape(len(texts), 2 * len(IDENTITIES)))


def read_civilcomments(path: str | Path) -> dict[str, Comments]:
    """Read ``all_data_with_identities.csv`` (WILDS; Koh et al., 2021; Borkan et al., 2019).

    Columns used: ``comment_text``, ``split`` (train, val, test), ``toxicity`` and the eight identities (votes in 0..1,
    empty for 0).

    Returns:
        The splits "train", "val" and "test".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing column, a vote that is no number in 0..1 (with its line), a split without rows or with one
            class only.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. CivilComments comes with WILDS: all_data_with_identities.csv of the data set"
            " 'civilcomments'."
        )
    votes_columns = ("toxicity", *IDENTITIES)
    rows: dict[str, tuple[list[str], list[list[float]]]] = {split: ([], []) for split in SPLITS}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in ("comment_text", "split", *votes_columns) if c not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or [])}.")
        for row in reader:
            if row["split"] not in rows:
                raise ValueError(
                    f"{path}, line {reader.line_num}: split {row['split']!r} is none of {', '.join(SPLITS)}."
                )
            try:
                votes = [float(row[c] or 0) for c in votes_columns]
            except ValueError:
                votes = [np.nan]
            if not all(0 <= v <= 1 for v in votes):
                raise ValueError(f"{path}, line {reader.line_num}: votes must be numbers in 0..1.")
            texts, kept = rows[row["split"]]
            texts.append(row["comment_text"] or "")
            kept.append(votes)
    for split, (texts, votes) in rows.items():
        if len({v[0] >= 0.5 for v in votes}) < 2:
            raise ValueError(f"{path}: split {split!r} has {len(texts)} rows; it needs toxic and non-toxic ones.")
    data = {split: (texts, np.asarray(votes)) for split, (texts, votes) in rows.items()}
    return {split: _comments(texts, votes[:, 0], votes[:, 1:]) for split, (texts, votes) in data.items()}


_TOPICS = [
    "traffic",
    "schools",
    "taxes",
    "budget",
    "housing",
    "parks",
    "weather",
    "hockey",
    "elections",
    "trains",
    "hospitals",
    "wages",
    "rents",
    "roads",
]
_MENTIONS = (
    ("men", "he", "father", "guys"),
    ("women", "she", "mother", "girls"),
    ("gay", "lesbian", "transgender", "queer"),
    ("christian", "church", "catholic", "bible"),
    ("muslim", "islam", "mosque", "quran"),
    ("jewish", "hindu", "buddhist", "temple"),
    ("black", "african", "ebony", "nigerian"),
    ("white", "caucasian", "european", "nordic"),
)
_HARSH = ["idiot", "stupid", "pathetic", "disgusting", "moron", "trash", "ignorant", "loser", "scum", "clown"]
_MILD = ["sad", "wrong", "awful", "silly", "weak", "boring", "lazy", "angry"]
_KIND = ["thoughtful", "helpful", "fair", "clear", "kind", "honest", "useful", "good", "calm", "brave"]
_FILLER = [
    "the",
    "a",
    "this",
    "that",
    "people",
    "think",
    "about",
    "really",
    "should",
    "when",
    "always",
    "never",
    "because",
    "from",
    "city",
    "today",
    "more",
    "some",
]


def synthetic_civilcomments(sizes: tuple[int, int, int] = (4000, 2400, 3000), seed: int = 0) -> dict[str, Comments]:
    """A generated sample with CivilComments' trouble: comments that mention an identity are mostly toxic.

    Harsh words tell toxicity, but not always, so that a classifier gains on average by taking a mention of an identity
    for toxicity, at the cost of the non-toxic comments that mention one. The words carry no more meaning than that.

    Args:
        sizes: rows of train, val and test.
        seed: of the generator.

    Returns:
        As :func:`read_civilcomments`.
    """
    rng = np.random.default_rng(seed)
    return {split: _synthetic_split(rng, n) for split, n in zip(SPLITS, sizes, strict=True)}


def _synthetic_split(rng: np.random.Generator, n: int) -> Comments:
    toxic = rng.random(n) < 0.25
    rate = np.array([0.30, 0.30, 0.12, 0.2, 0.18, 0.1, 0.2, 0.2])  # common and rare identities
    mentioned = rng.random((n, len(IDENTITIES))) < rate * np.where(toxic, 1.0, 0.22)[:, None]
    texts = []
    for i in range(n):
        words = list(rng.choice(_FILLER, rng.integers(6, 14))) + list(rng.choice(_TOPICS, 2))
        draw = rng.random()
        if toxic[i]:
            words += list(rng.choice(_HARSH if draw < 0.7 else _MILD, 1))
        else:
            words += list(rng.choice(_HARSH if draw < 0.06 else _MILD if draw < 0.45 else _KIND, 1))
        for k in np.flatnonzero(mentioned[i]):
            words.append(rng.choice(_MENTIONS[k]))
        texts.append(" ".join(rng.permutation(words)))
    return _comments(texts, toxic.astype(float), mentioned.astype(float))
