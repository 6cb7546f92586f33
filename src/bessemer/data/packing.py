"""Best-fit packing of documents into rows of one length (V3 4.1; Ding et al. 2024, "Fewer Truncations").

A piece longer than a row is cut into row-sized pieces; every other piece goes, whole, into the open row that it fills
best. So only documents longer than a row are ever cut. The number of open rows is bounded, hence packing streams:
when one too many is open, the fullest is closed.
"""

import bisect
from collections.abc import Iterator

import numpy as np


class Packer:
    """Feed pieces with `add`, end with `flush`; both yield finished rows, lists of pieces that together fit a row."""

    def __init__(self, row_length: int, window: int = 512):
        self.row_length = row_length
        self.window = window
        self.rows = 0
        self.used = 0
        # Sorted by room left, then by age, so that equal fits are decided the same way every time.
        self._open: list[tuple[int, int]] = []
        self._pieces: dict[int, list[np.ndarray]] = {}
        self._born = 0

    @property
    def waste(self) -> float:
        """Share of the finished rows that is padding."""
        return 1 - self.used / (self.rows * self.row_length) if self.rows else 0.0

    def add(self, ids: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Place one document; yields the rows that this finishes."""
        for start in range(0, len(ids), self.row_length):
            yield from self._place(ids[start : start + self.row_length])

    def flush(self) -> Iterator[list[np.ndarray]]:
        """Close what is open, the fullest first."""
        while self._open:
            yield self._close(0)

    def _place(self, piece: np.ndarray) -> Iterator[list[np.ndarray]]:
        at = bisect.bisect_left(self._open, (len(piece), -1))
        if at < len(self._open):
            room, row = self._open.pop(at)
        else:
            room, row = self.row_length, self._born
            self._born += 1
            self._pieces[row] = []
        self._pieces[row].append(piece)
        bisect.insort(self._open, (room - len(piece), row))
        if self._open[0][0] == 0 or len(self._open) > self.window:
            yield self._close(0)

    def _close(self, at: int) -> list[np.ndarray]:
        room, row = self._open.pop(at)
        self.rows += 1
        self.used += self.row_length - room
        return self._pieces.pop(row)
