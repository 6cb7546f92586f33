"""Plans: which pieces of a shard's documents make up each row of one length.

Packing is best fit (V3 4.1; Ding et al. 2024, "Fewer Truncations"). A document longer than a row is cut into row-sized
pieces; then each piece, longest first, goes into the fullest row with room for it. So only documents longer than a row
are cut, and there is little padding. Rows are in the order of their first document, so the first few rows are as
representative as any.

    rows-256/train-00000.pieces.npy    (start, length) of every piece, in tokens of the shard; rows one after the other
    rows-256/train-00000.rows.npy      (end, crc) of every row: where its pieces end, CRC-32 of its tokens

A plan depends only on the lengths of the documents, so rows of another length need only another plan, made on first
use, and no second copy of the tokens.

Legend: P pieces, R rows.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from select import select
from typing import Any, NamedTuple

import filelock
import numpy as np

from bessemer.data import shards
from bessemer.errors import UserError
from bessemer.workers import cores

PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])
ROW = np.dtype([("end", "<i8"), ("crc", "<u4")])
HELPED = 1 << 28
"""Tokens from which planning, half a second of a core here, is worth the start of helpers."""


def find_plan(folder: Path, meta: dict[str, Any], row_length: int, plans: Path) -> Path:
    """The folder with all shards' plans for this length: in `folder`, or else in `plans`, made there if missing.

    Processes that look for the same plans share the work, shard by shard, and each returns when all are made. One that
    is alone starts helpers on its other cores if there is much to plan.
    """
    all_shards = _shards(meta)
    names = [shard["name"] for shard in all_shards]
    existing = folder / f"rows-{row_length}"
    if _complete(existing, names):
        return existing
    target = plans / f"rows-{row_length}"
    target.mkdir(parents=True, exist_ok=True)
    unplanned = [shard for shard in all_shards if not _complete(target, [shard["name"]])]
    missing, tokens = [shard["name"] for shard in unplanned], sum(shard["tokens"] for shard in unplanned)
    helpers = min(cores(), len(missing)) - 1 if tokens >= HELPED else 0
    with ExitStack() as started:
        for _ in range(helpers):
            started.enter_context(ahead([(folder, plans)], [row_length]))
        for timeout in (0, -1):  # what no process is at work on; then what one left when it was killed
            _plan_free(folder, target, missing, np.dtype(meta["dtype"]), row_length, timeout)
    return target


def _plan_free(
    folder: Path, target: Path, names: list[str], dtype: np.dtype, row_length: int, timeout: float,
    goes_on: Callable[[], bool] = lambda: True,
) -> None:  # fmt: skip
    """Plans the shards that have no plan and whose lock this process gets within `timeout` seconds, -1: in any time."""
    first = os.getpid() * 7919 % max(1, len(names))  # processes begin at different shards
    for name in names[first:] + names[:first]:
        if _complete(target, [name]):
            continue
        if not goes_on():
            return
        file = target / f".{name}.lock"
        with suppress(filelock.Timeout), filelock.FileLock(file, timeout=timeout):
            if not _complete(target, [name]):
                write_plan(folder, target, name, dtype, row_length)
            file.unlink(missing_ok=True)


@contextmanager
def ahead(corpora: Sequence[tuple[Path, Path]], lengths: Sequence[int]) -> Iterator[None]:
    """Inside, a separate process plans these (corpus folder, folder for plans) for these row lengths, one length after
    another. It reports no error: opening the rows plans what is missing and raises what is wrong."""
    arguments = [",".join(map(str, lengths)), *(str(path.absolute()) for pair in corpora for path in pair)]
    quiet = subprocess.DEVNULL
    helper = subprocess.Popen(
        [sys.executable, "-P", "-m", "bessemer.data.plans", *arguments],
        stdin=subprocess.PIPE, stdout=quiet, stderr=quiet,
    )  # fmt: skip
    try:
        yield
    finally:
        helper.terminate()  # it ends after the shard at hand, as it does when this process is killed
        helper.communicate()


def _help(lengths: Sequence[int], corpora: Sequence[tuple[Path, Path]]) -> None:
    """The helper's work, until SIGTERM, or until standard input is closed because its parent has ended."""
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))

    def goes_on() -> bool:
        return not stops and not select([sys.stdin], [], [], 0)[0]

    for length in lengths:
        for corpus, plans in corpora:
            with suppress(UserError, OSError):
                folder, meta = shards.follow(corpus)
                names = [shard["name"] for shard in _shards(meta)]
                target = plans / f"rows-{length}"
                if not _complete(folder / target.name, names):
                    target.mkdir(parents=True, exist_ok=True)
                    _plan_free(folder, target, names, np.dtype(meta["dtype"]), length, 0, goes_on)


def _shards(meta: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in shards.SPLITS for shard in meta["parts"][split]["shards"]]


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
    scratch = Path(tempfile.mkdtemp(dir=target, prefix=f".{name}-"))
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
                each, stack = room // length, by_room[room]
                taken = min(len(stack), -(-n // each))
                rows = stack[: -taken - 1 : -1]
                del stack[-taken:]
                if not stack:
                    rooms &= ~(1 << room)
            else:
                room, each = row_length, row_length // length
                rows = list(range(n_rows, n_rows - (-n // each)))
                n_rows += len(rows)
            full = n // each
            placed += rows[:full] if each == 1 else [row for row in rows[:full] for _ in range(each)]
            n -= each * len(rows[:full])
            left = [(room - each * length, rows[:full])]
            if full < len(rows):  # the last row takes what is left
                placed += rows[full:] * n
                left.append((room - n * length, rows[full:]))
                n = 0
            for now, some in left:
                if now and some:
                    by_room[now] += some
                    rooms |= 1 << now
    row_P = np.empty(len(length_P), dtype=np.int64)
    row_P[order] = placed
    return row_P, n_rows


def _pieces(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) after long documents have been cut."""
    n_pieces = -(-lengths // row_length)
    number_P = np.arange(n_pieces.sum()) - np.repeat(n_pieces.cumsum() - n_pieces, n_pieces)  # within its document
    start_P = np.repeat(lengths.cumsum() - lengths, n_pieces) + number_P * row_length
    return start_P, np.minimum(np.repeat(lengths, n_pieces) - number_P * row_length, row_length)


if __name__ == "__main__":
    _paths = [Path(argument) for argument in sys.argv[2:]]
    _help([int(length) for length in sys.argv[1].split(",")], list(zip(_paths[::2], _paths[1::2], strict=True)))
