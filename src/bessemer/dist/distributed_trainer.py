"""The trainer on many ranks: pipeline, experts, data and optimizer state in parallel (V3 3.2).

A step is the step of `Trainer`: the same sums, divided once by the loss tokens of the whole step, one clipping by the
norm of all gradients, routing biases from the loads of all ranks. The rows of a step are split over the pipelines and
then into as many micro-batches as the schedule needs; all ranks of one pipeline get the same micro-batches, and so do
context-parallel ranks (`dist.context_parallel`). Everything a decision depends on (metrics, whether to stop, save or
skip) is summed over all ranks once per step, so every rank decides alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.dist import schedules, sharded_checkpoint, watchdog
from bessemer.dist.executor import Executor, Work
from bessemer.dist.model_shard import ModelShard, rows_of
from bessemer.dist.zero1 import Zero1
from bessemer.model.gate import Gate
from bessemer.model.transformer import TrainOutputs, Transformer
from bessemer.precision import tuning
from bessemer.train import balance, checkpoint, guard
from bessemer.train.background import Background, HostCopies
from bessemer.train.checkpoint import companion_name
from bessemer.train.checkpoint_files import Damaged
from bessemer.train.checkpoint_reader import CheckpointReader, CompanionReader
from bessemer.train.objective import Divided, Loss, Sums, balance_weight
from bessemer.train.trainer import Trainer
from bessemer.train.transfer import Place

if TYPE_CHECKING:
    from bessemer.data.batch import Batch

Result = TypeVar("Result")


class DistributedTrainer(Trainer):
    """One rank's trainer; `shard` is its shard of the network, everything else as in `Trainer`.

    The objective is `Divided`. `update` takes the micro-batches of this rank's pipeline, as many as `mine` makes.
    Metrics are those of the whole step, equal on all ranks.
    """

    model: Transformer
    objective: Divided  # type: ignore[assignment]  # a callable with the methods of Divided
    optimizer: Zero1
    companions: dict[str, DistributedTrainer]  # type: ignore[assignment]  # of the same ranks

    def __init__(self, shard: ModelShard, *arguments: Any, **options: Any):
        self.shard, self.mesh = shard, shard.mesh
        self._stopping = self._due = False
        self._executor: Executor | None = None
        self._losses: list[Loss] = []
        self._warms = shard.device.type == "cuda" and shard.mesh.layout.pp > 1
        self._warmed: set[object] = set()
        super().__init__(shard.model, *arguments, **options)
        n_mtp = shard.mesh.cfg.n_mtp
        self._sums, self._peaks = self.objective.names(n_mtp)
        self._saver: sharded_checkpoint.Saver | None = None
        self._copies = HostCopies()
        if self.state_dir is not None:
            self._saver = sharded_checkpoint.Saver(self.state_dir, self.model_config, self.plan.keep)
        self._stop_requested, self.stop = self.stop, lambda: self._stopping
        self._goes_on = False
        for part in shard.slices.values():
            part.reads = partial(_wait_for, self.optimizer, part.parts())

    def _make_optimizer(self, **options: Any) -> Zero1:
        return Zero1(self.model, self.mesh, self.shard.others, **options)

    def _devices(self) -> tuple[int, int]:
        return self.mesh.layout.world, self.mesh.me

    def _find_gates(self) -> dict[str, Gate]:
        return self.shard.gates

    def _has_biases(self) -> bool:
        return self.mesh.cfg.topk_method == "noaux_tc"

    def _prepare(self) -> None:
        pass

    def _micro_of(self, n_rows: int, tokens: int) -> int:
        """Micro-batches of every pipeline in a step of `n_rows` rows that begins after `tokens` tokens."""
        return self._at_least(math.ceil(n_rows / (self.shard.n_pipelines * self._rows_of_forward(tokens))))

    def _at_least(self, micro: int) -> int:
        return schedules.micro_batches(self.shard.schedule, self.mesh.layout.pp, micro)

    @property
    def n_pipelines(self) -> int:
        return self.shard.n_pipelines

    def mine(self, batches: Sequence[Batch]) -> list[Batch]:
        return self.by_pipeline(batches)[self.shard.pipeline_index]

    def by_pipeline(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """The batches of each pipeline. All get the same number, padded with filler batches."""
        filler = batches[0].as_filler()
        return [
            [filler if number is None else batches[number] for number in own]
            for own in self.numbers_by_pipeline(len(batches))
        ]

    @property
    def pipeline(self) -> int:
        return self.shard.pipeline_index

    def numbers_by_pipeline(self, count: int) -> list[list[int | None]]:
        micro = self._at_least(math.ceil(count / self.n_pipelines))
        filled = [*range(count), *[None] * (self.n_pipelines * micro - count)]
        return [filled[start : start + micro] for start in range(0, len(filled), micro)]

    def share_of(self, count: int) -> range:
        return range(self.mesh.me, count, self.mesh.layout.world)

    def exchanged(self, mine: Mapping[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        flat = torch.zeros(sum(sizes))
        parts = flat.split([*sizes])
        for number, values in mine.items():
            parts[number].copy_(values)
        summed = flat.to(self.device)
        with watchdog.waiting("numbers of the other ranks", range(self.mesh.layout.world)):
            dist.all_reduce(summed)  # each is 0 on all ranks but one
            return [*summed.cpu().split([*sizes])]

    def average(self, values: dict[str, float]) -> dict[str, float]:
        if not values:
            return values
        mean = self._reduced([value / self.mesh.layout.world for value in values.values()], dist.ReduceOp.SUM)
        return dict(zip(values, mean, strict=True))

    def _read(self, place: Place) -> Iterator[Batch]:
        self.reading = place.tokens
        rows = self._rows_of_step(place.tokens)
        micro = self._micro_of(rows, place.tokens)
        for mine in rows_of(rows, self.shard.n_pipelines, self.shard.pipeline_index, micro):
            if mine:
                yield self._batch(place.rows + mine.start, len(mine))
            else:  # the last step of a run may have few rows
                yield self._batch(place.rows, 1).as_filler()

    def update(self, micro_batches: Iterable[Batch]) -> dict[str, float]:
        values = super().update(micro_batches)
        if not self._goes_on:
            self.optimizer.settle()
        return values

    def _run(self) -> bool:
        """Between steps, weights are gathered while the next forward begins. Other code reads them through slices,
        which wait, or after `settle`."""
        self._goes_on = True
        at_end = super()._run()
        self._goes_on = False
        self.optimizer.settle()
        return at_end

    def _accumulate(self, micro_batches: Iterable[Batch], terms: dict[str, float]) -> Sums:
        watchdog.at(self.step + 1)
        own = self.shard.context.positions
        batches = [self._transfer(batch.at(own(batch.tokens_BT.shape[1]))) for batch in micro_batches]
        rows, length = batches[0].tokens_BT.shape
        self._shape = rows, length, batches[0].segments_BT is not None
        executor = self._executor_for(len(batches))
        work = self._work(executor, batches, terms)
        if self.shard.exchange is not None:
            self.shard.exchange.begin()
        if self._warms:
            self._warm(executor, [one for lane in work for one in lane])
        self._losses = []
        self.optimizer.early = executor.begin_sum if executor.mirrored else None
        with tuning.without() if self._warms else nullcontext():
            executor.run(work, self.optimizer.completed)
        self.optimizer.sum_shared(executor.begin_sum)
        self._sum_loads(executor)
        return self._sums_of(batches, executor.losses, terms)

    def _warm(self, executor: Executor, work: Sequence[Work]) -> None:
        """Called before a step: warms up for micro-batches of new shapes, so that first-time work is done before
        messages are under way. The ranks of an exchange need not meet a new shape in the same step, so all run as many
        warm-ups as any of them."""
        new = {_shape(one): one for one in work if _shape(one) not in self._warmed}
        self._warmed |= new.keys()
        most = int(self._reduced([float(len(new))], dist.ReduceOp.MAX)[0])
        for number in range(most):
            executor.warm([*new.values(), *[work[0]] * most][number])
        if self.shard.exchange is not None:
            self.shard.exchange.bytes_sent()

    def _executor_for(self, micro: int) -> Executor:
        if self._executor is None:
            self._executor = Executor(
                self.shard.table(micro), self.mesh.pp, self.shard.slices, self.mesh.layout.groups("pp"),
                lambda: balance.uncounted(self.gates),
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
            counted_BT = None if self.plan.counts_padding else batch.read_BT
            return Work(batch.tokens_BT, batch.segments, loss, weight, mtp, batch.filler, choice, counted_BT)

        per = executor.table.per_lane
        lanes = range(executor.table.lanes - executor.table.idle)
        return [[one(batch) for batch in batches[lane * per : (lane + 1) * per]] for lane in lanes]

    def _sums_of(self, batches: Sequence[Batch], losses: list[float], terms: dict[str, float]) -> Sums:
        """Sums over all ranks: last stages know the loss and its tokens, first stages count rows and tokens, and all
        others add their balance terms."""
        last = {name: math.fsum(float(loss.metrics.get(name, 0.0)) for loss in self._losses) for name in self._sums}
        alpha = self.objective.balance_alpha(**terms)
        other_stages = math.fsum(losses) - math.fsum(float(loss.total) for loss in self._losses)
        if "total" in last:
            last["total"] += other_stages
        if "balance" in last and alpha:
            last["balance"] += other_stages / alpha
        rows, tokens = map(sum, zip(*(batch.counted for batch in batches), strict=True))
        counts = self.mesh.pp == self.mesh.cp == 0  # one rank of every pipeline counts
        mine: list[float] = [
            math.fsum(losses), math.fsum(float(loss.tokens) for loss in self._losses),
            math.fsum(float(loss.tokens if loss.weight is None else loss.weight) for loss in self._losses),
            tokens * counts, rows * counts, self._stop_requested(), self.mesh.me == 0 and self._due_by_time(),
            *last.values(),
        ]  # fmt: skip
        exchange, links = self.shard.exchange, list[str]()
        if exchange is not None:
            links = [*exchange.links]
            mine += exchange.bytes_sent()
        total, divisor, weight, all_tokens, all_rows, stop, due, *more = self._reduced(mine, dist.ReduceOp.SUM)
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

    def _reduced(self, values: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        with watchdog.waiting("the metrics of the step", range(self.mesh.layout.world)):
            dist.all_reduce(reduced, how)
            return reduced.tolist()

    def _all_gather(self, text: str) -> list[str]:
        """The text of every rank, by rank."""
        texts = [""] * self.mesh.layout.world
        with watchdog.waiting("an error report", range(len(texts))):
            dist.all_gather_object(texts, text)
        return texts

    def _sum_loads(self, executor: Executor) -> None:
        with watchdog.waiting("expert loads", dist.get_process_group_ranks(self.mesh.group["dense"])):
            for name in sorted(self.gates):
                load_E = self.gates[name].load_E
                dist.all_reduce(load_E, group=self.mesh.group["dense"])
                executor.sum_with_others(_parameter_prefix(name), load_E)

    def _culprit(self, sums: Sums, terms: dict[str, float]) -> str:
        bad = [number for number, loss in enumerate(sums.losses) if not math.isfinite(float(loss.total))]
        names = self.optimizer.nonfinite_gradients()
        mine = f"the loss of micro-batch {bad[0]} on rank {self.mesh.me} is not finite" if bad else ""
        if not bad and names:
            mine = f"{len(names)} gradients on rank {self.mesh.me} are not finite, starting at {names[-1]}"
        causes = sorted(filter(None, self._all_gather(mine)), key=lambda text: not text.startswith("the loss"))
        return causes[0] if causes else "the gradients overflow in their norm, or in a balance term"

    def save_if_due(self) -> None:
        steps = self.save_steps
        if (self._due or (steps is not None and self.step % steps == 0)) and self.guard.streak == 0:
            self.save()
            if self.config.save_seconds == 0:
                self.finish()

    def close(self) -> None:
        """Does not wait: all ranks write together, and after an error others may never come."""

    @property
    def _background(self) -> Background | None:
        return None if self._saver is None else self._saver.background

    def _write(self) -> Path:
        """Returns as soon as the copies are under way."""
        start = time.monotonic()
        self.finish()  # frees the buffer
        self._copies.begin()
        random_tensors, random_values = guard.capture_rng(self.generators)
        counters = self._counters() | {"updates": self.optimizer.steps, "rng": random_values, "extras": self.extras}
        tensors = self.optimizer.pieces(self._copies.add)
        if self.mesh.dp == self.mesh.ep == self.mesh.cp == 0:
            tensors |= {name: self._copies.add(tensor) for name, tensor in self._own_gate_tensors().items()}
        if self.mesh.me == 0:
            tensors |= {f"rng/{name}": tensor for name, tensor in random_tensors.items()}
            tensors |= {f"extras/{name}": self._copies.add(tensor) for name, tensor in self.extra_tensors.items()}
        for name, other in self.companions.items():
            theirs = other._pieces(self._copies.add)
            tensors |= {companion_name(name, key): tensor for key, tensor in theirs.items()}
        assert self._saver is not None, "save() has checked the folder"
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        path = self._saver.save(self.step, tensors, counters, copied)
        self._saved(start)
        return path

    def _is_first(self, name: str) -> bool:
        """Whether no earlier pipeline rank holds the parameter of this name."""
        return self.mesh.pp < min(self.shard.others(name), default=math.inf)

    def _own_gate_tensors(self) -> dict[str, Tensor]:
        """The gate tensors that no earlier pipeline rank writes."""
        mine = {}
        for name, tensor in self._gate_tensors().items():
            if self._is_first(_parameter_prefix(name.partition("/")[2])):
                mine[name] = tensor
        return mine

    def _pieces(self, copy: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The tensors of a companion that this rank writes."""
        pieces, mesh = self.optimizer.pieces(copy), self.mesh
        if mesh.dp == mesh.ep == mesh.cp == 0:
            own = {n: b for n, b in self._biases().items() if self._is_first(n.removeprefix("model/"))}
            pieces |= {name: copy(bias_E) for name, bias_E in own.items()}
        return pieces | ({"steps": torch.tensor(self.optimizer.steps)} if mesh.me == 0 else {})

    def _biases(self) -> dict[str, Tensor]:
        return {f"model/{name}": bias_E for name, bias_E in self.model.named_buffers() if name.endswith("bias_E")}

    def _restore_latest(self) -> Path | None:
        """Goes back to the newest checkpoint in which every rank's tensors are undamaged."""
        if self.state_dir is None:
            return None
        self.finish()
        if self.mesh.me == 0:
            checkpoint.sweep(self.state_dir)
        dist.barrier()
        paths = checkpoint.steps(self.state_dir)
        for path in reversed(paths):
            reader, damage = self._undamaged(partial(CheckpointReader, path))
            if reader is not None:
                checkpoint.check_config(reader.config, self.model_config, path)
                restored, damage = self._undamaged(partial(self._restore_from, reader))
                for trainer in restored or ():
                    trainer.optimizer.refresh()
                if restored is not None:
                    return path
            self.warn(f"checkpoint {path} is damaged ({damage}); trying the one before it")
        if paths:
            raise checkpoint.none_intact(self.state_dir, len(paths))
        return None

    def _undamaged(self, work: Callable[[], Result]) -> tuple[Result | None, str]:
        """(the result of `work`, "") if no rank meets damage in it, else (None, what the first of them met)."""
        result, damage = None, ""
        try:
            result = work()
        except Damaged as error:
            damage = str(error)
        damage = next(filter(None, self._all_gather(damage)), "")
        return (None if damage else result), damage

    def _stored(self, reader: CheckpointReader) -> dict[str, DistributedTrainer]:
        """The companions that a checkpoint has: all, unless it is from before the first step."""
        return {
            name: other
            for name, other in self.companions.items()
            if reader.counters["step"] or other.step or companion_name(name, "steps") in reader.locations
        }

    @torch.no_grad()
    def _restore_from(self, reader: CheckpointReader) -> list[DistributedTrainer]:
        """Reads what this rank needs. Returns the trainers whose weights must then be exchanged, once no rank has met
        damage."""
        self.optimizer.load_pieces(reader)
        mine = self._gate_tensors()
        for name, value in reader.read(mine).items():
            mine[name].copy_(value)
        self._restore_counters(reader.counters)
        self.optimizer.steps = reader.updates
        stored = self._stored(reader)
        for name, other in stored.items():
            theirs, biases = CompanionReader(reader, name), other._biases()
            other.optimizer.load_pieces(theirs)
            other.optimizer.steps = int(theirs.read(["steps"])["steps"])
            for key, value in theirs.read(biases).items():
                biases[key].copy_(value)
        for other in self.companions.values():
            other.step = self.step
        elsewhere = tuple(f"extras/{name}/" for name in self.companions)
        extras = [n for n in reader.locations if n.startswith("extras/") and not n.startswith(elsewhere)]
        own = checkpoint.stacked(reader.read(extras))
        self.extra_tensors = {name.removeprefix("extras/"): tensor for name, tensor in own.items()}
        self.extras = reader.counters["extras"]
        states = [name for name in reader.locations if name.startswith("rng/")]
        tensors = {name.removeprefix("rng/"): t for name, t in reader.read(states).items()}
        guard.restore_rng(tensors, reader.counters["rng"], self.generators)
        return [self, *stored.values()]


def _wait_for(optimizer: Zero1, parts: list[list[nn.Parameter]], number: int) -> None:
    optimizer.needed(parts[number])


def _shape(work: Work) -> object:
    """What decides which kernels a micro-batch needs."""
    return work.tokens_BT.shape, type(work.segments), work.mtp, work.choice_BTLK is None


def _parameter_prefix(gate: str) -> str:
    """The prefix of the names of the parameters in a gate's layer."""
    return f"mtp.{gate[3:]}." if gate.startswith("mtp") else f"layers.{gate}."
