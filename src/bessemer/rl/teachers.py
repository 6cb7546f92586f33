"""Teachers of on-policy distillation: where their networks are placed, and what a step needs from them.

A single process holds every teacher whole, and the objective asks it for one micro-batch after another. On many ranks
the states of all micro-batches are computed before the step, by teachers that are

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
from bessemer.data.batch import Batch
from bessemer.dist import mesh, model_shard
from bessemer.dist.distributed import Network
from bessemer.dist.distributed_trainer import DistributedTrainer
from bessemer.dist.model_shard import ModelShard
from bessemer.dist.ranks import Ranks
from bessemer.hf import hub
from bessemer.hf.model_directory import is_own, load
from bessemer.model.transformer import TrainOutputs
from bessemer.train import setup
from bessemer.train.objective import teacher_states, with_states
from bessemer.train.trainer import Trainer


class Teachers:
    """`folders`: each teacher's model directory by name, in the order that `Batch.teacher` counts. Collective."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        student: Network | ModelShard,
        ranks: Ranks | None,
        say: Callable[[str], None],
    ) -> None:
        self.ranks = ranks
        self.placed = [_placed(name, folder, student, say) for name, folder in folders.items()]
        """None for a whole teacher that is on other ranks."""
        self.networks: tuple[Network, ...] = ()
        """For the objective; empty on ranks that compute no loss."""
        if not isinstance(student, ModelShard) or _computes_loss(student):
            modules = (one.model if isinstance(one, ModelShard) else one for one in self.placed)
            self.networks = tuple(module for module in modules if module is not None)

    @torch.no_grad()
    def teach(self, trainer: Trainer, batches: Sequence[Batch]) -> Sequence[Batch]:
        """This rank's micro-batches of a step, with their teachers' states if it computes their loss. Collective; all
        ranks pass the same batches."""
        if not isinstance(trainer, DistributedTrainer):
            return batches
        pipelines, index = trainer.by_pipeline(batches), trainer.shard.pipeline_index
        table, mine = trainer.shard.table(len(pipelines[index])), [*pipelines[index]]
        for lane in range(table.lanes - table.idle):
            places = range(lane * table.per_lane, (lane + 1) * table.per_lane)
            for number, teacher in enumerate(self.placed):
                asked = [[i for i in places if batches[i].teacher == number] for batches in pipelines]
                most = max(map(len, asked))
                if not most or teacher is None:
                    continue
                own = [mine[i].to(trainer.device) for i in asked[index]]
                if isinstance(teacher, ModelShard):
                    if teacher.exchange is not None:  # all pipelines take part in it
                        own += [mine[0].as_filler().to(trainer.device)] * (most - len(own))
                    found = model_shard.forward(teacher, own, _hidden, lane)[: len(asked[index])]
                elif trainer.shard.place[lane][-1] == trainer.mesh.pp:
                    found = [_asked(teacher, batch) for batch in own]
                else:
                    continue
                for i, states_BTD in zip(asked[index], found, strict=True):
                    if states_BTD is not None:
                        mine[i] = with_states(mine[i], states_BTD)
        if self.ranks is not None:
            self.ranks.meet("teachers")  # in a pipeline with a whole teacher, all ranks wait for it
        return mine


def _placed(
    name: str, folder: Path, student: Network | ModelShard, say: Callable[[str], None]
) -> Network | ModelShard | None:
    """A frozen teacher, whole or this rank's part of it; None if another rank has it whole."""
    dtype = setup.choose_precision("device").dtype
    if isinstance(student, ModelShard):
        unfit = _unfit(folder, student)
        if not unfit:
            cut = student.mesh.of(hub.read_config(folder).model_copy(update={"n_mtp": 0}))
            shard = ModelShard.read(folder, cut, student.schedule, student.device, mtp=False)
            shard.model.to_compute(dtype).eval().requires_grad_(False)
            return shard
        say(f'teacher "{name}" is whole on every rank that computes a loss: {unfit}')
        if not _computes_loss(student):
            return None
    return load(folder, dtype, setup.device(), mtp=False).eval().requires_grad_(False)


def _unfit(folder: Path, student: ModelShard) -> str | None:
    """Why a teacher cannot be cut like the student; None if it can."""
    if not is_own(folder):
        return "its model is of another family"
    layout, slices = student.mesh.layout, len(student.place[0]) // student.mesh.layout.pp
    return mesh.refusal(layout, mesh.headed(hub.read_config(folder)), layout.world, slices)


def _computes_loss(student: ModelShard) -> bool:
    return any(part.last for part in student.slices.values())


def _asked(teacher: Network, batch: Batch) -> Tensor:
    heartbeat.beat()
    return teacher_states(teacher, batch)


def _hidden(out: TrainOutputs, head_VD: Tensor, batch: Batch) -> Tensor:
    return out.hidden_BTD
