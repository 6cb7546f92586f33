"""Checkpoints of many ranks: every rank writes and reads its own share, whatever layout wrote them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.addons.accelerate.background import HostCopies
from bessemer.addons.distributed import sharded_checkpoint
from bessemer.addons.distributed.checkpoint_reader import CheckpointReader, CompanionReader, companion_name, stacked
from bessemer.train import checkpoint, guard
from bessemer.train.checkpoint_files import Damaged
from bessemer.train.checkpointed import Checkpointed, CheckpointStore

if TYPE_CHECKING:
    from bessemer.addons.distributed.mesh import Mesh
    from bessemer.addons.distributed.model_shard import ModelShard
    from bessemer.addons.distributed.zero1 import Zero1

Result = TypeVar("Result")


class Sharded(Protocol):
    """What a store reads of its collective."""

    shard: ModelShard
    mesh: Mesh

    @property
    def zero1(self) -> Zero1: ...

    def all_gather(self, text: str) -> list[str]: ...


class RankStore(CheckpointStore):
    """One rank's store. Collective."""

    def __init__(self, trainer: Checkpointed, collective: Sharded) -> None:
        super().__init__(trainer)
        self.collective, self.mesh = collective, collective.mesh
        self._saver = sharded_checkpoint.Saver(self.folder, trainer.model_config, trainer.plan.keep)
        self._copies = HostCopies()

    @property
    def busy(self) -> bool:
        return self._saver.background.busy

    @property
    def seconds(self) -> float:
        return self._saver.background.seconds

    def poll(self) -> None:
        """Nothing: an error of a write is raised where all ranks wait for it."""

    def finish(self) -> None:
        self._saver.finish()

    def close(self) -> None:
        """Does not wait: all ranks write together, and after an error others may never come."""

    def write(self, trainer: Checkpointed) -> Path:
        """Returns as soon as the copies are under way."""
        self.finish()  # frees the buffer
        self._copies.begin()
        random_tensors, random_values = guard.capture_rng(trainer.generators)
        counters = trainer.counters() | {"updates": trainer.optimizer.steps, "rng": random_values}
        counters |= {"extras": trainer.extras}
        tensors = self.collective.zero1.pieces(self._copies.add)
        if self.mesh.dp == self.mesh.ep == self.mesh.cp == 0:
            tensors |= {name: self._copies.add(tensor) for name, tensor in self._own_gate_tensors(trainer).items()}
        if self.mesh.me == 0:
            tensors |= {f"rng/{name}": tensor for name, tensor in random_tensors.items()}
            tensors |= {f"extras/{name}": self._copies.add(tensor) for name, tensor in trainer.extra_tensors.items()}
        for name, companion in trainer.companions.items():
            companion_pieces = _pieces(companion, self._copies.add)
            tensors |= {companion_name(name, key): tensor for key, tensor in companion_pieces.items()}
        copied = None
        if trainer.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return self._saver.save(trainer.step, tensors, counters, copied)

    def _own_gate_tensors(self, trainer: Checkpointed) -> dict[str, Tensor]:
        """The gate tensors that no earlier pipeline rank writes."""
        own = {}
        for name, tensor in trainer.gate_tensors().items():
            if _is_first(self.collective, parameter_prefix(name.partition("/")[2])):
                own[name] = tensor
        return own

    def restore(self, trainer: Checkpointed) -> Path | None:
        """Goes back to the newest checkpoint in which every rank's tensors are undamaged."""
        if self.mesh.me == 0:
            checkpoint.sweep(self.folder)
        dist.barrier()
        paths = checkpoint.steps(self.folder)
        for path in reversed(paths):
            reader, damage = self._undamaged(partial(CheckpointReader, path))
            if reader is not None:
                checkpoint.check_config(reader.config, trainer.model_config, path)
                restored, damage = self._undamaged(partial(self._restore_from, trainer, reader))
                for restored_trainer in restored or ():
                    restored_trainer.optimizer.refresh()
                if restored is not None:
                    return path
            trainer.warn(f"checkpoint {path} is damaged ({damage}); trying the one before it")
        if paths:
            raise checkpoint.none_intact(self.folder, len(paths))
        return None

    def _undamaged(self, work: Callable[[], Result]) -> tuple[Result | None, str]:
        """(the result of `work`, "") if no rank meets damage in it, else (None, what the first of them met)."""
        result, damage = None, ""
        try:
            result = work()
        except Damaged as error:
            damage = str(error)
        damage = next(filter(None, self.collective.all_gather(damage)), "")
        return (None if damage else result), damage

    @torch.no_grad()
    def _restore_from(self, trainer: Checkpointed, reader: CheckpointReader) -> list[Checkpointed]:
        """Reads what this rank needs. Returns the trainers whose weights must then be exchanged, once no rank has met
        damage."""
        self.collective.zero1.load_pieces(reader)
        gates = trainer.gate_tensors()
        for name, value in reader.read(gates).items():
            gates[name].copy_(value)
        trainer.restore_counters(reader.counters)
        trainer.optimizer.steps = reader.updates
        companions = trainer.companions
        stored = {
            name: companion
            for name, companion in companions.items()  # all, unless the checkpoint is from before the first step
            if reader.counters["step"] or companion.step or companion_name(name, "steps") in reader.locations
        }
        for name, companion in stored.items():
            companion_reader, biases = CompanionReader(reader, name), _biases(companion)
            _collective(companion).zero1.load_pieces(companion_reader)
            companion.optimizer.steps = int(companion_reader.read(["steps"])["steps"])
            for key, value in companion_reader.read(biases).items():
                biases[key].copy_(value)
        for companion in companions.values():
            companion.step = trainer.step
        elsewhere = tuple(f"extras/{name}/" for name in companions)
        extras = [n for n in reader.locations if n.startswith("extras/") and not n.startswith(elsewhere)]
        own = stacked(reader.read(extras))
        trainer.extra_tensors = {name.removeprefix("extras/"): tensor for name, tensor in own.items()}
        trainer.extras = reader.counters["extras"]
        states = [name for name in reader.locations if name.startswith("rng/")]
        tensors = {name.removeprefix("rng/"): t for name, t in reader.read(states).items()}
        guard.restore_rng(tensors, reader.counters["rng"], trainer.generators)
        return [trainer, *stored.values()]


def parameter_prefix(gate: str) -> str:
    """The prefix of the names of the parameters in a gate's layer."""
    return f"mtp.{gate[3:]}." if gate.startswith("mtp") else f"layers.{gate}."


def _collective(trainer: Checkpointed) -> Sharded:
    return trainer.collective


def _is_first(collective: Sharded, name: str) -> bool:
    """Whether no earlier pipeline rank holds the parameter of this name."""
    return collective.mesh.pp < min(collective.shard.others(name), default=math.inf)


def _pieces(companion: Checkpointed, copy: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of a companion that this rank writes."""
    collective = _collective(companion)
    pieces, mesh = collective.zero1.pieces(copy), collective.mesh
    if mesh.dp == mesh.ep == mesh.cp == 0:
        own = {n: b for n, b in _biases(companion).items() if _is_first(collective, n.removeprefix("model/"))}
        pieces |= {name: copy(bias_E) for name, bias_E in own.items()}
    return pieces | ({"steps": torch.tensor(companion.optimizer.steps)} if mesh.me == 0 else {})


def _biases(trainer: Checkpointed) -> dict[str, Any]:
    return {f"model/{name}": bias_E for name, bias_E in trainer.model.named_buffers() if name.endswith("bias_E")}
