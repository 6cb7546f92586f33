"""The one training loop: pre-training, SFT, distillation and RL are objectives for it (V3 4.2).

`update` makes exactly one optimizer step from given micro-batches:

    for every micro-batch: forward, backward, add gradients in float32      sums, nothing is averaged
    gradient / (loss tokens of the whole step), clip, optimizer
    routing bias from the loads of the whole step

`run` is the loop around it for data addressed by row number: schedules in consumed tokens, log, hooks, checkpoints
(`checkpointed`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.model.gate import Gate
from bessemer.model.protocol import LanguageModel
from bessemer.precision.probe import double
from bessemer.train import balance, determinism, gpu_faults, guard
from bessemer.train.checkpointed import Checkpointed
from bessemer.train.instruments import Instruments
from bessemer.train.objective import Loss, Objective, Sums, means
from bessemer.train.optimizer import Optimizer
from bessemer.train.transfer import Place, ReadAhead, Transfer
from bessemer.workers import Workers, rank

if TYPE_CHECKING:
    from bessemer.config.training import OptimizerConfig
    from bessemer.data.batch import Batch

Schedule = Callable[[int], float]
"""A value as a function of the tokens consumed before the step."""


def constant(value: float) -> Schedule:
    return lambda tokens: value


ZERO, ONE = constant(0.0), constant(1.0)


@dataclass
class TrainingPlan:
    """What a stage decides when it runs; everything else the trainer reads from the stage's `OptimizerConfig`."""

    tokens: int = 0
    """Consumed tokens at which the run is complete (padding counts); unused if the caller calls `update` itself."""
    batch_rows: Schedule = ZERO
    """Rows per optimizer step."""
    row_scale: Schedule = ONE
    """Factor on the rows of a step and of a forward: above 1 if rows are shorter than those that `batch_rows` and
    `micro_rows` count."""
    gamma: Schedule = ZERO
    """Update speed of the routing bias."""
    counts_padding: bool = True
    """Whether padding counts in the expert loads. Pre-training packs rows, so there is hardly any; elsewhere it would
    hide how samples are routed."""
    terms: dict[str, Schedule] = field(default_factory=dict)
    """Further arguments of the objective, such as mtp_lambda and balance_alpha."""
    idle: tuple[str, ...] = ()
    """Beginnings of the names of parameters that no step trains; they do not decay."""
    workers: Workers = field(default_factory=lambda: Workers(1))
    """Processes that compute micro-batches in parallel; the result does not depend on how many there are."""
    read_ahead: bool | None = None
    """Whether the next step's batches are read by a thread while this one is computed; None: only on a GPU."""
    compute_dtype: torch.dtype = torch.float32
    """Dtype of forward and backward; masters and accumulation are always float32."""
    save_steps: int | None = None
    """Steps between checkpoints, in addition to `save_seconds`."""
    keep: int = 2
    """Checkpoints kept."""
    failures: int = 3
    """Non-finite steps in a row before going back to the last checkpoint."""
    rollbacks: int = 2
    """Rollbacks without progress before giving up."""


class _HelperResult(NamedTuple):
    """What a helper returns besides the gradients, which are in its outbox."""

    helper: int
    loads: dict[str, Tensor]


