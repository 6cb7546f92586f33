"""Rows: the packed rows of a part of a corpus, for one row length, read from its shards when they are asked for.

Legend: B rows, T tokens per row.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bessemer.data import rowplan, shards
from bessemer.data.batch import Batch
from bessemer.errors import UserError

OPEN = 128
"""Shards kept open at a time: a corpus may have more of them than a process may have files."""


class Rows:
    """Packed rows `[n_rows, row_length]` of the shards of a part."""

    def __init__(self, folder: Path, meta: dict[str, Any], part: str, row_length: int, beside: Path) -> None:
        self.path, self.row_length = folder, row_length
        self.pad_id: int = meta["pad_id"]
        self.facts: dict[str, Any] = meta["parts"][part]
        """Counts of this part: documents, tokens (padding not counted), bytes of UTF-8 text, per domain, shards."""
        self.tokenizer: str = meta["tokenizer"]
        """Fingerprint of the tokenizer that made the ids."""
        self._dtype = np.dtype(meta["dtype"])
        plans = rowplan.plan(folder, meta, row_length, beside)
        self._names = [shard["name"] for shard in self.facts["shards"]]
        self._open = lru_cache(OPEN)(lambda name: _open(folder, plans, name))
        self._ends = np.cumsum([len(self._open(name).rows) for name in self._names], dtype=np.int64)
        self.n_rows = int(self._ends[-1]) if len(self._ends) else 0

    @property
    def waste(self) -> float:
        """Share of the rows that is padding."""
        return 1 - self.facts["tokens"] / (self.n_rows * self.row_length) if self.n_rows else 0.0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per id; nats per token / ln 2 / this = bits per byte."""
        return self.facts["bytes"] / max(1, self.facts["tokens"])

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens [B, T] of the rows with these numbers, in this order. UserError if one is not what it was when it was
        packed."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()}, there are {self.n_rows}")
        found = np.full((len(rows), self.row_length), self.pad_id, self._dtype)
        places = np.searchsorted(self._ends, rows, side="right")
        for filled, row, place in zip(found, rows.tolist(), places.tolist(), strict=True):
            first = int(self._ends[place - 1]) if place else 0
            self._fill(filled, self._names[place], row - first)
        return found

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these numbers, in this order."""
        return to_batch(self.take(rows), self.pad_id)

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of every document, in the order they came."""
        for name in self._names:
            tokens = np.fromfile(shards.tokens_file(self.path, name), self._dtype)
            yield from np.split(tokens, np.load(shards.ends_file(self.path, name), allow_pickle=False)[:-1])

    def _fill(self, row_T: np.ndarray, name: str, number: int) -> None:
        shard = self._open(name)
        first = int(shard.rows["end"][number - 1]) if number else 0
        crc = at = 0
        for start, length in shard.pieces[first : int(shard.rows["end"][number])].tolist():
            width = self._dtype.itemsize
            # Not a memory map: of a file that was cut short it would end the process without a word.
            read = os.pread(shard.file.fileno(), length * width, start * width)
            crc = zlib.crc32(read, crc)
            if len(read) != length * width:
                break
            row_T[at : at + length] = np.frombuffer(read, self._dtype)
            at += length
        if crc != shard.rows["crc"][number]:
            raise UserError(
                f"{shard.file.name} was altered since its rows were packed (row {number} has another checksum); "
                f"{shards.REBUILD}"
            )


class _Shard(NamedTuple):
    file: FileIO
    pieces: np.ndarray
    rows: np.ndarray


def _open(folder: Path, plans: Path, name: str) -> _Shard:
    try:
        pieces, rows = (np.load(file, mmap_mode="r", allow_pickle=False) for file in rowplan.files(plans, name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the plan of {name} in {plans} is broken ({error}); delete that folder, it is made again"
        ) from error
    return _Shard(FileIO(shards.tokens_file(folder, name)), pieces, rows)


def to_batch(tokens_BT: np.ndarray, pad_id: int) -> Batch:
    """Pre-training batch: every token counts but padding and the first of a row, which nothing precedes."""
    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    loss = (tokens != pad_id).float()
    loss[:, :1] = 0.0
    return Batch(tokens, loss)


def open_rows(
    folder: str | Path, part: str = "train", row_length: int | None = None, beside: Path | None = None
) -> Rows:
    """The rows of one part of a corpus, checked against its facts; of the length it was built for unless told.

    Rows of a length that it was not built for are planned first; the plan is kept in the folder `beside`, if one is
    given, else in the corpus.
    """
    at, meta = shards.follow(Path(folder))
    if part not in shards.PARTS:
        raise UserError(f"a corpus has the parts {' and '.join(shards.PARTS)}, not {part!r}")
    shards.check(at, meta, [part], all_bytes=False)
    return Rows(at, meta, part, row_length or meta["row_length"], beside or Path(folder))
