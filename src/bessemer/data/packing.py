"""Best-fit packing of documents into rows of one length (V3 4.1; Ding et al. 2024, "Fewer Truncations").

A piece longer than a row is cut into row-sized pieces; every other piece goes, whole, into the row that it fills best,
the longest first. So only documents longer than a row are ever cut, and little is padded. Rows come in the order of
their first document: a few rows from the beginning are a sample like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

CHUNK_TOKENS = 1 << 25
"""Samples are packed in groups of about this many tokens, which are held in memory."""


class Packed(NamedTuple):
    """Pieces of documents that lie one after the other, row by row."""

    start_P: np.ndarray
    """int64: where each piece begins."""
    length_P: np.ndarray
    """int64."""
    end_R: np.ndarray
    """int64: how many pieces lie in this row and those before it."""

    def rows(self) -> Iterator[list[range]]:
        """The pieces of each row."""
        pieces = [range(a, a + n) for a, n in zip(self.start_P.tolist(), self.length_P.tolist(), strict=True)]
        first = 0
        for end in self.end_R.tolist():
            yield pieces[first:end]
            first = end


def best_fit(lengths: np.ndarray, row_length: int) -> Packed:
    """Packs documents of these lengths, none of them 0."""
    start_P, length_P = _pieces(np.asarray(lengths, np.int64), row_length)
    row_P = np.empty(len(start_P), dtype=np.int64)
    open_: list[list[int]] = [[] for _ in range(row_length + 1)]
    """Rows by the room that is left in them."""
    rooms = 0  # bit n is set where a row with room n is open
    n_rows = 0
    order = np.argsort(-length_P, kind="stable")
    for piece, length in zip(order.tolist(), length_P[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_[room].pop()
            if not open_[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, n_rows
            n_rows += 1
        row_P[piece] = row
        if room > length:
            open_[room - length].append(row)
            rooms |= 1 << (room - length)
    first_R = np.full(n_rows, len(start_P), dtype=np.int64)
    np.minimum.at(first_R, row_P, np.arange(len(start_P)))
    sorted_P = np.lexsort((start_P, first_R[row_P]))
    return Packed(
        start_P[sorted_P], length_P[sorted_P], np.bincount(row_P, minlength=n_rows)[np.argsort(first_R)].cumsum()
    )


def _pieces(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) after long documents have been cut."""
    n_pieces = -(-lengths // row_length)
    number_P = np.arange(n_pieces.sum()) - np.repeat(n_pieces.cumsum() - n_pieces, n_pieces)  # within its document
    start_P = np.repeat(lengths.cumsum() - lengths, n_pieces) + number_P * row_length
    return start_P, np.minimum(np.repeat(lengths, n_pieces) - number_P * row_length, row_length)


def write_rows(
    samples: Iterable[np.ndarray], row_length: int, padding: int, dtype: np.dtype, file: BinaryIO
) -> tuple[int, float]:
    """Packs samples, none longer than a row, into rows of `file`; (rows, share of them that is padding)."""
    n_rows = used = 0
    for group in _groups(samples):
        tokens = np.concatenate(group)
        for pieces in best_fit(np.array(list(map(len, group))), row_length).rows():
            row = np.full(row_length, padding, dtype)
            filled = np.concatenate([tokens[piece.start : piece.stop] for piece in pieces])
            row[: len(filled)] = filled
            file.write(row.tobytes())
            n_rows, used = n_rows + 1, used + len(filled)
    return n_rows, 1 - used / (n_rows * row_length) if n_rows else 0.0


def _groups(samples: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    size = 0
    for sample in samples:
        group.append(sample)
        size += len(sample)
        if size >= CHUNK_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group
