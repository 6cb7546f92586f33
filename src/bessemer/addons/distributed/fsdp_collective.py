"""What the ranks of FSDP2 do together: every rank is a pipeline of its own, and all have equally many micro-batches,
because each forward and backward gathers weights from all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.fsdp import ShardedModel
from bessemer.addons.distributed.fsdp_checkpoint import FSDPStore
from bessemer.addons.distributed.fsdp_optimizer import ShardedAdamW
from bessemer.addons.distributed.model_shard import rows_of
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.train.checkpointed import Checkpointed, CheckpointStore
from bessemer.train.collective import Collective, Read
from bessemer.train.loss import heldout_nats
from bessemer.train.objective import Loss, Sums
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.model.transformer import Transformer


class FSDPCollective(Collective):
    """One rank's `Collective` (`train.collective`) of a `ShardedModel` model."""

    def __init__(self, sharded: ShardedModel) -> None:
        super().__init__()
        self.sharded, self.device = sharded, sharded.device
        self.devices = self.n_pipelines = dist.get_world_size()
        self.me = self.pipeline = dist.get_rank()
        self._stopping = self._due = False

    def optimizer(self, model: LanguageModel, workers: Workers, **options: Any) -> ShardedAdamW:
        return ShardedAdamW(self.sharded, **options)

    def join(self, trainer: Checkpointed) -> None:
        self.trainer = trainer

    def store(self, trainer: Checkpointed) -> CheckpointStore:
        return FSDPStore(trainer)

    def stops(self, asked: Callable[[], bool]) -> bool:
        """As the last step found out, which asked all ranks."""
        return self._stopping

    def is_due(self, due: Callable[[], bool]) -> bool:
        return self._due

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

    def share_of(self, count: int) -> range:
        return range(self.me, count, self.devices)

    def exchanged(self, mine: Mapping[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        flat = torch.zeros(sum(sizes))
        parts = flat.split([*sizes])
        for number, values in mine.items():
            parts[number].copy_(values)
        summed = flat.to(self.device)
        with watchdog.waiting("numbers of the other ranks", range(self.devices)):
            dist.all_reduce(summed)  # each is 0 on all ranks but one
            return [*summed.cpu().split([*sizes])]

    def average(self, values: dict[str, float]) -> dict[str, float]:
        mean = self._reduced([value / self.devices for value in values.values()], dist.ReduceOp.SUM)
        return dict(zip(values, mean, strict=True))

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
            return math.fsum(float(of(loss)) for loss in losses)

        total, divisor, weight, all_tokens, all_rows, stop, due, *metrics = self._reduced(
            [
                summed(lambda loss: loss.total), summed(lambda loss: loss.tokens),
                summed(lambda loss: loss.tokens if loss.weight is None else loss.weight), tokens, rows,
                self.trainer.asked_to_stop(), self.me == 0 and self.trainer.due_by_time(),
                *(math.fsum(float(loss.metrics[name]) for loss in losses) for name in names),
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

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        with watchdog.waiting("the metrics of the step", range(self.devices)):
            dist.all_reduce(reduced, how)
            return reduced.tolist()

    def culprit(self, sums: Sums, terms: dict[str, float]) -> str:
        bad = [number for number, loss in enumerate(sums.losses) if not math.isfinite(float(loss.total))]
        names = self.trainer.optimizer.nonfinite_gradients()
        cause = f"the loss of micro-batch {bad[0]} on rank {self.me} is not finite" if bad else ""
        if not bad and names:
            cause = f"{len(names)} gradients on rank {self.me} are not finite, starting at {names[-1]}"
        causes: list[str] = [""] * self.devices
        with watchdog.waiting("an error report", range(self.devices)):
            dist.all_gather_object(causes, cause)
        causes = sorted(filter(None, causes), key=lambda text: not text.startswith("the loss"))
        return causes[0] if causes else "the gradients overflow in their norm"

    def outputs(self, batches: Sequence[Batch], read: Read, sizes: Sequence[int]) -> list[Tensor]:
        numbers = self.numbers_by_pipeline(len(batches))[self.pipeline]
        with watchdog.waiting("layers of the other ranks", range(self.devices)):
            values = [self._output(read, batch) for batch in self.mine(batches)]
        own = {number: value for number, value in zip(numbers, values, strict=True) if number is not None}
        return self.exchanged(own, sizes)

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
