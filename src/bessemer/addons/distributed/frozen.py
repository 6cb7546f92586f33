"""Frozen networks on many ranks: RL's reference (`ShardedCopy`), and teachers of on-policy distillation.

Teachers: where their networks are placed, and what a step needs from them.

The states of all micro-batches are computed before the step, by teachers that are

    cut       over pipeline and expert-parallel ranks, as the student is: those of our own family, if the layout fits
    whole     on every rank that computes a loss, the last of a pipeline (both ends with DualPipe), while the others of
              the pipeline wait: teachers of another architecture, and those that the layout does not fit

All are frozen, in BF16 on a GPU. A cut teacher takes 1 / (pp ep) of its weights per rank, twice that with DualPipe;
data-parallel ranks have copies. Where the loss is computed, states take D numbers for every token of a pipeline's
micro-batches, padding included. The last stages of student and teacher are on the same ranks, so the head that reads
the states is there.

Legend: B rows, T tokens per row, D hidden size of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bessemer import heartbeat
from bessemer.addons.distributed import mesh, model_shard, whole
from bessemer.addons.distributed.collective import of_ranks
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.addons.distributed.ranks import Ranks
from bessemer.data.batch import Batch
from bessemer.hf import deepseek
from bessemer.hf.model_directory import is_own
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import TrainOutputs
from bessemer.train import setup
from bessemer.train.collective import Read
from bessemer.train.objective import teacher_states, with_states
from bessemer.train.runtime import Frozen, FrozenCopy
from bessemer.train.trainer import Trainer


class FrozenOnRanks(Frozen):
    """`Frozen` networks (`train.runtime`) of model directories by name, in the order that `Batch.teacher` counts.
    Collective."""

    def __init__(
        self, folders: Mapping[str, Path], student: ModelShard, ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        self.ranks = ranks
        self.placed = [_placed(name, folder, student, say) for name, folder in folders.items()]
        """None for a whole teacher that is on other ranks."""
        self.networks: tuple[LanguageModel, ...] = ()
        if _computes_loss(student):
            modules = (network.model if isinstance(network, ModelShard) else network for network in self.placed)
            self.networks = tuple(module for module in modules if module is not None)

    @torch.no_grad()
    def read(self, trainer: Trainer, batches: Sequence[Batch]) -> Sequence[Batch]:
        among = of_ranks(trainer)
        pipelines, index = among.by_pipeline(batches), among.pipeline
        table, shares = among.shard.table(len(pipelines[index])), [*pipelines[index]]
        for lane in range(table.lanes - table.idle):
            places = range(lane * table.per_lane, (lane + 1) * table.per_lane)
            for number, teacher in enumerate(self.placed):
                read_by = [[i for i in places if batches[i].teacher == number] for batches in pipelines]
                most = max(map(len, read_by))
                if not most or teacher is None:
                    continue
                own = [shares[i].to(trainer.device) for i in read_by[index]]
                if isinstance(teacher, ModelShard):
                    if teacher.exchange is not None:  # all pipelines take part in it
                        own += [shares[0].as_filler().to(trainer.device)] * (most - len(own))
                    states = model_shard.forward(teacher, own, _hidden, lane)[: len(read_by[index])]
                elif among.shard.place[lane][-1] == among.mesh.pp:
                    states = [_asked(teacher, batch) for batch in own]
                else:
                    continue
                for i, states_BTD in zip(read_by[index], states, strict=True):
                    if states_BTD is not None:
                        shares[i] = with_states(shares[i], states_BTD)
        self.ranks.meet("teachers")  # in a pipeline with a whole teacher, all ranks wait for it
        return shares


class ShardedCopy(FrozenCopy):
    """`FrozenCopy` of a network that is divided over the ranks: each has as much of it as of the trained one."""

    def __init__(self, trainer: Trainer, read: Read) -> None:
        self.shard = of_ranks(trainer).shard.frozen_copy()
        super().__init__(trainer, read)

    def _copy(self) -> LanguageModel:
        return self.shard.model

    def load(self, folder: Path) -> None:
        self.shard.load(folder)

    def save(self, folder: Path) -> None:
        whole.save(self.shard, folder)

    def outputs(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        return model_shard.of_step(self.shard, [batch.unrouted() for batch in batches], self._read)


def _placed(
    name: str, folder: Path, student: ModelShard, say: Callable[[str], None]
) -> LanguageModel | ModelShard | None:
    """A frozen teacher, whole or this rank's part of it; None if another rank has it whole."""
    if not (unfit := _unfit(folder, student)):
        cut = student.mesh.of(deepseek.read_config(folder).model_copy(update={"n_mtp": 0}))
        shard = ModelShard.read(folder, cut, student.schedule, student.device, mtp=False)
        shard.model.to_compute(setup.choose_precision("device").dtype).eval().requires_grad_(False)
        return shard
    say(f'teacher "{name}" is whole on every rank that computes a loss: {unfit}')
    return setup.load_frozen(folder) if _computes_loss(student) else None


def _unfit(folder: Path, student: ModelShard) -> str | None:
    """Why a teacher cannot be cut like the student; None if it can."""
    if not is_own(folder):
        return "its model is of another family"
    layout, slices = student.mesh.layout, len(student.place[0]) // student.mesh.layout.pp
    return mesh.refusal(layout, mesh.headed(deepseek.read_config(folder)), layout.world, slices)


def _computes_loss(student: ModelShard) -> bool:
    return any(part.last for part in student.slices.values())


def _asked(teacher: LanguageModel, batch: Batch) -> Tensor:
    heartbeat.beat()
    return teacher_states(teacher, batch)


def _hidden(out: TrainOutputs, head_VD: Tensor, batch: Batch) -> Tensor:
    return out.hidden_BTD
