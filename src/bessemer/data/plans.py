"""Plans: which pieces of a shard's documents make up each row of one length.

Packing is best fit (V3 4.1; Ding et al. 2024, "Fewer Truncations"). A document longer than a row is cut into row-sized
pieces; then each piece, longest first, goes into the fullest row with room for it. So only documents longer than a row
are cut, and there is little padding. Rows are in the order of their first document, so the first few rows are as
representative as any.

    rows-256/train-00000.pieces.npy    (start, length) of every piece, in tokens of the shard; rows one after the other
    rows-256/train-00000.rows.npy      (end, crc) of every row: where its pieces end, CRC-32 of its tokens

A plan depends only on the lengths of the documents, so rows of another length need only another plan, made on first
use, and no second copy of the tokens. Planning 10^9 tokens takes three seconds of a core (bench/row_plans.py).

Legend: P pieces, R rows.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np

from bessemer.data import shards
from bessemer.errors import UserError

PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])
ROW = np.dtype([("end", "<i8"), ("crc", "<u4")])


def find_plan(folder: Path, meta: dict[str, Any], row_length: int, plans: Path) -> Path:
    """The folder with all shards' plans for this length: in `folder`, or else in `plans`, made there if missing.

    Processes that look for the same plans share the work, shard by shard, and each returns when all are made.
    """
    names = [shard["name"] for split in shards.SPLITS for shard in meta["parts"][split]["shards"]]
    existing = folder / f"rows-{row_length}"
    if _complete(existing, names):
        return existing
    target = plans / f"rows-{row_length}"
    target.mkdir(parents=True, exist_ok=True)
    for timeout in (0, -1):  # what no process is at work on; then what one left when it was killed
        for name in names:
            if not _complete(target, [name]):
                file = target / f".{name}.lock"
                with suppress(filelock.Timeout), filelock.FileLock(file, timeout=timeout):
                    if not _complete(target, [name]):
                        write_plan(folder, target, name, np.dtype(meta["dtype"]), row_length)
                    file.unlink(missing_ok=True)
    return target


def _complete(target: Path, names: Iterable[str]) -> bool:
    return all(file.is_file() for name in names for file in plan_files(target, name))


def check_length(row_length: int) -> None:
    if row_length < 2:
        raise UserError(f"row_length {row_length} is too small: a row must hold a token and one to predict it from")


def write_plan(folder: Path, target: Path, name: str, dtype: np.dtype, row_length: int) -> None:
    """Plan one shard. A killed process leaves no partial file under a final name."""
    check_length(row_length)
    target.mkdir(exist_ok=True)
    try:
        tokens = np.fromfile(shards.tokens_file(folder, name), dtype)
        ends = np.load(shards.ends_file(folder, name), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the shard {name} in {folder} cannot be read ({error}); {shards.REBUILD}") from error
    packed = best_fit(np.diff(ends, prepend=0), row_length)
    pieces, rows = np.empty(len(packed.start_P), PIECE), np.empty(len(packed.end_R), ROW)
    pieces["start"], pieces["length"] = packed.start_P, packed.length_P
    rows["end"], rows["crc"] = packed.end_R, [_crc(tokens, row) for row in packed.rows()]
    scratch = Path(tempfile.mkdtemp(dir=target, prefix=f".tmp-{name}-"))
    for file, array in zip(plan_files(target, name), (pieces, rows), strict=True):
        np.save(scratch / file.name, array)
        os.replace(scratch / file.name, file)
    shutil.rmtree(scratch)


def _crc(tokens: np.ndarray, row: list[range]) -> int:
    crc = 0
    for piece in row:
        crc = zlib.crc32(tokens[piece.start : piece.stop].data, crc)
    return crc


def plan_files(target: Path, name: str) -> tuple[Path, Path]:
    """(pieces, rows) of a shard."""
    return target / f"{name}.pieces.npy", target / f"{name}.rows.npy"


class PackedPieces(NamedTuple):
    """Pieces of documents in row order."""

    start_P: np.ndarray
    """int64: where each piece begins."""
    length_P: np.ndarray
    """int64."""
    end_R: np.ndarray
    """int64: number of pieces in this row and those before it."""

    def rows(self) -> Iterator[list[range]]:
        """The pieces of each row."""
        pieces = [range(a, a + n) for a, n in zip(self.start_P.tolist(), self.length_P.tolist(), strict=True)]
        first = 0
        for end in self.end_R.tolist():
            yield pieces[first:end]
            first = end


def best_fit(lengths: np.ndarray, row_length: int) -> PackedPieces:
    """Pack documents of these lengths, all positive."""
    start_P, length_P = _pieces(np.asarray(lengths, np.int64), row_length)
    row_P, n_rows = _rows_of(length_P, row_length)
    first_R = np.full(n_rows, len(start_P), dtype=np.int64)
    np.minimum.at(first_R, row_P, np.arange(len(start_P)))
    sorted_P = np.lexsort((start_P, first_R[row_P]))
    return PackedPieces(
        start_P[sorted_P], length_P[sorted_P], np.bincount(row_P, minlength=n_rows)[np.argsort(first_R)].cumsum()
    )


def _rows_of(length_P: np.ndarray, row_length: int) -> tuple[np.ndarray, int]:
    """(the row of every piece, number of rows). Longest first, a piece goes into the open row with the least room that
    is enough, among equals the one opened last.

    All n pieces of a length are placed together: no open row has a room between that length and the least that is
    enough, so a row takes as many of them as fit before the next one gets any."""
    order = np.argsort(-length_P, kind="stable")
    lengths, counts = np.unique(length_P, return_counts=True)
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    """Open rows by their free room."""
    rooms = 0  # bit n is set if a row with room n is open
    n_rows = 0
    placed: list[int] = []
    for length, n in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while n:
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                per_row, stack = room // length, by_room[room]
                count = min(len(stack), -(-n // per_row))
                rows = stack[: -count - 1 : -1]
                del stack[-count:]
                if not stack:
                    rooms &= ~(1 << room)
            else:
                room, per_row = row_length, row_length // length
                rows = list(range(n_rows, n_rows - (-n // per_row)))
                n_rows += len(rows)
            full = n // per_row
            placed += rows[:full] if per_row == 1 else [row for row in rows[:full] for _ in range(per_row)]
            n -= per_row * len(rows[:full])
            waiting = [(room - per_row * length, rows[:full])]
            if full < len(rows):  # the last row takes what is left
                placed += rows[full:] * n
                waiting.append((room - n * length, rows[full:]))
                n = 0
            for room_left, some in waiting:
                if room_left and some:
                    by_room[room_left] += some
                    rooms |= 1 << room_left
    row_P = np.empty(len(length_P), dtype=np.int64)
    row_P[order] = placed
    return row_P, n_rows


def _pieces(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) after long documents have been cut."""
    n_pieces = -(-lengths // row_length)
    number_P = np.arange(n_pieces.sum()) - np.repeat(n_pieces.cumsum() - n_pieces, n_pieces)  # within its document
    start_P = np.repeat(lengths.cumsum() - lengths, n_pieces) + number_P * row_length
    return start_P, np.minimum(np.repeat(lengths, n_pieces) - number_P * row_length, row_length)
