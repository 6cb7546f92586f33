"""Checkpoints of FSDP2's ranks by torch.distributed.checkpoint (DCP): every rank writes its shards while training goes
on, and any number of ranks, or one process without FSDP2, resumes from them.

    state/step-00000123/.metadata  rank-00000-0.distcp ...  counters.json  config.json  manifest.json

The manifest and its checksums are those of `train.checkpoint`: a checkpoint is complete or absent. Names in DCP are
those of a one-process checkpoint, STEM/NAME. What all ranks have alike (random states, `extra_tensors`) rank 0 writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from bessemer.addons.accelerate.background import Background
from bessemer.addons.distributed.dcp_reader import METADATA, DCPTensors
from bessemer.addons.distributed.fsdp import own_part
from bessemer.addons.distributed.sharded_checkpoint import AllOrNone
from bessemer.errors import UserError
from bessemer.train import checkpoint, guard
from bessemer.train.checkpoint import State
from bessemer.train.checkpoint_files import Damaged, write_synced
from bessemer.train.checkpointed import CheckpointStore

if TYPE_CHECKING:
    from bessemer.train.checkpointed import Checkpointed

SUFFIX = ".distcp"


class FSDPStore(CheckpointStore):
    """One rank's store. Collective."""

    def __init__(self, trainer: Checkpointed) -> None:
        super().__init__(trainer)
        self._together, self._background = AllOrNone(self.folder), Background("saving")

    @property
    def busy(self) -> bool:
        return self._background.busy

    @property
    def seconds(self) -> float:
        return self._background.seconds

    def poll(self) -> None:
        """Nothing: an error of a write is raised where all ranks wait for it."""

    def finish(self) -> None:
        self._background.finish()

    def close(self) -> None:
        """Does not wait: all ranks write together, and after an error others may never come."""

    def write(self, trainer: Checkpointed) -> Path:
        """Returns as soon as the shards are copied."""
        self.finish()
        step, temporary = trainer.step, self._together.temporary(trainer.step)
        random_tensors, random_values = guard.capture_rng(trainer.generators)
        counters = checkpoint.as_json(trainer.counters() | {"rng": random_values, "extras": trainer.extras})
        tensors = _named(trainer)
        if dist.get_rank() == 0:
            tensors |= {f"rng/{name}": tensor for name, tensor in random_tensors.items()}
            tensors |= {f"extras/{name}": tensor for name, tensor in trainer.extra_tensors.items()}
        self._together(partial(_begin, temporary) if dist.get_rank() == 0 else None, step)
        pending = cast(
            Future, dcp.async_save(tensors, storage_writer=_Writer(temporary), process_group=self._together.group)
        )

        def write() -> None:
            failure = ""
            try:
                pending.result()
            except CheckpointException as error:  # raised on all ranks, with what failed on each
                own, _ = error.failures.get(dist.get_rank(), (None, None))
                failure = "" if own is None else _last_line(own)
            except Exception as error:
                failure = _last_line(error)
            mine = f"rank-{dist.get_rank():05d}-*{SUFFIX}"
            sums = self._together(lambda: _sums(temporary.glob(mine), failure), step)
            finish = partial(_seal, temporary, trainer.model_config, step, counters, sums, trainer.plan.keep)
            self._together(finish if dist.get_rank() == 0 else None, step)

        self._background.begin(write)
        return self.folder / f"step-{step:08d}"

    def restore(self, trainer: Checkpointed) -> Path | None:
        """Goes back to the newest checkpoint that every rank finds undamaged, whatever layout wrote it."""
        self._together(partial(checkpoint.sweep, self.folder) if dist.get_rank() == 0 else None, trainer.step)
        paths = checkpoint.steps(self.folder)
        for path in reversed(paths):
            damage = ""
            try:
                state = checkpoint.open_state(path)
                checkpoint.check_config(state.config, trainer.model_config, path)
                _load(trainer, state)
            except Damaged as error:
                damage = str(error)
            damages: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(damages, damage, group=self._together.group)
            if not any(damages):
                trainer.optimizer.refresh()
                return path
            trainer.warn(f"checkpoint {path} is damaged ({next(filter(None, damages))}); trying the one before it")
        if paths:
            raise checkpoint.none_intact(self.folder, len(paths))
        return None


