"""What the ranks that train a network do together: pipeline, experts, data and optimizer state in parallel (V3 3.2).

A step is the step of `Trainer`: the same sums, divided once by the loss tokens of the whole step, one clipping by the
norm of all gradients, routing biases from the loads of all ranks. The rows of a step are split over the pipelines and
then into as many micro-batches as the schedule needs; all ranks of one pipeline get the same micro-batches, and so do
context-parallel ranks (`dist.context_parallel`). Everything a decision depends on (metrics, whether to stop, save or
skip) is summed over all ranks once per step, so every rank decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.addons.accelerate.precision import tuning
from bessemer.addons.distributed import model_shard, schedules, watchdog
from bessemer.addons.distributed.executor import Executor, Work
from bessemer.addons.distributed.model_shard import ModelShard, dealt, forward, heldout_nats, of_step, rows_of
from bessemer.addons.distributed.rank_store import RankStore, parameter_prefix
from bessemer.addons.distributed.rank_sums import RankSums, added
from bessemer.addons.distributed.zero1 import Zero1
from bessemer.model.gate import Gate
from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.model.transformer import Transformer, evaluating
from bessemer.train import balance
from bessemer.train.checkpointed import Checkpointed
from bessemer.train.collective import Read
from bessemer.train.objective import Loss, Sums, balance_weight
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

if TYPE_CHECKING:
    from bessemer.data.batch import Batch


class Divided(Protocol):
    """An objective for a network whose slices are computed on several ranks."""

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch, **terms: float) -> Loss:
        """The loss from the outputs of the last slice, which hold only that slice's balance term."""

    def with_mtp(self, **terms: float) -> bool:
        """Whether the MTP modules run."""

    def balance_alpha(self, **terms: float) -> float:
        """Weight of the balance terms."""

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of its metrics and of its peaks, with `depths` MTP modules."""


class RankCollective(RankSums):
    """One rank's `Collective` (`train.collective`); `shard` is its shard of the network.

    The trainer's objective is `Divided`, its optimizer `Zero1`. `accumulate` takes the micro-batches of this rank's
    pipeline, as many as `mine` makes. The sums are those of the whole step, equal on all ranks.
    """

    trainer: Checkpointed

    def __init__(self, shard: ModelShard):
        self.shard, self.mesh = shard, shard.mesh
        self.devices, self.me, self.device = shard.mesh.layout.world, shard.mesh.me, shard.device
        self.n_pipelines, self.pipeline = shard.n_pipelines, shard.pipeline_index
        self.row_multiple = shard.context.multiple
        self._executor: Executor | None = None
        self._losses: list[Loss] = []
        self._warms = shard.device.type == "cuda" and shard.mesh.layout.pp > 1
        self._warmed: set[object] = set()

    def optimizer(self, model: LanguageModel, workers: Workers, **options: Any) -> Zero1:
        return Zero1(self.shard.model, self.mesh, self.shard.others, **options)

    def gates(self, model: LanguageModel) -> dict[str, Gate]:
        return self.shard.gates

    def has_biases(self, gates: Mapping[str, Gate]) -> bool:
        return self.mesh.cfg.topk_method == "noaux_tc"

    def join(self, trainer: Checkpointed) -> None:
        self.trainer = trainer
        self._sums, self._peaks = self.objective.names(self.mesh.cfg.n_mtp)
        for part in self.shard.slices.values():
            part.reads = partial(_wait_for, self.zero1, part.parts())

    @property
    def objective(self) -> Divided:
        return self.trainer.objective  # type: ignore[return-value]  # a callable with the methods of Divided

    @property
    def zero1(self) -> Zero1:
        assert isinstance(self.trainer.optimizer, Zero1), "`optimizer` made it"
        return self.trainer.optimizer

    def store(self, trainer: Checkpointed) -> RankStore:
        return RankStore(trainer, self)

    def parts(self, n_rows: int, size: int) -> Iterator[range]:
        micro = self._at_least(math.ceil(n_rows / (self.n_pipelines * size)))
        yield from rows_of(n_rows, self.n_pipelines, self.pipeline, micro)

    def _at_least(self, micro: int) -> int:
        return schedules.micro_batches(self.shard.schedule, self.mesh.layout.pp, micro)

    def mine(self, batches: Sequence[Batch]) -> list[Batch]:
        return self.by_pipeline(batches)[self.pipeline]

    def by_pipeline(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """The batches of each pipeline. All get the same number, padded with filler batches."""
        filler = batches[0].as_filler()
        return [
            [filler if number is None else batches[number] for number in own]
            for own in self.numbers_by_pipeline(len(batches))
        ]

    def numbers_by_pipeline(self, count: int) -> list[list[int | None]]:
        micro = self._at_least(math.ceil(count / self.n_pipelines))
        filled = [*range(count), *[None] * (self.n_pipelines * micro - count)]
        return [filled[start : start + micro] for start in range(0, len(filled), micro)]

    def accumulate(self, micro_batches: Iterable[Batch], terms: dict[str, float]) -> Sums:
        trainer, optimizer = self.trainer, self.zero1
        watchdog.at(trainer.step + 1)
        batches = [trainer.on_device.transfer(self.shard.context.split(batch)) for batch in micro_batches]
        trainer.shape = *batches[0].tokens_BT.shape, batches[0].segments_BT is not None
        executor = self.executor_for(len(batches))
        work = self._work(executor, batches, terms)
        if self.shard.exchange is not None:
            self.shard.exchange.begin()
        if self._warms:
            self._warm(executor, [micro_batch for lane in work for micro_batch in lane])
        self._losses = []
        optimizer.early = executor.begin_sum if executor.mirrored else None
        with tuning.without() if self._warms else nullcontext():
            executor.run(work, optimizer.completed)
        optimizer.sum_shared(executor.begin_sum)
        self._sum_loads(executor)
        return self._sums_of(batches, executor.losses, terms)

    def _warm(self, executor: Executor, work: Sequence[Work]) -> None:
        """Called before a step: warms up for micro-batches of new shapes, so that first-time work is done before
        messages are under way. The ranks of an exchange need not meet a new shape in the same step, so all run as many
        warm-ups as any of them."""
        new = {_shape(micro_batch): micro_batch for micro_batch in work if _shape(micro_batch) not in self._warmed}
        self._warmed |= new.keys()
        most = int(self._reduced([float(len(new))], dist.ReduceOp.MAX)[0])
        for number in range(most):
            executor.warm([*new.values(), *[work[0]] * most][number])
        if self.shard.exchange is not None:
            self.shard.exchange.bytes_sent()

    def executor_for(self, micro: int) -> Executor:
        if self._executor is None:
            self._executor = Executor(
                self.shard.table(micro), self.mesh.pp, self.shard.slices, self.mesh.layout.groups("pp"),
                lambda: balance.uncounted(self.trainer.gates),
            )  # fmt: skip
        elif self._executor.table.micro != micro:
            self._executor.set_table(self.shard.table(micro))
        return self._executor

    def _work(self, executor: Executor, batches: Sequence[Batch], terms: dict[str, float]) -> list[list[Work]]:
        def one(batch: Batch) -> Work:
            def loss(out: TrainOutputs, head: Tensor) -> Tensor:
                result = self.objective.of(out, head, batch, **terms)
                self._losses.append(replace(result, total=result.total.detach()))
                return result.total

            weight = balance_weight(batch, self.objective.balance_alpha(**terms))
            mtp, choice = self.objective.with_mtp(**terms), batch.extras.get("choice_BTLK")
            counted_BT = None if self.trainer.plan.counts_padding else batch.read_BT
            return Work(batch.tokens_BT, batch.segments, loss, weight, mtp, batch.filler, choice, counted_BT)

        per = executor.table.per_lane
        lanes = range(executor.table.lanes - executor.table.idle)
        return [[one(batch) for batch in batches[lane * per : (lane + 1) * per]] for lane in lanes]

    def _sums_of(self, batches: Sequence[Batch], losses: list[float], terms: dict[str, float]) -> Sums:
        """Sums over all ranks: last stages know the loss and its tokens, first stages count rows and tokens, and all
        others add their balance terms."""
        last = {name: added(float(loss.metrics.get(name, 0.0)) for loss in self._losses) for name in self._sums}
        alpha = self.objective.balance_alpha(**terms)
        other_stages = added(losses) - added(float(loss.total) for loss in self._losses)
        if "total" in last:
            last["total"] += other_stages
        if "balance" in last and alpha:
            last["balance"] += other_stages / alpha
        rows, tokens = map(sum, zip(*(batch.counted for batch in batches), strict=True))
        counts = self.mesh.pp == self.mesh.cp == 0  # one rank of every pipeline counts
        own: list[float] = [
            added(losses), added(float(loss.tokens) for loss in self._losses),
            added(float(loss.tokens if loss.weight is None else loss.weight) for loss in self._losses),
            tokens * counts, rows * counts, self.trainer.asked_to_stop(), self.me == 0 and self.trainer.due_by_time(),
            *last.values(),
        ]  # fmt: skip
        exchange, links = self.shard.exchange, list[str]()
        if exchange is not None:
            links = [*exchange.links]
            own += exchange.bytes_sent()
        total, divisor, weight, all_tokens, all_rows, stop, due, *more = self._reduced(own, dist.ReduceOp.SUM)
        values, sent = more[: len(last)], more[len(last) :]
        self._stopping, self._due = stop > 0, due > 0
        values_by_name = {}
        if weight > 0:
            values_by_name = {f"train/{name}": value / weight for name, value in zip(self._sums, values, strict=True)}
        if divisor > 0:
            values_by_name |= {f"moe/sent_bytes/{link}": n / all_tokens for link, n in zip(links, sent, strict=True)}
        if self._peaks:
            peaks = [max((float(loss.peaks[name]) for loss in self._losses), default=-math.inf) for name in self._peaks]
            highest = self._reduced(peaks, dist.ReduceOp.MAX)
            values_by_name |= {f"train/{name}": value for name, value in zip(self._peaks, highest, strict=True)}
        return Sums(
            list(batches), self._losses, divisor, int(all_tokens), int(all_rows), math.isfinite(total), values_by_name
        )

    def _sum_loads(self, executor: Executor) -> None:
        with watchdog.waiting("expert loads", dist.get_process_group_ranks(self.mesh.group["dense"])):
            for name in sorted(self.trainer.gates):
                load_E = self.trainer.gates[name].load_E
                dist.all_reduce(load_E, group=self.mesh.group["dense"])
                executor.sum_with_others(parameter_prefix(name), load_E)

    def outputs(self, batches: Sequence[Batch], read: Read, sizes: Sequence[int]) -> list[Tensor]:
        with evaluating(self.shard.model):
            computed = forward(self.shard, dealt(self.shard, batches), read)
        numbers = range(self.pipeline, len(batches), self.n_pipelines)
        numbered = zip(numbers, computed if self.mesh.cp == 0 else (), strict=False)  # fillers come last
        return self.exchanged({number: values for number, values in numbered if values is not None}, sizes)

    def own_outputs(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        with evaluating(self.shard.model):
            computed = of_step(self.shard, batches, read)
        shapes = [batch.tokens_BT.shape for batch in batches]
        rows = [
            torch.zeros(shape, device=self.device) if values_BT is None else values_BT.float()
            for values_BT, shape in zip(computed, shapes, strict=True)
        ]
        flat = torch.cat([values_BT.flatten() for values_BT in rows])
        with watchdog.waiting("numbers of the last stage", range(self.devices)):
            dist.all_reduce(flat, group=self.mesh.group["pp"])  # each is 0 on all ranks of the pipeline but one
            parts = flat.cpu().split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def sums(self, batch: Batch, read: Read, size: int) -> Tensor:
        own = self.shard.context.split(batch).to(self.device)
        with evaluating(self.shard.model):
            (values,) = forward(self.shard, [own], read, mtp=True)
        return self._of_pipeline(torch.zeros(size, device=self.device) if values is None else values.float())

    def chosen_experts(self, batch: Batch) -> Tensor:
        with evaluating(self.shard.model):
            return self._of_pipeline(model_shard.chosen_experts(self.shard, batch))

    def _of_pipeline(self, parts: Tensor) -> Tensor:
        """The sum of what the ranks have that hold parts of this rank's rows, on the CPU."""
        with watchdog.waiting("numbers of the other stages", range(self.devices)):
            for kind in ("pp", "cp") if "cp" in self.mesh.group else ("pp",):
                dist.all_reduce(parts, group=self.mesh.group[kind])
            return parts.cpu()

    def nats(self, batches: Sequence[Batch]) -> tuple[float, float]:
        return heldout_nats(self.shard, batches)

    def beside(self, model: Transformer) -> RankCollective:
        return RankCollective(ModelShard(model, self.mesh.of(model.cfg), self.shard.schedule))


def trainer_of(shard: ModelShard, *arguments: Any, **options: Any) -> Trainer:
    """This rank's trainer of a network that is divided over the ranks; everything else as in `Trainer`."""
    return Trainer(shard.model, *arguments, **options, collective=RankCollective(shard))


def of_ranks(trainer: Checkpointed) -> RankCollective:
    """The collective of a trainer that `trainer_of` made."""
    assert isinstance(trainer.collective, RankCollective)
    return trainer.collective


def _wait_for(optimizer: Zero1, parts: list[list[nn.Parameter]], number: int) -> None:
    optimizer.needed(parts[number])


def _shape(work: Work) -> object:
    """What decides which kernels a micro-batch needs."""
    return work.tokens_BT.shape, type(work.segments), work.mtp, work.choice_BTLK is None
