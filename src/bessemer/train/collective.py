"""What the processes that train one network do together, and what one process does instead.

The trainer asks its `Collective` for everything that depends on how many processes there are: who computes which rows,
the sums of a step, where checkpoints are written. That of many ranks, which comes with distributed training, derives
from that of one process.

Work in RL is dealt out by the same object. A step's micro-batches are divided over pipelines: parts of the processes
that hold the network once. One process is one pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bessemer import plugins
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import evaluating
from bessemer.probe import double
from bessemer.train import balance
from bessemer.train.checkpointed import Checkpointed, CheckpointStore
from bessemer.train.loss import heldout_nats
from bessemer.train.objective import Loss, Sums, means
from bessemer.train.optimizer import Optimizer
from bessemer.workers import Workers

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.model.gate import Gate
    from bessemer.model.protocol import TrainOutputs
    from bessemer.model.transformer import Transformer

Read = Callable[["TrainOutputs", Tensor, "Batch"], Tensor]
"""Numbers of a batch, one float32 vector, from the network's outputs and the weight of its head."""
Outputs = Callable[[Sequence["Batch"], Read, Sequence[int]], list[Tensor]]
"""`Collective.outputs` of a network."""


@torch.no_grad()
def output_of(model: LanguageModel, read: Read, batch: Batch, mtp: bool = False) -> Tensor:
    """`read` of a batch, on the CPU, after a forward pass in eval mode, without gradients."""
    batch = batch.to(model.embed.weight.device)
    with evaluating(model):
        out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=mtp, **batch.routed)
        return read(out, model.head_weight, batch).cpu()


def outputs_of(model: LanguageModel) -> Outputs:
    """Those of a whole network in this process."""
    return lambda batches, read, sizes: [output_of(model, read, batch) for batch in batches]


