"""What the ranks of FSDP2 do together: every rank is a pipeline of its own, and all have equally many micro-batches,
because each forward and backward gathers weights from all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.fsdp import ShardedModel
from bessemer.addons.distributed.fsdp_checkpoint import FSDPStore
from bessemer.addons.distributed.fsdp_optimizer import ShardedAdamW
from bessemer.addons.distributed.model_shard import rows_of
from bessemer.addons.distributed.rank_sums import RankSums, added
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.train.checkpointed import Checkpointed, CheckpointStore
from bessemer.train.collective import Collective, Read, output_of
from bessemer.train.loss import heldout_nats
from bessemer.train.objective import Loss, Sums
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.model.transformer import Transformer


class FSDPCollective(RankSums):
    """One rank's `Collective` (`train.collective`) of a `ShardedModel` model."""

    def __init__(self, sharded: ShardedModel) -> None:
        super().__init__()
        self.sharded, self.device = sharded, sharded.device
        self.devices = self.n_pipelines = dist.get_world_size()
        self.me = self.pipeline = dist.get_rank()

    def optimizer(self, model: LanguageModel, workers: Workers, **options: Any) -> ShardedAdamW:
        return ShardedAdamW(self.sharded, **options)

    def join(self, trainer: Checkpointed) -> None:
        self.trainer = trainer

    def store(self, trainer: Checkpointed) -> CheckpointStore:
        return FSDPStore(trainer)

    def parts(self, n_rows: int, size: int) -> Iterator[range]:
        micro = max(1, math.ceil(n_rows / (self.n_pipelines * size)))
        yield from rows_of(n_rows, self.n_pipelines, self.pipeline, micro)

    def numbers_by_pipeline(self, count: int) -> list[list[int | None]]:
        micro = max(1, math.ceil(count / self.n_pipelines))
        filled = [*range(count), *[None] * (self.n_pipelines * micro - count)]
        return [filled[start : start + micro] for start in range(0, len(filled), micro)]

    def mine(self, batches: Sequence[Batch]) -> list[Batch]:
        numbers = self.numbers_by_pipeline(len(batches))[self.pipeline]
        return [batches[0].as_filler() if number is None else batches[number] for number in numbers]

    def accumulate(self, micro_batches: Iterable[Batch], terms: dict[str, float]) -> Sums:
        watchdog.at(self.trainer.step + 1)
        batches: list[Batch] = []
        losses: list[Loss] = []
        for batch in micro_batches:
            batches.append(batch)
            with watchdog.waiting("layers of the other ranks", range(self.devices)):
                losses.append(self._gradients((batch, terms)))
        return self._sums(batches, losses)

    def _sums(self, batches: list[Batch], losses: list[Loss]) -> Sums:
        names, peak_names = [*losses[0].metrics], [*losses[0].peaks]
        rows, tokens = map(sum, zip(*(batch.counted for batch in batches), strict=True))

        def summed(of: Callable[[Loss], Tensor]) -> float:
            return added(float(of(loss)) for loss in losses)

        total, divisor, weight, all_tokens, all_rows, stop, due, *metrics = self._reduced(
            [
                summed(lambda loss: loss.total), summed(lambda loss: loss.tokens),
                summed(lambda loss: loss.tokens if loss.weight is None else loss.weight), tokens, rows,
                self.trainer.asked_to_stop(), self.me == 0 and self.trainer.due_by_time(),
                *(added(float(loss.metrics[name]) for loss in losses) for name in names),
            ],
            dist.ReduceOp.SUM,
        )  # fmt: skip
        self._stopping, self._due = stop > 0, due > 0
        values = {f"train/{name}": value / weight for name, value in zip(names, metrics, strict=True)} if weight else {}
        if peak_names:
            peaks = [max(float(loss.peaks[name]) for loss in losses) for name in peak_names]
            highest = self._reduced(peaks, dist.ReduceOp.MAX)
            values |= {f"train/{name}": value for name, value in zip(peak_names, highest, strict=True)}
        return Sums(batches, losses, divisor, int(all_tokens), int(all_rows), math.isfinite(total), values)

    def outputs(self, batches: Sequence[Batch], read: Read, sizes: Sequence[int]) -> list[Tensor]:
        numbers = self.numbers_by_pipeline(len(batches))[self.pipeline]
        pairs = zip(numbers, self.own_outputs(self.mine(batches), read), strict=True)
        return self.exchanged({number: value for number, value in pairs if number is not None}, sizes)

    def own_outputs(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        with watchdog.waiting("layers of the other ranks", range(self.devices)):
            return [self._output(read, batch) for batch in batches]

    def _output(self, read: Read, batch: Batch) -> Tensor:
        return output_of(self.sharded.model, read, batch)

    def chosen_experts(self, batch: Batch) -> Tensor:
        with watchdog.waiting("layers of the other ranks", range(self.devices)):
            return super().chosen_experts(batch)

    def nats(self, batches: Sequence[Batch]) -> tuple[float, float]:
        with watchdog.waiting("layers of the other ranks", range(self.devices)):
            own = heldout_nats(self.trainer.model, self.mine(batches))
        nats, tokens = self._reduced(own, dist.ReduceOp.SUM)
        return nats, tokens

    def beside(self, model: Transformer) -> Collective:
        raise UserError("PPO's critic of a model of another family is trained by one process; leave --processes out")


def trainer_of(sharded: ShardedModel, *arguments: Any, **options: Any) -> Trainer:
    """This rank's trainer; everything else as in `Trainer`."""
    return Trainer(sharded.model, *arguments, **options, collective=FSDPCollective(sharded))


def of_fsdp(trainer: Checkpointed) -> FSDPCollective:
    """The collective of a trainer that `trainer_of` made."""
    assert isinstance(trainer.collective, FSDPCollective)
    return trainer.collective