class _Writer(FileSystemWriter):
    """DCP's own writer, whose files have the names by which a checkpoint of many ranks is known."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=_StoragePrefix(f"rank-{rank:05d}-")) for rank, plan in enumerate(plans)]


def _named(trainer: Checkpointed) -> dict[str, Tensor]:
    """The tensors of a checkpoint that change in training, by their names in it."""
    model = trainer.optimizer.masters() | trainer._buffers()
    stems = {"model": model, "optimizer": trainer.optimizer.state_dict()}
    return {f"{stem}/{name}": tensor for stem, tensors in stems.items() for name, tensor in tensors.items()}


def _begin(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(temporary.parent)
    temporary.mkdir()


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _sums(files: Iterator[Path], failure: str) -> dict[str, str]:
    """The SHA-256 of every file that this rank wrote."""
    if failure:
        raise OSError(failure)
    return {file.name: _sha256(file) for file in sorted(files)}


def _seal(
    temporary: Path, config: dict[str, Any], step: int, counters: bytes, sums: list[dict[str, str]], keep: int
) -> None:
    files = {name: digest for own in sums for name, digest in own.items()}
    files[METADATA] = _sha256(temporary / METADATA)
    for name, text in (("counters.json", counters), ("config.json", json.dumps(config, indent=1).encode())):
        files[name] = write_synced(temporary / name, text)
    checkpoint.seal(temporary, step, files)
    checkpoint.put_in_place(temporary, temporary.parent, step, keep)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def _load(trainer: Checkpointed, state: State) -> None:
    """Reads this rank's shards, and what all ranks have alike."""
    model = trainer.optimizer.masters() | trainer._buffers()
    for stem, own in (("model", model), ("optimizer", trainer.optimizer.state_dict())):
        stored = state.tensors[stem]
        for name in [*own, *stored]:
            if name not in stored or name not in own:
                side = "lacks" if name not in stored else "has an unknown"
                raise UserError(
                    f"the checkpoint {side} {stem} tensor {name!r}; it belongs to another model or settings"
                )
        for name, tensor in own.items():
            _read(stored, name, tensor, stem)
        if stem == "optimizer":
            trainer.optimizer.steps = int(stored["steps"])
    guard.restore_rng(dict(state.tensors["rng"]), state.counters["rng"], trainer.generators)
    trainer.extra_tensors = dict(state.tensors["extras"])
    trainer.extras = state.counters["extras"]
    trainer.restore_counters(state.counters)


def _read(stored: Mapping[str, Tensor], name: str, tensor: Tensor, stem: str) -> None:
    if isinstance(tensor, DTensor):
        shard = tensor.to_local()
        if isinstance(stored, DCPTensors):
            record = stored.records[name]
            _check(stem, name, (tuple(record.size), record.properties.dtype), tensor)
            stored.into(name, tensor)
        else:
            value = stored[name]
            _check(stem, name, (tuple(value.shape), value.dtype), tensor)
            shard.copy_(own_part(value, tensor))
    else:
        value = stored[name]
        _check(stem, name, (tuple(value.shape), value.dtype), tensor)
        tensor.copy_(value)


def _check(stem: str, name: str, saved: tuple[tuple[int, ...], torch.dtype], tensor: Tensor) -> None:
    here = (tuple(tensor.shape), tensor.dtype)
    if saved != here:
        raise UserError(
            f"{stem} tensor {name!r}: {saved[0]} {saved[1]} in the checkpoint, {here[0]} {here[1]} in this run"
        )
