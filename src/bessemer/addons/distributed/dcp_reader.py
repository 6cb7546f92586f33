"""Reads checkpoints of torch.distributed.checkpoint (DCP), from any program that wrote them.

A DCP checkpoint describes itself in a pickle, `.metadata`. The unpickler here creates only DCP's own records, so a
hostile pickle cannot run code. `open_dcp` reads those that ranks of FSDP2 write in training (`fsdp_checkpoint`).
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from bessemer.data.model_files import read_bytes
from bessemer.errors import UserError
from bessemer.train import checkpoint
from bessemer.train.checkpoint import State
from bessemer.train.checkpoint_files import Damaged, verify

METADATA = ".metadata"
RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # their name in Python 3.13
}  # fmt: skip
"""The classes that a `.metadata` file may name."""
MOST = 1 << 28
"""Largest `.metadata` file that is read, in bytes."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no DCP checkpoint needs")


class DCPReader(FileSystemReader):
    """DCP's own reader, given metadata read by `read_metadata`."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.metadata.storage_meta = self.metadata.storage_meta or StorageMeta()
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


def read_metadata(folder: Path) -> Metadata:
    """Names, shapes and locations of a DCP checkpoint's tensors. Raises UserError if the file is damaged or would run
    code."""
    path = folder / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(read_bytes(path, MOST))).load()
        tensors = [entry for entry in metadata.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
        shapes = [(tuple(entry.size), entry.properties.dtype, len(entry.chunks)) for entry in tensors]
        places = {name for info in metadata.storage_data.values() for name in [str(info.relative_path)]}
    except UserError:
        raise
    except Exception as error:  # an unpickler can raise anything
        raise UserError(f"{path} is not a readable DCP checkpoint: {error}") from None
    if outside := [name for name in places if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"{path} places tensors outside its folder, in {outside[0]}; it is damaged or hostile")
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in shapes)
    there = sum(file.stat().st_size for file in folder.rglob("*.distcp") if file.is_file())
    if size > there:
        raise UserError(
            f"{path} declares {size:,} bytes of tensors, but the files beside it hold {there:,}; copy it again"
        )
    assert isinstance(metadata, Metadata), "it has the fields of one"
    return metadata


@contextmanager
def alone() -> Iterator[None]:
    """Suppresses DCP's warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class DCPFiles:
    """The files of a DCP checkpoint, verified before the first tensor is read."""

    def __init__(self, path: Path, sums: Mapping[str, Any]) -> None:
        self.path, self.sums = path, sums

    @cached_property
    def metadata(self) -> Any:
        for name in self.sums:
            verify(self.path / name, self.sums[name])
        return read_metadata(self.path)

    def read(self, tensors: dict[str, Tensor]) -> None:
        try:
            with alone():
                dcp.load(tensors, storage_reader=DCPReader(self.path, self.metadata), no_dist=True)
        except (Exception, CheckpointException) as error:
            raise Damaged(f"{next(iter(tensors))}: {str(error).strip().splitlines()[-1]}") from error


class DCPTensors(Mapping[str, Tensor]):
    """The tensors of a stem of a DCP checkpoint, each read when asked for. Raises Damaged for a changed file."""

    def __init__(self, files: DCPFiles, stem: str) -> None:
        self.files, self.stem = files, stem

    @cached_property
    def records(self) -> dict[str, TensorStorageMetadata]:
        return {
            key.removeprefix(f"{self.stem}/"): record
            for key, record in self.files.metadata.state_dict_metadata.items()
            if key.startswith(f"{self.stem}/") and isinstance(record, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        record = self.records[name]
        tensor = torch.empty(record.size, dtype=record.properties.dtype)
        self.files.read({f"{self.stem}/{name}": tensor})
        return tensor

    def into(self, name: str, tensor: Tensor) -> None:
        """Reads the part that a shard holds into it."""
        self.files.read({f"{self.stem}/{name}": tensor})

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def open_dcp(path: Path, sums: Mapping[str, Any]) -> State:
    """A checkpoint of FSDP2's ranks as one process reads it."""
    files = DCPFiles(path, {name: digest for name, digest in sums.items() if not name.endswith(".json")})
    stems = {stem: DCPTensors(files, stem) for stem in ("model", "optimizer", "gates", "rng", "extras")}
    return State(stems, *(checkpoint.read_json(path, name, sums) for name in ("counters.json", "config.json")))
