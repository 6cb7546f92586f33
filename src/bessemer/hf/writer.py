"""Writing a model directory: tensors as a stream, the directory in one step.

Invariants
- The shard of every tensor is planned from shapes alone, so one tensor at a time is in memory.
- The directory at the target is the old one or the new one, complete and on the disk; never a mixture. It is built
  beside the target, read back, and renamed. Files of the old one that are not replaced (a model card, a tokenizer)
  are carried over; its weights are not.
- The system's refusals (disk full, no permission) become UserErrors, and nothing half-written stays behind.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.hf.reader import INDEX, SINGLE, WEIGHTS, Checkpoint

CODES = {dtype: code for code, dtype in WEIGHTS.items()}


class Planned(NamedTuple):
    """A tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(plan: Iterable[Planned], max_shard_bytes: float) -> list[list[Planned]]:
    """Consecutive tensors per file; a tensor larger than the limit gets a file of its own."""
    shards: list[list[Planned]] = [[]]
    used = 0
    for item in plan:
        if shards[-1] and used + item.size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.size
    return shards


def write_tensors(directory: Path, plan: list[Planned], tensors: Iterable[Tensor], max_shard_bytes: float) -> dict:
    """Writes the tensors, which come in the order of the plan; returns the CRC-32 of each by key."""
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
                data = memoryview(_bytes(tensor))
                file.write(data)
                sums[item.key] = zlib.crc32(data)
                del tensor, data
            _sync(file)
    return sums


def verify(directory: Path, plan: list[Planned], sums: dict[str, int]) -> None:
    """Reads every tensor back and compares dtype, shape and checksum; UserError on the first difference."""
    written = Checkpoint(directory)
    for item in plan:
        entry = written.entries.get(item.key)
        same = entry is not None and (entry.dtype, entry.shape) == (item.dtype, item.shape)
        if not same or zlib.crc32(memoryview(_bytes(written.raw(item.key)))) != sums[item.key]:
            where = entry.file if entry else directory
            raise UserError(f"{where}: tensor {item.key} reads back differently from what was written; check the disk")
    if len(written.entries) != len(plan):
        raise UserError(f"{directory}: {len(written.entries)} tensors on disk, {len(plan)} were written")


def write_json(path: Path, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        _sync(file)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block succeeds."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a directory")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
        raise UserError(f"{target} has files but is no model directory; name an empty or a new directory")
    target = target.resolve()
    fresh, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # What a killed process left: half a new directory is worth nothing, a whole old one everything.
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)
        fresh.mkdir()
        yield fresh
        if target.is_dir():
            _carry_over(target, fresh)
        sync_folder(fresh)
        _swap(fresh, target, old)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or target}: {error.strerror or error}; {target} is as it was. "
            "Free some space or choose another directory"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _swap(fresh: Path, target: Path, old: Path) -> None:
    if not target.exists():
        os.rename(fresh, target)
        return
    # POSIX cannot rename over a directory with files in it, so the old one steps aside for an instant; `replacing`
    # brings it back if the process dies in that instant.
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(old, target)
        raise


def _carry_over(target: Path, fresh: Path) -> None:
    for path in target.iterdir():
        if path.name == INDEX or path.suffix == ".safetensors" or (fresh / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def _header(shard: list[Planned]) -> bytes:
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


def _bytes(tensor: Tensor):
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames durable; some file systems refuse, and then the rename is all there is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
