"""Reads a checkpoint by tensors and parts of them, whatever layout wrote it: for ranks that each need a share, and for
exports.

`checkpoint` describes the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bessemer.errors import UserError
from bessemer.model.moe import EXPERTS
from bessemer.train.checkpoint import PREFIXES, companion_name, is_sharded, read_json, verified_manifest
from bessemer.train.checkpoint_files import TensorFile


class _Location(NamedTuple):
    """Where a tensor is stored: a file, a key in it, and the elements [start, stop) under that key."""

    file: TensorFile
    key: str
    shape: tuple[int, ...]
    start: int
    stop: int


class CheckpointReader:
    """An open checkpoint of any layout, by the names of a sharded one. What is read is verified. Raises Damaged, or
    UserError for newer code."""

    def __init__(self, path: Path):
        self.path, sums = path, verified_manifest(path)["files"]
        self.locations: dict[str, _Location] = {}
        self._files = [TensorFile(path / name, sums[name]) for name in sums if name.endswith(".safetensors")]
        self._sharded = any(is_sharded(file.path.name) for file in self._files)
        for file in self._files:
            self._index(file)
        self.counters, self.config = (read_json(path, name, sums) for name in ("counters.json", "config.json"))

    @property
    def updates(self) -> int:
        """Steps that the optimizer has made."""
        return self.counters["updates"] if self._sharded else int(self.read(["steps"])["steps"])

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read and hashed so far."""
        return sum(file.bytes_read for file in self._files)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors with these names, in this order; UserError for a name that is missing."""
        found = {}
        for name in names:
            where = self.location(name)
            found[name] = where.file.read(where.key, where.start, where.stop).view(where.shape)
        return found

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start]: a part of a tensor's elements, in their order. Raises as `read` does."""
        where = self.location(name)
        return where.file.read(where.key, where.start + start, where.start + stop).view(-1)

    def location(self, name: str) -> _Location:
        """Where a tensor is stored; UserError if it is missing."""
        if name not in self.locations:
            raise UserError(
                f"the checkpoint {self.path} has no {name}; it belongs to another model, or to a run with other "
                "settings"
            )
        return self.locations[name]

    def _index(self, file: TensorFile) -> None:
        prefix = PREFIXES.get(file.path.stem)
        for key, (_, shape, *_) in file.entries.items():
            if prefix is None or EXPERTS not in key:
                self.locations[(prefix or "") + key] = _Location(file, key, shape, 0, math.prod(shape))
                continue
            size = math.prod(shape[1:])
            for row in range(shape[0]):
                self.locations[f"{prefix}{key}/{row}"] = _Location(file, key, shape[1:], row * size, (row + 1) * size)


class CompanionReader:
    """Reads a companion's tensors, by the names they would have in a checkpoint of its own."""

    def __init__(self, reader: CheckpointReader, companion: str):
        self.reader, self.companion = reader, companion

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        found = self.reader.read([companion_name(self.companion, name) for name in names])
        return dict(zip(names, found.values(), strict=True))

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        return self.reader.elements(companion_name(self.companion, name), start, stop)

    def location(self, name: str) -> _Location:
        return self.reader.location(companion_name(self.companion, name))
