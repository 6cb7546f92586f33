"""The files of a checkpoint of many ranks, and how a reader verifies no more of them than it needs.

A safetensors file is 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} and the
tensors' bytes. The manifest holds the SHA-256 of its length and header. Every CHUNK bytes of the tensors have a SHA-256
of their own; these digests, 32 bytes each, are stored one after another in NAME.sha256, and the manifest holds the
SHA-256 of that file. So a rank that needs a part of a file reads and hashes the chunks of that part, each of them once,
and no process holds more than one tensor of a checkpoint beside its own.

A file that one process wrote has one SHA-256; it is verified whole before the first tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from bessemer.train.checkpoint_files import DTYPES, Damaged, as_bytes, header, verify, write_pieces, write_synced

CHUNK = 1 << 18
"""Bytes that share a digest: few beside the 2 MB of a bucket that a rank of 128 reads; the digests take 0.01 %."""
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class FileSums(TypedDict):
    """What a manifest holds of a file with tensors."""

    header: str
    """SHA-256 of the header and its length."""
    digests: str
    """SHA-256 of the file with the chunks' digests."""
    chunk: int
    """Bytes of a chunk."""


class TensorEntry(NamedTuple):
    """A tensor of a file; its bytes are [begin, end) of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class ChunkedFile:
    """A file with tensors, open for reading. Raises Damaged as soon as anything that it reads does not match `sums`."""

    def __init__(self, path: Path, sums: FileSums | str):
        self.path, self._sums = path, sums
        self.bytes_read = 0
        """Bytes of the tensors that were read and hashed."""
        self._verified = False
        self._digests = b""
        self._chunk: tuple[int, bytes] = (-1, b"")
        """The last chunk that was read, which the next tensor may begin in."""
        self.entries, self._start = self._read_header()

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a tensor; all of them in its shape if neither is given."""
        entry = self.entries[key]
        width = entry.dtype.itemsize
        size = math.prod(entry.shape)
        stop = size if stop is None else stop
        values = torch.empty(stop - start, dtype=entry.dtype)
        if stop > start:
            self._fill(values.view(torch.uint8).numpy().data, entry.begin + start * width)
        return values.view(entry.shape) if stop - start == size else values

    def _read_header(self) -> tuple[dict[str, TensorEntry], int]:
        """(the entries, where the data begin)."""
        try:
            with open(self.path, "rb") as file:
                size, length = os.fstat(file.fileno()).st_size, file.read(8)
                head = file.read(min(size, int.from_bytes(length, "little")))
        except OSError as error:
            raise self._damaged(str(error.strerror)) from error
        if not isinstance(self._sums, str) and hashlib.sha256(length + head).hexdigest() != self._sums["header"]:
            raise self._damaged()
        try:
            named = {key: value for key, value in json.loads(head).items() if key != "__metadata__"}
            entries = {
                key: TensorEntry(_DTYPES[value["dtype"]], tuple(value["shape"]), *value["data_offsets"])
                for key, value in named.items()
            }
            fits = all(
                0 <= one.begin <= one.end <= size and math.prod(one.shape) * one.dtype.itemsize == one.end - one.begin
                for one in entries.values()
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged() from error
        start = 8 + len(head)
        if not fits or start + max((one.end for one in entries.values()), default=0) != size:
            raise self._damaged()
        return entries, start

    def _fill(self, into: memoryview, begin: int) -> None:
        """Reads the bytes of the data from `begin` on."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if isinstance(self._sums, str):
                    self._verify_whole(self._sums)
                done = 0
                while done < len(into):
                    part = self._read(file.fileno(), begin + done)[: len(into) - done]
                    into[done : done + len(part)] = part
                    done += len(part)
        except OSError as error:
            raise self._damaged(str(error.strerror)) from error

    def _read(self, file: int, at: int) -> bytes:
        """The bytes of the data from `at` to the end of their chunk."""
        size = CHUNK if isinstance(self._sums, str) else self._sums["chunk"]
        number, offset = divmod(at, size)
        if self._chunk[0] != number:
            data = os.pread(file, size, self._start + number * size)
            if not isinstance(self._sums, str):
                self.bytes_read += len(data)
                if hashlib.sha256(data).digest() != self._digest(number, self._sums["digests"]):
                    raise self._damaged()
            self._chunk = number, data
        if len(self._chunk[1]) <= offset:
            raise self._damaged()
        return self._chunk[1][offset:]

    def _digest(self, number: int, expected: str) -> bytes:
        if not self._digests:
            path = digests_file(self.path)
            try:
                self._digests = path.read_bytes()
            except OSError as error:
                raise Damaged(f"{path.name}: {error.strerror}") from error
            if hashlib.sha256(self._digests).hexdigest() != expected:
                raise Damaged(f"{path.name} does not match its checksum")
        return self._digests[32 * number : 32 * (number + 1)]

    def _verify_whole(self, expected: str) -> None:
        if not self._verified:
            verify(self.path, expected)
            self.bytes_read += self.path.stat().st_size
            self._verified = True

    def _damaged(self, fault: str = "") -> Damaged:
        return Damaged(f"{self.path.name}: {fault}" if fault else f"{self.path.name} does not match its checksum")


def digests_file(path: Path) -> Path:
    """The file with the chunks' digests of a file with tensors."""
    return path.with_name(f"{path.name}.sha256")


class _Digests:
    """The digests of data that come in pieces of any size."""

    def __init__(self) -> None:
        self.found = bytearray()
        self._digest, self._filled = hashlib.sha256(), 0

    def add(self, piece: memoryview) -> None:
        while len(piece):
            part, piece = piece[: CHUNK - self._filled], piece[CHUNK - self._filled :]
            self._digest.update(part)
            self._filled += len(part)
            if self._filled == CHUNK:
                self.end()

    def end(self) -> None:
        if self._filled:
            self.found += self._digest.digest()
            self._digest, self._filled = hashlib.sha256(), 0


def write_chunked(path: Path, tensors: dict[str, Tensor]) -> FileSums:
    """Writes and syncs a safetensors file and its digests."""
    head, digests = header(tensors), _Digests()

    def pieces() -> Iterable[bytes | memoryview]:
        yield head
        for tensor in tensors.values():
            piece = as_bytes(tensor)
            digests.add(piece)
            yield piece
        digests.end()

    write_pieces(path, pieces())
    return {
        "header": hashlib.sha256(head).hexdigest(),
        "digests": write_synced(digests_file(path), bytes(digests.found)),
        "chunk": CHUNK,
    }