class Trainer(Checkpointed):
    """Owns optimizer, counters and checkpoints of one model.

    `batches(first_row, n_rows) -> Batch`; None if the caller passes its own micro-batches to `update` (RL). `log(step,
    tokens, values)` after every step; `on_step` hooks get the trainer; `stop()` is polled between steps. `config` is
    the table of the stage. `model_config` is stored and must be equal on resume. `extras` (JSON) and `extra_tensors`
    travel with the checkpoints.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        batches: Callable[[int, int], Batch] | None,
        config: OptimizerConfig,
        plan: TrainingPlan,
        state_dir: str | Path | None = None,
        log: Callable[[int, int, dict[str, float]], None] = lambda step, tokens, values: None,
        stop: Callable[[], bool] = lambda: False,
        *,
        on_step: Sequence[Callable[[Trainer], None]] = (),
        model_config: dict[str, Any] | None = None,
        generators: dict[str, np.random.Generator] | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.model, self.objective, self.batches = model, objective, batches
        self.config, self.plan, self.compute_dtype = config, plan, plan.compute_dtype
        super().__init__(None if state_dir is None else Path(state_dir), plan.save_steps, plan.keep)
        self.log, self.stop, self.on_step, self.warn = log, stop, on_step, warn
        self.model_config, self.generators = model_config or {}, generators or {}
        devices, rank = self._devices()
        self.instruments = Instruments(
            config, model, next(model.parameters()).device, plan.compute_dtype,
            None if self.state_dir is None else self.state_dir / "profile", warn, devices, rank,
        )  # fmt: skip
        self.optimizer = self._make_optimizer(
            compute_dtype=plan.compute_dtype, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
            moments_dtype=getattr(torch, config.moments), ema_decay=config.ema_decay,
            stacked=model.hidden_matrices() if config.optimizer == "muon" else None, idle=plan.idle,
        )  # fmt: skip
        self.gates = self._find_gates()
        self.guard = guard.StepGuard(plan.failures, plan.rollbacks)
        self.step = self.tokens = self.rows = self.skipped = 0
        self.loads: dict[str, Tensor] = {}
        """Tokens per expert of the last step, by gate."""
        self._shape = (1, 1, False)
        """Rows and length of the micro-batch that was computed last."""
        self.device = next(model.parameters()).device
        self._transfer = Transfer(self.device)
        self.reading = 0
        """Consumed tokens at the beginning of the step whose batches are being read."""
        ahead = self.device.type == "cuda" if plan.read_ahead is None else plan.read_ahead
        self._ahead = ReadAhead(self._read) if ahead else None
        self._prepare()
        if plan.gamma(0) and not self._has_biases():
            self.warn("gamma has no effect: no layer of this model has a routing bias (set gamma to 0)")

    def _make_optimizer(self, **options: Any) -> Optimizer:
        return Optimizer(self.model, workers=self.plan.workers, **options)

    def _devices(self) -> tuple[int, int]:
        """(devices that compute a step together, the number of this process among them)."""
        return 1, 0

    def _find_gates(self) -> dict[str, Gate]:
        return self.model.gates()

    def _has_biases(self) -> bool:
        return any(gate.bias_E is not None for gate in self.gates.values())

    def _prepare(self) -> None:
        """Moves weights and gradient outboxes into memory shared with the helper processes."""
        workers, groups = self.plan.workers, self.optimizer.groups
        biases = [gate.bias_E for gate in self.gates.values() if gate.bias_E is not None]
        workers.share([group.compute for group in groups] + biases + [self.optimizer.kept.epoch])
        self._outboxes = [[torch.zeros_like(group.grad) for group in groups] for _ in range(1, workers.n)]
        workers.share(out for outbox in self._outboxes for out in outbox)

    def run(self) -> bool:
        """Trains to the end (True) or until `stop` (False); resumes from the newest checkpoint if there is one."""
        try:
            return self._run()
        finally:
            if self._ahead is not None:
                self._ahead.stop()
            self.close()

    def _run(self) -> bool:
        assert self.batches is not None, "run() needs batches; without them call update()"
        self.start()
        while self.tokens < self.plan.tokens:
            values = self.update(self._micro_batches())
            self.log(self.step, self.tokens, values)
            for hook in self.on_step:
                hook(self)
            if self.stop():
                self.save()
                self.finish()
                return False
            self.save_if_due()
        self.save()
        self.finish()
        return True

    def _rows_of_step(self, tokens: int) -> int:
        rows = int(self.plan.batch_rows(tokens) * self.plan.row_scale(tokens))
        if rows < 1:
            raise UserError(f"batch_rows is {rows} at {tokens} tokens; it must be at least 1")
        return rows

    def _rows_of_forward(self, tokens: int) -> int:
        return max(1, int(self.config.micro_rows * self.plan.row_scale(tokens)))

    def _micro_batches(self) -> Iterator[Batch]:
        """The micro-batches of the step that begins now."""
        here = Place(self.tokens, self.rows)
        if self._ahead is None:
            yield from self._read(here)
            return
        batches, rows = self._ahead.take(here), self._rows_of_step(here.tokens)
        after = Place(here.tokens + rows * batches[0].tokens_BT.shape[1], here.rows + rows)
        if after.tokens < self.plan.tokens:
            self._ahead.begin(after)
        yield from batches

    def _read(self, place: Place) -> Iterator[Batch]:
        """The micro-batches of this process in the step that begins there."""
        self.reading = place.tokens
        rows, size = self._rows_of_step(place.tokens), self._rows_of_forward(place.tokens)
        for done in range(0, rows, size):
            yield self._batch(place.rows + done, min(size, rows - done))

    def _batch(self, first_row: int, n_rows: int) -> Batch:
        assert self.batches is not None, "run() has checked it"
        return self.batches(first_row, n_rows)

    @property
    def n_pipelines(self) -> int:
        """The number of parts into which `mine` splits a step's micro-batches."""
        return 1

    @property
    def pipeline(self) -> int:
        """The number of the part that is this process's."""
        return 0

    def numbers_by_pipeline(self, count: int) -> list[list[int | None]]:
        """Which of `count` micro-batches of a step each part has; None for a filler."""
        return [[*range(count)]]

    def numbers_of_mine(self, count: int) -> list[int | None]:
        return self.numbers_by_pipeline(count)[self.pipeline]

    def mine(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro-batches of a step that this process computes; on one process all of them."""
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

    @determinism.held
    def update(self, micro_batches: Iterable[Batch]) -> dict[str, float]:
        """One optimizer step; returns what to log. A non-finite step is skipped and may roll the run back (`guard`)."""
        with self.instruments.step(self.step + 1):
            return self._update(micro_batches)

    def _update(self, micro_batches: Iterable[Batch]) -> dict[str, float]:
        start = time.monotonic()
        terms = {name: schedule(self.tokens) for name, schedule in self.plan.terms.items()}
        lr = self.config.learning_rate(self.tokens, self.step, self.plan.tokens)
        gamma = self.plan.gamma(self.tokens)
        self.model.train()
        try:
            sums = self._accumulate(micro_batches, terms)
            norm = float(self.optimizer.grad_norm())
        except torch.OutOfMemoryError as error:
            raise self._too_large(terms) from error
        self.step += 1
        self.tokens += sums.tokens
        self.rows += sums.rows
        if sums.divisor <= 0:
            self._discard()
            self.warn(f"step {self.step}: no token of the step carries loss weight; nothing learnt")
            return {"train/skipped": self.skipped}
        if not (math.isfinite(norm) and sums.finite):
            return self._bad_step(sums, terms)
        self.loads = {name: gate.load_E.clone() for name, gate in self.gates.items()}
        violation = balance.metrics(balance.update(self.gates, gamma))
        # last, after all that the host waits for: a GPU updates while the host prepares the next step
        self.optimizer.step(lr, sums.divisor, norm, self.config.clip)
        self.guard.good()
        seconds = time.monotonic() - start
        return {
            **sums.values,
            **violation,
            **{f"train/{name}": value for name, value in terms.items()},
            "train/lr": lr,
            "train/gamma": gamma,
            "train/grad_norm": norm / sums.divisor,
            "train/tokens_per_second": sums.tokens / seconds,
            "train/skipped": self.skipped,
            **self.instruments.values(sums.tokens, sums.rows, bool(terms.get("mtp_lambda")), seconds),
        }

    def _too_large(self, terms: dict[str, float]) -> UserError:
        mtp, number = bool(terms.get("mtp_lambda")), self.plan.compute_dtype.itemsize
        fault = gpu_faults.of_step(
            self.device, self.optimizer.groups, self.model, self.config, self._shape, number, mtp
        )
        return UserError(f"{fault}{self.instruments.dump()}")

    def _accumulate(self, micro_batches: Iterable[Batch], terms: dict[str, float]) -> Sums:
        """Adds the gradients of all micro-batches to those of the parameters."""
        batches: list[Batch] = []
        losses: list[Loss] = []

        def items() -> Iterator[tuple[Batch, dict[str, float]]]:
            for batch in micro_batches:
                batches.append(batch)
                yield batch, terms

        for loss, result in self.plan.workers.map(self._gradients, items()):
            losses.append(loss)
            if result is not None:
                self._collect(result)
        divisor = float(double(torch.stack([loss.tokens for loss in losses])).sum())
        finite = bool(torch.stack([loss.total.float() for loss in losses]).isfinite().all())
        rows, tokens = map(sum, zip(*(batch.counted for batch in batches), strict=True))
        return Sums(batches, losses, divisor, tokens, rows, finite, means(losses, divisor) if divisor > 0 else {})

    def _gradients(self, item: tuple[Batch, dict[str, float]]) -> tuple[Loss, _HelperResult | None]:
        """Adds the gradients of one micro-batch to this process's; a helper starts from zero, in its outbox."""
        batch, terms = item
        helper = rank()
        if helper:  # forked at any moment, it may have inherited loads
            for group, out in zip(self.optimizer.groups, self._outboxes[helper - 1], strict=True):
                if group.grad is not out:
                    group.add_into(out)
            self.optimizer.zero_grad()
            balance.clear(self.gates)
        self.model.train()
        rows, length = batch.tokens_BT.shape
        self._shape = rows, length, batch.segments_BT is not None
        batch = self._transfer(batch)
        balance.restrict(self.gates, None if self.plan.counts_padding else batch.read_BT)
        loss = self.objective(self.model, batch, **terms)
        with balance.uncounted(self.gates):
            loss.total.backward()
        balance.restrict(self.gates, None)
        loss = replace(loss, total=loss.total.detach())
        if helper == 0:
            return loss, None
        return loss, _HelperResult(helper, {name: gate.load_E.clone() for name, gate in self.gates.items()})

    def _collect(self, result: _HelperResult) -> None:
        """Adds what a helper computed, in the order of the micro-batches."""
        for group, out in zip(self.optimizer.groups, self._outboxes[result.helper - 1], strict=True):
            group.grad += out
        for name, load_E in result.loads.items():
            self.gates[name].load_E += load_E

    def _discard(self) -> None:
        self.skipped += 1
        self.optimizer.zero_grad()
        balance.clear(self.gates)

    def _bad_step(self, sums: Sums, terms: dict[str, float]) -> dict[str, float]:
        """Explains and skips the step; goes back to the last checkpoint if the guard says so."""
        what = self._culprit(sums, terms)
        self._discard()
        what += f" (step {self.step}, rows {self.rows - sums.rows} to {self.rows - 1})"
        self.warn(f"step skipped: {what}")
        if self.guard.bad(what) == guard.ROLL_BACK:
            self._roll_back(what)
        return {"train/skipped": self.skipped}

    def _culprit(self, sums: Sums, terms: dict[str, float]) -> str:
        """Where a non-finite step started to go wrong."""
        totals = torch.stack([loss.total.float() for loss in sums.losses])
        bad = (~totals.isfinite()).nonzero().flatten().tolist()
        if not bad:
            return guard.bad_gradients(self.optimizer.nonfinite_gradients())
        batch = sums.batches[bad[0]]
        with torch.no_grad():
            where = guard.nonfinite_activation(
                self.model, lambda: self.objective(self.model, self._transfer(batch), **terms)
            )
        what = f"loss of micro-batch {bad[0]} is {totals[bad[0]].item()}"
        return what + (f", first in the output of {where}" if where else ", though every module's output is finite")

    def _roll_back(self, what: str) -> None:
        rows, skipped = self.rows, self.skipped
        path = self._restore_latest()
        if path is None:
            raise UserError(f"{self.guard.failures} non-finite steps in a row and no checkpoint to go back to: {what}")
        self.rows, self.skipped = rows, skipped
        self._write()  # with the new cursor: a kill now must not lead to the same rows again
        self.finish()
        self.warn(
            f"{self.guard.failures} non-finite steps in a row: back to {path.name}, continuing with row {rows} "
            f"(rollback {self.guard.rolled_back} of {self.guard.rollbacks})"
        )
