"""Rows: documents packed into rows of one length, read from the shards of a corpus on demand.

`plans` lists the pieces of documents that make up each row. A row whose tokens do not match the CRC in its plan was
altered after it was planned.

`permute` needs no table: it computes position n of a permutation from a key. The permutations are Feistel networks:
they have no state and do not depend on the version of any library.

Legend: B rows, T tokens per row.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from bessemer.data import shards
from bessemer.data.plans import PIECE, ROW, best_fit, find_plan, plan_files
from bessemer.errors import UserError

if TYPE_CHECKING:
    from bessemer.data.batch import Batch

CHUNK_TOKENS = 1 << 25
"""Samples are packed in groups of about this many tokens, one group in memory at a time."""
ROUNDS = 6
OPEN = 64
"""Most shards of a source that are open at a time: a process may not open as many files as a run has."""


class Rows:
    """Packed rows `[n_rows, row_length]` of the shards of one split."""

    def __init__(self, folder: Path, meta: dict[str, Any], split: str, row_length: int, plans: Path) -> None:
        self.path, self.row_length = folder, row_length
        self.pad_id: int = meta["pad_id"]
        self.facts: dict[str, Any] = meta["parts"][split]
        """Counts of this split: documents, tokens (without padding), bytes of UTF-8 text, per domain, shards."""
        self.tokenizer: str = meta["tokenizer"]
        """Fingerprint of the tokenizer that made the ids."""
        self._dtype = np.dtype(meta["dtype"])
        plan = find_plan(folder, meta, row_length, plans)
        self._names = [shard["name"] for shard in self.facts["shards"]]
        self._open = lru_cache(OPEN)(lambda name: _open_shard(folder, plan, name))
        self._ends = np.cumsum([len(self._open(name).rows) for name in self._names], dtype=np.int64)
        self.n_rows = int(self._ends[-1]) if len(self._ends) else 0

    @property
    def waste(self) -> float:
        """Share of row positions that are padding."""
        return 1 - self.facts["tokens"] / (self.n_rows * self.row_length) if self.n_rows else 0.0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per id; nats per token / ln 2 / this = bits per byte."""
        return self.facts["bytes"] / max(1, self.facts["tokens"])

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens [B, T] of the rows with these numbers, in this order. Raises UserError if one was altered."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()}, but there are {self.n_rows}")
        tokens_BT = np.full((len(rows), self.row_length), self.pad_id, self._dtype)
        for filled, (name, number) in zip(tokens_BT, self._located(rows), strict=True):
            self._fill(filled, name, number)
        return tokens_BT

    def lengths(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """[B]: the tokens of each row; what follows them is padding. In many tokenizers the padding token also ends
        every document, so tokens alone do not tell which they are."""
        located = self._located(np.asarray(rows, dtype=np.int64))
        return np.array([_of_row(self._open(name), n)["length"].sum() for name, n in located], dtype=np.int64)

    def documents_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """[B, T]: number, within its row, of the document that each token belongs to; padding belongs to the last. A
        piece of a long document may have no BOS, so tokens alone do not tell where it begins."""
        rows = np.asarray(rows, dtype=np.int64)
        begins_BT = np.zeros((len(rows), self.row_length), dtype=np.int64)
        for begins_T, (name, number) in zip(begins_BT, self._located(rows), strict=True):
            begins_T[_of_row(self._open(name), number)["length"].cumsum()[:-1]] = 1
        return begins_BT.cumsum(1)

    def batch(self, rows: Sequence[int] | np.ndarray, masked: bool = False) -> Batch:
        """The rows with these numbers, in this order; `masked`: with the documents as segments."""
        return to_batch(self.take(rows), self.lengths(rows), self.documents_of(rows) if masked else None)

    def documents(self) -> Iterator[np.ndarray]:
        """The ids of every document, in corpus order."""
        for name in self._names:
            tokens = np.fromfile(shards.tokens_file(self.path, name), self._dtype)
            yield from np.split(tokens, np.load(shards.ends_file(self.path, name), allow_pickle=False)[:-1])

    def _located(self, rows: np.ndarray) -> Iterator[tuple[str, int]]:
        """(shard, number within it) of every row."""
        places = np.searchsorted(self._ends, rows, side="right")
        for row, index in zip(rows.tolist(), places.tolist(), strict=True):
            yield self._names[index], row - (int(self._ends[index - 1]) if index else 0)

    def _fill(self, row_T: np.ndarray, name: str, number: int) -> None:
        shard, crc, at = self._open(name), 0, 0
        pieces = _of_row(shard, number)
        fits = bool((pieces["start"] >> 48 == 0).all() and (pieces["length"] > 0).all())  # values that a plan may hold
        fits = fits and int(pieces["length"].sum(dtype=np.int64)) <= len(row_T)
        for start, length in pieces.tolist() if fits else ():
            width = self._dtype.itemsize
            # Not a memory map: reading a truncated file through one would kill the process without a message.
            read = os.pread(shard.file.fileno(), length * width, start * width)
            crc = zlib.crc32(read, crc)
            if len(read) != length * width:
                break
            row_T[at : at + length] = np.frombuffer(read, self._dtype)
            at += length
        if not at or crc != shard.rows["crc"][number]:
            raise UserError(
                f"{shard.file.name} was altered since its rows were packed, or their plan was (row {number} has "
                f"a different checksum); {shards.REBUILD}"
            )


class _OpenShard(NamedTuple):
    file: FileIO
    pieces: np.ndarray
    rows: np.ndarray


def _open_shard(folder: Path, plan: Path, name: str) -> _OpenShard:
    try:
        pieces, rows = (np.load(file, mmap_mode="r", allow_pickle=False) for file in plan_files(plan, name))
        if (pieces.dtype, pieces.ndim, rows.dtype, rows.ndim) != (PIECE, 1, ROW, 1) or not len(rows):
            raise ValueError("its tables have a different form")
        if int(rows["end"][-1]) != len(pieces):
            raise ValueError(f"its rows have {int(rows['end'][-1])} pieces, but it lists {len(pieces)}")
    except Exception as error:  # numpy raises various errors for a header it cannot parse
        raise UserError(
            f"the plan of {name} in {plan} is broken ({error}); delete that folder to have it rebuilt"
        ) from error
    return _OpenShard(FileIO(shards.tokens_file(folder, name)), pieces, rows)


def _of_row(shard: _OpenShard, number: int) -> np.ndarray:
    """The pieces of a row."""
    first = int(shard.rows["end"][number - 1]) if number else 0
    return shard.pieces[first : int(shard.rows["end"][number])]


def to_batch(tokens_BT: np.ndarray, length_B: np.ndarray, documents_BT: np.ndarray | None = None) -> Batch:
    """Pre-training batch: each of a row's `length_B` tokens is predicted except the first. `documents_BT`: its
    segments."""
    import torch  # here, because every worker of `data build` imports this module and would wait seconds for torch

    from bessemer.data.batch import Batch

    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    loss = torch.from_numpy((np.arange(tokens_BT.shape[1]) < length_B[:, None]).astype(np.float32))
    loss[:, :1] = 0.0
    return Batch(tokens, loss, None if documents_BT is None else torch.from_numpy(documents_BT))


def open_rows(
    folder: str | Path, split: str = "train", row_length: int | None = None, plans: Path | None = None
) -> Rows:
    """The rows of one split of a corpus, checked against its facts; `row_length` None: the length it was built for.

    Rows of another length are planned first; the plan is saved in the folder `plans`, if given, else in the corpus.
    """
    at, meta = shards.follow(Path(folder))
    if split not in shards.SPLITS:
        raise UserError(f"a corpus has the splits {' and '.join(shards.SPLITS)}, not {split!r}")
    shards.check(at, meta, [split], all_bytes=False)
    return Rows(at, meta, split, row_length or meta["row_length"], plans or Path(folder))


def write_rows(
    samples: Iterable[np.ndarray], row_length: int, padding: int, dtype: np.dtype, file: BinaryIO
) -> tuple[int, float]:
    """Pack samples, none longer than a row, into rows written to `file`. Returns (rows, share of padding)."""
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


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """The images of `index` under the permutation of 0..n-1 chosen by `key`.

    A Feistel network permutes the smallest 4^h >= n; an image outside 0..n-1 is permuted again until it falls
    inside (cycle walking), which gives a permutation of 0..n-1. On average fewer than four walks are needed.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(int.from_bytes(hashlib.sha256(f"{key} {r}".encode()).digest()[:8], "big")) for r in range(ROUNDS)]
    image = np.asarray(index).astype(np.uint64)
    outside = np.arange(len(image))
    while len(outside):
        x = image[outside]
        left, right = x >> half, x & low
        for round_key in keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & low)
        image[outside] = (left << half) | right
        outside = outside[image[outside] >= n]
    return image.astype(np.int64)


def _scramble(x: np.ndarray) -> np.ndarray:
    """A 64-bit mixing function (splitmix64's finaliser); multiplication wraps around, as intended."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation_key(seed: int, name: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{epoch}\n{name}".encode()).digest()[:8], "big")
