"""Row plans: which pieces of a shard's documents make up a row, for one row length (V3 4.1, "Fewer Truncations").

    rows-256/train-00000.pieces.npy    (start, length) of every piece, in tokens of the shard; rows one after the other
    rows-256/train-00000.rows.npy      (end, crc) of every row: where its pieces end, CRC-32 of its tokens

A plan follows from the lengths of the documents alone, so rows of another length cost a plan, not another copy of the
tokens; it is made when it is first asked for. A row that does not have its CRC was altered since.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from bessemer.data.packing import best_fit
from bessemer.data.shards import PARTS, ends_file, tokens_file
from bessemer.errors import UserError

PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])
ROW = np.dtype([("end", "<i8"), ("crc", "<u4")])


def plan(folder: Path, meta: dict[str, Any], row_length: int, beside: Path) -> Path:
    """The folder of the plans of all shards for this length: in `folder`, or else in `beside`, where it is made."""
    names = [shard["name"] for part in PARTS for shard in meta["parts"][part]["shards"]]
    found = folder / f"rows-{row_length}"
    if _complete(found, names):
        return found
    target = beside / f"rows-{row_length}"
    target.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target / ".lock"):
        for name in names:
            if not _complete(target, [name]):
                write(folder, target, name, np.dtype(meta["dtype"]), row_length)
    return target


def _complete(target: Path, names: Iterable[str]) -> bool:
    return all(file.is_file() for name in names for file in files(target, name))


def check_length(row_length: int) -> None:
    if row_length < 2:
        raise UserError(f"row_length {row_length} is too small: a row must hold a token and one to predict it from")


def write(folder: Path, target: Path, name: str, dtype: np.dtype, row_length: int) -> None:
    """Plans one shard. A process that is killed leaves no file under a final name."""
    check_length(row_length)
    target.mkdir(exist_ok=True)
    tokens = np.fromfile(tokens_file(folder, name), dtype)
    packed = best_fit(np.diff(np.load(ends_file(folder, name), allow_pickle=False), prepend=0), row_length)
    pieces, rows = np.empty(len(packed.start_P), PIECE), np.empty(len(packed.end_R), ROW)
    pieces["start"], pieces["length"] = packed.start_P, packed.length_P
    rows["end"], rows["crc"] = packed.end_R, [_crc(tokens, row) for row in packed.rows()]
    scratch = Path(tempfile.mkdtemp(dir=target, prefix=f".{name}-"))
    for file, array in zip(files(target, name), (pieces, rows), strict=True):
        np.save(scratch / file.name, array)
        os.replace(scratch / file.name, file)
    shutil.rmtree(scratch)


def _crc(tokens: np.ndarray, row: list[range]) -> int:
    crc = 0
    for piece in row:
        crc = zlib.crc32(tokens[piece.start : piece.stop], crc)
    return crc


def files(target: Path, name: str) -> tuple[Path, Path]:
    """(pieces, rows) of a shard."""
    return target / f"{name}.pieces.npy", target / f"{name}.rows.npy"
