"""The files of a checkpoint: written so that they are on the disk, read only if they are as written.

Tensors are in safetensors files. The manifest holds the SHA-256 of every file; a file is verified whole before its
first tensor is read. Of the files of many ranks each rank reads a part; they have more checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PIECE = 1 << 18
"""Bytes that are written at a time."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Damaged(Exception):
    """A checkpoint that must not be used; the message names file and damage."""


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for. Raises Damaged if the file does not have this SHA-256."""

    def __init__(self, path: Path, sha256: str):
        self.path, self.sha256 = path, sha256

    @cached_property
    def _file(self) -> Any:
        verify(self.path, self.sha256)
        try:
            return safe_open(self.path, "pt")
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{self.path.name}: {error}") from error

    @cached_property
    def _names(self) -> dict[str, None]:
        return dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def verify(path: Path, sha256: str) -> None:
    """Raises Damaged unless the file has this SHA-256."""
    try:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise Damaged(f"{path.name} does not match its checksum")
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file, waits until it is on the disk, returns its SHA-256. The library's own writer needs a
    second copy of the tensors in memory and turns a full disk into its own exception."""
    return write_pieces(path, chain((header(tensors),), map(as_bytes, tensors.values())))


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """What comes before the tensors' bytes: 8 bytes of length and {name: {dtype, shape, data_offsets}} as JSON."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").reshape(-1).view(torch.uint8).numpy().data


def write_synced(path: Path, content: bytes) -> str:
    """Writes a file, waits until it is on the disk, returns its SHA-256."""
    return write_pieces(path, [content])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """`write_synced` of the pieces, one after another."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in pieces:
            digest.update(piece)
            for start in range(0, len(piece), PIECE):
                part = piece[start : start + PIECE]
                if len(part) == PIECE and not np.frombuffer(part, np.uint8).any():
                    file.seek(PIECE, os.SEEK_CUR)  # the moments before the first step are 0: a hole, no space on disk
                else:
                    file.write(part)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
