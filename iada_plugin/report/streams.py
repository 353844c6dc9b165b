"""Keeping a stream of values in bounded memory: a curve with ever wider points, and a uniform sample."""

from __future__ import annotations

import numpy as np


class Curve:
    """A curve of any length in at most ``capacity`` points, each the mean of as many values as any other; the width doubles when they are full.

    Args:
        capacity: points, even.
    """

    def __init__(self, capacity: int = 2000) -> None:
        self.capacity, self.width = capacity, 1
        self._points: list[float] = []
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """One more value."""
        self._open.append(value)
        if len(self._open) == self.width:
            self._points.append(float(np.mean(self._open)))
            self._open = []
            if len(self._points) == self.capacity:
                self._points = np.reshape(self._points, (-1, 2)).mean(axis=1).tolist()
                self.width *= 2

    def state(self) -> tuple[list[float], list[float], int]:
        """For :meth:`of`."""
        return list(self._points), list(self._open), self.width

    @classmethod
    def of(cls, state: tuple[list[float], list[float], int]) -> Curve:
        """Go on from :meth:`state`."""
        found = cls()
        points, rest, found.width = state
        found._points, found._open = list(points), list(rest)
        return found

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Which value (from 0, the middle of each point's) and what: ``[P]`` and ``[P]``."""
        values = self._points + ([float(np.mean(self._open))] if self._open else [])
        return (np.arange(len(values)) + 0.5) * self.width - 0.5, np.array(values)


class Reservoir:
    """A uniform sample of a stream of rows (Vitter, 1985, "Random sampling with a reservoir", algorithm R).

    Args:
        capacity: rows kept.
        columns: numbers in a row.
        seed: of the draws.
    """

    def __init__(self, capacity: int, columns: int, seed: int = 0) -> None:
        self._kept = np.empty((capacity, columns), dtype=np.float64)
        self._draw = np.random.default_rng(seed)
        self.seen = 0

    def add(self, rows: np.ndarray) -> None:
        """Rows ``[n, columns]``."""
        number = self.seen + np.arange(len(rows))
        place = np.where(number < len(self._kept), number, self._draw.integers(0, number + 1))
        taken = place < len(self._kept)
        self._kept[place[taken]] = rows[taken]  # of two rows for one place the later one stays
        self.seen += len(rows)

    def fill(self, rows: np.ndarray, seen: int) -> None:
        """Go on with rows that were kept of ``seen``; of a smaller sample this one stays as small."""
        self._kept[: len(rows)] = rows[: len(self._kept)]
        if seen > len(rows):
            self._kept = self._kept[: len(rows)]
        self.seen = seen

    @property
    def rows(self) -> np.ndarray:
        """What is kept, ``[min(seen, capacity), columns]``."""
        return self._kept[: self.seen]