class Collective:
    """One per trainer. All processes of a collective make the same calls in the same order; this is that of one
    process, whose `Workers` compute micro-batches with it."""

    devices: int = 1
    """Devices that compute a step together."""
    me: int = 0
    """The number of this process among them."""
    n_pipelines: int = 1
    """The number of parts into which a step's micro-batches are divided."""
    pipeline: int = 0
    """The number of the part that is this process's."""
    row_multiple: int = 1
    """What the number of tokens of a row is a multiple of."""

    def __init__(self) -> None:
        self._reads: dict[Read, Callable[[Batch], Tensor]] = {}

    def optimizer(self, model: LanguageModel, workers: Workers, **options: Any) -> Optimizer:
        return Optimizer(model, workers=workers, **options)

    def gates(self, model: LanguageModel) -> dict[str, Gate]:
        """The gates that this process trains, by name."""
        return model.gates()

    def has_biases(self, gates: Mapping[str, Gate]) -> bool:
        """Whether any gate of the whole network has a routing bias."""
        return any(gate.bias_E is not None for gate in gates.values())

    def join(self, trainer: Checkpointed) -> None:
        """Called once, at the end of the trainer's construction."""
        self.trainer = trainer
        self._add = trainer.plan.workers.adding(trainer, self._gradients)

    def parts(self, n_rows: int, size: int) -> Iterator[range]:
        """The rows of this process's micro-batches of a step of `n_rows`, at most `size` each; empty for a filler."""
        return (range(done, min(done + size, n_rows)) for done in range(0, n_rows, size))

    def accumulate(self, micro_batches: Iterable[Batch], terms: dict[str, float]) -> Sums:
        """Adds the gradients of this process's micro-batches to those of the parameters; returns the step's sums."""
        batches: list[Batch] = []

        def items() -> Iterator[tuple[Batch, dict[str, float]]]:
            for batch in micro_batches:
                batches.append(batch)
                yield batch, terms

        losses = list(self._add(items()))
        divisor = float(double(torch.stack([loss.tokens for loss in losses])).sum())
        finite = bool(torch.stack([loss.total.float() for loss in losses]).isfinite().all())
        rows, tokens = map(sum, zip(*(batch.counted for batch in batches), strict=True))
        return Sums(batches, losses, divisor, tokens, rows, finite, means(losses, divisor) if divisor > 0 else {})

    def _gradients(self, item: tuple[Batch, dict[str, float]]) -> Loss:
        """Adds the gradients of one micro-batch."""
        batch, terms = item
        trainer, gates = self.trainer, self.trainer.gates
        trainer.shape = *batch.tokens_BT.shape, batch.segments_BT is not None
        batch = trainer.on_device.transfer(batch)
        balance.restrict(gates, None if trainer.plan.counts_padding else batch.read_BT)
        loss = trainer.objective(trainer.model, batch, **terms)
        with balance.uncounted(gates):
            loss.total.backward()
        balance.restrict(gates, None)
        return replace(loss, total=loss.total.detach())

    def culprit(self, sums: Sums, terms: dict[str, float]) -> str:
        """Where a non-finite step started to go wrong. An add-on looks into the network (the hook `explain-step`)."""
        explain = plugins.hook("explain-step")
        if explain is not None:
            return explain(self.trainer, sums, terms)
        totals = [float(loss.total) for loss in sums.losses]
        bad = next((number for number, total in enumerate(totals) if not math.isfinite(total)), None)
        return "gradients are not finite" if bad is None else f"loss of micro-batch {bad} is {totals[bad]}"

    def stops(self, asked: Callable[[], bool]) -> bool:
        """Whether all stop, `asked` of any of them."""
        return asked()

    def is_due(self, due: Callable[[], bool]) -> bool:
        """Whether all save, `due` on the first."""
        return due()

    def store(self, trainer: Checkpointed) -> CheckpointStore:
        return (plugins.hook("checkpoint-store") or CheckpointStore)(trainer)

    def numbers_by_pipeline(self, count: int) -> list[list[int | None]]:
        """Which of `count` micro-batches of a step each part has; None for a filler."""
        return [[*range(count)]]

    def mine(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro-batches of a step that this process computes."""
        return batches

    def share_of(self, count: int) -> range:
        """The indices of those of `count` pieces of work that this process does."""
        return range(count)

    def exchanged(self, mine: Mapping[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """All float32 vectors, in order, of these `sizes`; each process passes those it has, by index, as `mine`."""
        return [mine[number] for number in range(len(sizes))]

    def average(self, values: dict[str, float]) -> dict[str, float]:
        """Means over all processes of metrics that each computed on its own micro-batches."""
        return values

    def outputs(self, batches: Sequence[Batch], read: Read, sizes: Sequence[int]) -> list[Tensor]:
        """`output_of` of every batch, in all processes. `sizes`: of the vectors."""
        work = self._reads.setdefault(read, partial(self._output, read))  # one object: another restarts the helpers
        return list(self.trainer.plan.workers.map(work, batches))

    def own_outputs(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """The same of this process's micro-batches alone; `read` returns a number for every position, [B, T]."""
        return self.outputs(batches, read, [])

    def sums(self, batch: Batch, read: Read, size: int) -> Tensor:
        """`read` of one of this process's micro-batches after a pass with MTP, [size]; summed over the processes that
        have parts of its rows."""
        return output_of(self.trainer.model, read, batch, mtp=True)

    def chosen_experts(self, batch: Batch) -> Tensor:
        """`LanguageModel.chosen_experts` of one of this process's micro-batches, on the CPU."""
        batch = batch.to(self.trainer.model.embed.weight.device)
        return self.trainer.model.chosen_experts(batch.tokens_BT, batch.segments).cpu()

    def _output(self, read: Read, batch: Batch) -> Tensor:
        return output_of(self.trainer.model, read, batch)

    def nats(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """(cross entropy in nats, loss tokens), both summed over held-out batches."""
        return heldout_nats(self.trainer.model, batches)

    def beside(self, model: Transformer) -> Collective:
        """The collective of another network, whole, that the same processes train in the same way."""
        return Collective()
