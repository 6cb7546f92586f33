"""Writes the tensors of a model directory as a stream, and reads them back.

Shards are planned from shapes alone, so only one tensor is in memory at a time. `replace` puts the finished directory
in place. A `Form` says how a tensor is stored: here as it is; an add-on may quantise it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bessemer.data.model_files import INDEX
from bessemer.errors import UserError
from bessemer.hf.mapping import Slot
from bessemer.hf.safetensors_reader import SINGLE, WEIGHTS, Checkpoint

Read = Callable[[Slot, torch.dtype], Tensor]
"""Returns the tensor of a slot in a dtype."""
CODES = {dtype: code for code, dtype in WEIGHTS.items()}


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Form:
    """How the tensors of a directory are stored: as they are, each under its own key."""

    dtype: torch.dtype | None = None
    """The dtype of tensors if nobody names one; None: as in the source."""
    facts: Mapping[str, Any] = {}
    """Further keys of config.json."""

    def specs(self, slot: Slot, dtype: torch.dtype) -> list[TensorSpec]:
        """What is written for a slot."""
        return [TensorSpec(slot.key, dtype, slot.shape)]

    def tensors(self, slot: Slot, dtype: torch.dtype, read: Read) -> Iterator[Tensor]:
        """The tensors of `specs`."""
        yield read(slot, dtype)

    def compare(self, directory: Path, layout: Sequence[Slot], read: Read) -> None:
        """UserError unless what was written represents its source; `read` is called again."""


def write_slots(
    directory: Path, layout: Sequence[Slot], dtypes: Sequence[torch.dtype], read: Read, form: Form,
    max_shard_bytes: float,
) -> None:  # fmt: skip
    """Writes a tensor for every slot, in its dtype and in this form, and verifies all by reading them back."""
    pairs = list(zip(layout, dtypes, strict=True))
    plan = [spec for slot, dtype in pairs for spec in form.specs(slot, dtype)]
    tensors = (tensor for slot, dtype in pairs for tensor in form.tensors(slot, dtype, read))
    verify(directory, plan, write_tensors(directory, plan, tensors, max_shard_bytes))
    form.compare(directory, layout, read)


def plan_shards(plan: Iterable[TensorSpec], max_shard_bytes: float) -> list[list[TensorSpec]]:
    """Consecutive tensors per file; a tensor larger than the limit gets its own file."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for item in plan:
        if shards[-1] and used + item.size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.size
    return shards


def write_tensors(directory: Path, plan: list[TensorSpec], tensors: Iterable[Tensor], max_shard_bytes: float) -> dict:
    """Writes the tensors in the order of the plan and returns the CRC-32 of each by key."""
    shards = plan_shards(plan, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        write_json(directory / INDEX, {
            "metadata": {"total_size": sum(item.size for item in plan)},
            "weight_map": {item.key: name for name, shard in zip(names, shards, strict=True) for item in shard},
        })  # fmt: skip
    stream, sums = iter(tensors), {}
    for name, shard in zip(names, shards, strict=True):
        with open(directory / name, "wb") as file:
            file.write(_header(shard))
            for item in shard:
                tensor = next(stream).to(item.dtype)
                assert tuple(tensor.shape) == item.shape, (item, tensor.shape)
                data = _bytes(tensor)
                file.write(data)
                sums[item.key] = zlib.crc32(data)
                del tensor, data
            _sync(file)
    return sums


def verify(directory: Path, plan: list[TensorSpec], sums: dict[str, int]) -> None:
    """Reads every tensor back and compares dtype, shape and checksum; raises UserError at the first difference."""
    written = Checkpoint(directory)
    for item in plan:
        entry = written.entries.get(item.key)
        matches = entry is not None and (entry.dtype, entry.shape) == (item.dtype, item.shape)
        if not matches or zlib.crc32(_bytes(written.raw(item.key))) != sums[item.key]:
            where = entry.file if entry else directory
            raise UserError(f"{where}: tensor {item.key} reads back differently from what was written; check the disk")
    if len(written.entries) != len(plan):
        raise UserError(f"{directory}: {len(written.entries)} tensors on disk, but {len(plan)} were written")


def write_json(path: Path, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        _sync(file)


def _header(shard: list[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in shard:
        entries[item.key] = {
            "dtype": CODES[item.dtype], "shape": list(item.shape), "data_offsets": [offset, offset + item.size],
        }  # fmt: skip
        offset += item.size
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sync(file: BufferedWriter | TextIOWrapper) -> None:
    file.flush()
    os.fsync(file.fileno())
