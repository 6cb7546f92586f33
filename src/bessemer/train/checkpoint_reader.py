"""Reads a checkpoint tensor by tensor, whatever layout wrote it: for ranks that each need a part, and for exports.

`checkpoint` describes the format.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from bessemer.errors import UserError
from bessemer.model.moe import EXPERTS
from bessemer.train.checkpoint import (
    PREFIXES,
    Damaged,
    companion_name,
    is_sharded,
    read_json,
    verified_manifest,
    verify,
)


class _Location(NamedTuple):
    """Where a tensor is stored: a file, a key in it, and the row if experts are stacked."""

    file: str
    key: str
    row: int | None


class CheckpointReader:
    """An open checkpoint of any layout, by the names of a sharded one. Raises Damaged, or UserError for newer code."""

    def __init__(self, path: Path):
        self.path, self._sums = path, verified_manifest(path)["files"]
        self._verified: set[str] = set()
        self.locations: dict[str, _Location] = {}
        for file in (file for file in self._sums if file.endswith(".safetensors")):
            self._index(file)
        self.counters, self.config = (read_json(path, name) for name in ("counters.json", "config.json"))

    @property
    def updates(self) -> int:
        """Steps that the optimizer has made."""
        sharded = any(map(is_sharded, self._sums))
        return self.counters["updates"] if sharded else int(self.read(["steps"])["steps"])

    def verify(self, names: Iterable[str]) -> None:
        """Raises Damaged unless the files with these tensors are intact, UserError for a name that is missing."""
        for file in {self._location(name).file for name in names}:
            self._verify(file)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors with these names, in this order. Files are verified when first read; UserError for a name that is
        missing."""
        names = list(names)
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._location(name).file, []).append(name)
        tensors = {}
        for file, inside in by_file.items():
            self._verify(file)
            with _open(self.path / file) as opened:
                for name in inside:
                    _, key, row = self.locations[name]
                    tensors[name] = opened.get_tensor(key) if row is None else opened.get_slice(key)[row]
        return {name: tensors[name] for name in names}

    def _location(self, name: str) -> _Location:
        if name not in self.locations:
            raise UserError(
                f"the checkpoint {self.path} has no {name}; it belongs to another model, or to a run with other "
                "settings"
            )
        return self.locations[name]

    def _verify(self, file: str) -> None:
        if file not in self._verified:
            verify(self.path, file, self._sums[file])
            self._verified.add(file)

    def _index(self, file: str) -> None:
        with _open(self.path / file) as opened:
            prefix = PREFIXES.get(Path(file).stem)
            for key in opened.keys():  # noqa: SIM118 (no dictionary)
                if prefix is None:
                    self.locations[key] = _Location(file, key, None)
                elif EXPERTS in key:
                    for row in range(opened.get_slice(key).get_shape()[0]):
                        self.locations[f"{prefix}{key}/{row}"] = _Location(file, key, row)
                else:
                    self.locations[prefix + key] = _Location(file, key, None)


class CompanionReader:
    """Reads a companion's tensors, by the names they would have in a checkpoint of its own."""

    def __init__(self, reader: CheckpointReader, companion: str):
        self.reader, self.companion = reader, companion

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        found = self.reader.read([companion_name(self.companion, name) for name in names])
        return dict(zip(names, found.values(), strict=True))


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # the library's own type
        raise Damaged(f"{path.name}: {error}") from error
