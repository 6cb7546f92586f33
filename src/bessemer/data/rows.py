"""Rows: documents packed into rows of one length, planned once, read from the shards of a corpus on demand.

Packing is best fit (V3 4.1; Ding et al. 2024, "Fewer Truncations"). A document longer than a row is cut into row-sized
pieces; then each piece, longest first, goes into the fullest row with room for it. So only documents longer than a row
are cut, and there is little padding. Rows are in the order of their first document, so the first few rows are as
representative as any.

A plan lists the pieces of a shard's documents that make up each row, for one row length:

    rows-256/train-00000.pieces.npy    (start, length) of every piece, in tokens of the shard; rows one after the other
    rows-256/train-00000.rows.npy      (end, crc) of every row: where its pieces end, CRC-32 of its tokens

It depends only on the lengths of the documents, so rows of another length need only another plan, made on first use,
and no second copy of the tokens. A row whose tokens do not match its CRC was altered after it was planned.

`permute` needs no table: it computes position n of a permutation from a key. The permutations are Feistel networks:
they have no state and do not depend on the version of any library.

Legend: B rows, T tokens per row; P pieces, R rows of a plan.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import filelock
import numpy as np

from bessemer.data import shards
from bessemer.errors import UserError

if TYPE_CHECKING:
    from bessemer.data.batch import Batch

CHUNK_TOKENS = 1 << 25
"""Samples are packed in groups of about this many tokens, one group in memory at a time."""
PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])
ROW = np.dtype([("end", "<i8"), ("crc", "<u4")])
ROUNDS = 6
OPEN = 128
"""Most shards open at a time: a corpus may have more shards than a process may open files."""


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
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            yield self._names[place], row - (int(self._ends[place - 1]) if place else 0)

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


def find_plan(folder: Path, meta: dict[str, Any], row_length: int, plans: Path) -> Path:
    """The folder with all shards' plans for this length: in `folder`, or else in `plans`, made there if missing."""
    names = [shard["name"] for split in shards.SPLITS for shard in meta["parts"][split]["shards"]]
    existing = folder / f"rows-{row_length}"
    if _complete(existing, names):
        return existing
    target = plans / f"rows-{row_length}"
    target.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target / ".lock"):
        for name in names:
            if not _complete(target, [name]):
                write_plan(folder, target, name, np.dtype(meta["dtype"]), row_length)
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
    row_P = np.empty(len(start_P), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    """Open rows by their free room."""
    rooms = 0  # bit n is set if a row with room n is open
    n_rows = 0
    order = np.argsort(-length_P, kind="stable")
    for piece, length in zip(order.tolist(), length_P[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, n_rows
            n_rows += 1
        row_P[piece] = row
        if room > length:
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    first_R = np.full(n_rows, len(start_P), dtype=np.int64)
    np.minimum.at(first_R, row_P, np.arange(len(start_P)))
    sorted_P = np.lexsort((start_P, first_R[row_P]))
    return PackedPieces(
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
