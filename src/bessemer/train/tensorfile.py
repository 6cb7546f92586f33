"""Writing a safetensors file as a stream: no second copy of the tensors in memory, SHA-256 on the way, plain OSErrors.

(The library's own writer turns a full disk into its own exception.) Reading is the library's.
Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_DTYPE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes and syncs the file; returns its SHA-256."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    body = (memoryview(_bytes(tensor)) for tensor in tensors.values())
    return write_synced(path, _chain(len(head).to_bytes(8, "little"), head, body))


def write_synced(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Writes the pieces, waits until they are on the disk, returns their SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chain(start: bytes, head: bytes, body: Iterable[memoryview]) -> Iterable[bytes | memoryview]:
    yield start
    yield head
    yield from body


def _bytes(tensor: Tensor):
    return tensor.detach().to("cpu").reshape(-1).view(torch.uint8).numpy()
