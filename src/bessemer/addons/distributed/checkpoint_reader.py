"""Reads a checkpoint by tensors and parts of them, whatever layout wrote it: for ranks that each need a share, and for
exports.

`train.checkpoint` describes the format. A sharded checkpoint stores every tensor whole under its name in the whole
network, and a routed expert under its own number (`model/layers.3.ffn.experts.w13/17`), so that nothing in a file
depends on the layout that wrote it. Beside each file lie the digests of its chunks (`chunked_files`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.addons.distributed.chunked_files import ChunkedFile
from bessemer.errors import UserError
from bessemer.model.moe import EXPERTS
from bessemer.train.checkpoint import State, is_sharded, read_json, verified_manifest

DCP_INDEX = ".metadata"
"""What a checkpoint of FSDP2's ranks has beside their files."""
PREFIXES = {"model": "model/", "optimizer": "", "gates": "", "rng": "rng/", "extras": "extras/"}
"""File stem of one process's checkpoint -> prefix of its tensors' names in a sharded one."""


class _Location(NamedTuple):
    """Where a tensor is stored: a file, a key in it, and the elements [start, stop) under that key."""

    file: ChunkedFile
    key: str
    shape: tuple[int, ...]
    start: int
    stop: int


class CheckpointReader:
    """An open checkpoint of any layout, by the names of a sharded one. What is read is verified. Raises Damaged, or
    UserError for another format."""

    def __init__(self, path: Path):
        self.path, sums = path, verified_manifest(path)["files"]
        self.locations: dict[str, _Location] = {}
        self._files = [ChunkedFile(path / name, sums[name]) for name in sums if name.endswith(".safetensors")]
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
        values = {}
        for name in names:
            where = self.location(name)
            values[name] = where.file.read(where.key, where.start, where.stop).view(where.shape)
        return values

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

    def _index(self, file: ChunkedFile) -> None:
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
        tensors = self.reader.read([companion_name(self.companion, name) for name in names])
        return dict(zip(names, tensors.values(), strict=True))

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        return self.reader.elements(companion_name(self.companion, name), start, stop)

    def location(self, name: str) -> _Location:
        return self.reader.location(companion_name(self.companion, name))


def open_sharded(path: Path) -> State:
    """A checkpoint of many ranks as one process reads it (the hook `sharded-state`): its tensors are read, and
    verified, when asked for."""
    sums = verified_manifest(path)["files"]
    if DCP_INDEX in sums:
        from bessemer.addons.distributed.dcp_reader import open_dcp  # torch's own takes a second to import

        return open_dcp(path, sums)
    reader = CheckpointReader(path)
    parts: dict[str, dict[str, Callable[[], Tensor]]] = {stem: {} for stem in PREFIXES}
    for key, location in reader.locations.items():
        kind = key.partition("/")[0]
        stem = kind if kind in ("model", "rng", "extras") else "gates" if kind in ("bias", "load") else "optimizer"
        parts[stem][key.removeprefix(PREFIXES[stem])] = partial(location.file.read, location.key)
    parts["optimizer"]["steps"] = partial(torch.tensor, reader.counters.pop("updates"))
    return State({stem: _Stored(_stacks(reads)) for stem, reads in parts.items()}, reader.counters, reader.config)


class _Stored(Mapping[str, Tensor]):
    """Tensors in files, each read by its function when asked for."""

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]):
        self._reads = reads

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def companion_name(companion: str, name: str) -> str:
    """The name of a companion's tensor in the checkpoint that holds its state (`Checkpointed.companions`)."""
    return f"extras/{companion}/{name if name.startswith('model/') else f'optimizer/{name}'}"


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks the experts that a sharded checkpoint stores one by one."""
    reads = _stacks({name: partial(lambda tensor: tensor, tensor) for name, tensor in tensors.items()})
    return {name: read() for name, read in reads.items()}


def _stacks(reads: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """The same with the experts of a matrix as one tensor."""
    experts: dict[str, dict[int, Callable[[], Tensor]]] = {}
    others = {}
    for name, read in reads.items():
        if expert := re.fullmatch(rf"(.*{re.escape(EXPERTS)}.*)/(\d+)", name):
            experts.setdefault(expert[1], {})[int(expert[2])] = read
        else:
            others[name] = read
    return others | {name: partial(_stack, [of[i] for i in range(len(of))]) for name, of in experts.items()}


def _stack(reads: Sequence[Callable[[], Tensor]]) -> Tensor:
    return torch.stack([read() for read in reads])
