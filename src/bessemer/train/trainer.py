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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.train import balance, guard, step_device
from bessemer.train.checkpointed import Checkpointed
from bessemer.train.collective import Collective
from bessemer.train.objective import Objective, Sums
from bessemer.train.plan import TrainingPlan

if TYPE_CHECKING:
    from bessemer.config.training import OptimizerConfig
    from bessemer.data.batch import Batch


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
        collective: Collective | None = None,
    ):
        self.model, self.objective, self.batches = model, objective, batches
        self.config, self.plan, self.compute_dtype = config, plan, plan.compute_dtype
        self.collective = collective or Collective()
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.log, self.on_step, self.warn = log, on_step, warn
        self.asked_to_stop = stop
        self.model_config, self.generators = model_config or {}, generators or {}
        self.instruments = step_device.instruments(
            config, model, next(model.parameters()).device, plan.compute_dtype,
            None if self.state_dir is None else self.state_dir / "profile", warn,
            self.collective.devices, self.collective.me,
        )  # fmt: skip
        self.optimizer = self.collective.optimizer(
            model, plan.workers, compute_dtype=plan.compute_dtype, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay, moments_dtype=getattr(torch, config.moments), ema_decay=config.ema_decay,
            stacked=model.hidden_matrices() if config.optimizer == "muon" else None, idle=plan.idle,
        )  # fmt: skip
        self.gates = self.collective.gates(model)
        self.guard = guard.StepGuard(plan.failures, plan.rollbacks)
        self.step = self.tokens = self.rows = self.skipped = 0
        self.loads: dict[str, Tensor] = {}
        """Tokens per expert of the last step, by gate."""
        self.shape = (1, 1, False)
        """Rows and length of the micro-batch that was computed last."""
        self.device = next(model.parameters()).device
        self.reading = 0
        """Consumed tokens at the beginning of the step whose batches are being read."""
        self.on_device = step_device.of_trainer(self)
        super().__init__(plan.save_steps)
        self.collective.join(self)
        self.store = None if self.state_dir is None else self.collective.store(self)
        if plan.gamma(0) and not self.collective.has_biases(self.gates):
            self.warn("gamma has no effect: no layer of this model has a routing bias (set gamma to 0)")

    def stop(self) -> bool:
        """Whether to stop after this step."""
        return self.collective.stops(self.asked_to_stop)

    def run(self) -> bool:
        """Trains to the end (True) or until `stop` (False); resumes from the newest checkpoint if there is one."""
        try:
            return self._run()
        finally:
            self.on_device.stop()
            self.close()

    def _run(self) -> bool:
        assert self.batches is not None, "run() needs batches; without them call update()"
        self.start()
        while self.tokens < self.plan.tokens:
            values = self.update(self.on_device.micro_batches(), settle=False)
            self.log(self.step, self.tokens, values)
            for hook in self.on_step:
                hook(self)
            if self.stop():
                self.save()
                self.finish()
                self.optimizer.settle()
                return False
            self.save_if_due()
        self.save()
        self.finish()
        self.optimizer.settle()
        return True

    def rows_of_step(self, tokens: int) -> int:
        rows = int(self.plan.batch_rows(tokens) * self.plan.row_scale(tokens))
        if rows < 1:
            raise UserError(f"batch_rows is {rows} at {tokens} tokens; it must be at least 1")
        return rows

    def _rows_of_forward(self, tokens: int) -> int:
        return max(1, int(self.config.micro_rows * self.plan.row_scale(tokens)))

    def read(self, tokens: int, first_row: int) -> Iterator[Batch]:
        """The micro-batches of this process in the step that begins after so many tokens, with this row."""
        assert self.batches is not None, "run() has checked it"
        self.reading = tokens
        for part in self.collective.parts(self.rows_of_step(tokens), self._rows_of_forward(tokens)):
            batch = self.batches(first_row + part.start, max(1, len(part)))
            yield batch if part else batch.as_filler()  # the last step of a run may have few rows

    def update(self, micro_batches: Iterable[Batch], settle: bool = True) -> dict[str, float]:
        """One optimizer step; returns what to log. A non-finite step is skipped and may roll the run back (`guard`).
        Without `settle` the new weights may still be under way (`Optimizer.settle`)."""
        with self.instruments.step(self.step + 1):
            values = self.on_device.run(lambda: self._update(micro_batches))
        if settle:
            self.optimizer.settle()
        return values

    def _update(self, micro_batches: Iterable[Batch]) -> dict[str, float]:
        start = time.monotonic()
        terms = {name: schedule(self.tokens) for name, schedule in self.plan.terms.items()}
        lr = self.config.learning_rate(self.tokens, self.step, self.plan.tokens)
        gamma = self.plan.gamma(self.tokens)
        self.model.train()
        try:
            sums = self.collective.accumulate(micro_batches, terms)
            norm = float(self.optimizer.grad_norm())
        except torch.OutOfMemoryError as error:
            raise self.on_device.too_large(bool(terms.get("mtp_lambda"))) from error
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

    def _discard(self) -> None:
        self.skipped += 1
        self.optimizer.zero_grad()
        balance.clear(self.gates)

    def _bad_step(self, sums: Sums, terms: dict[str, float]) -> dict[str, float]:
        """Explains and skips the step; goes back to the last checkpoint if the guard says so."""
        cause = self.collective.culprit(sums, terms)
        self._discard()
        cause += f" (step {self.step}, rows {self.rows - sums.rows} to {self.rows - 1})"
        self.warn(f"step skipped: {cause}")
        if self.guard.bad(cause) == guard.ROLL_BACK:
            self._roll_back(cause)
        return {"train/skipped": self.skipped}

    def _roll_back(self, cause: str) -> None:
        rows, skipped = self.rows, self.skipped
        path = self._restore_latest()
        if path is None:
            raise UserError(f"{self.guard.failures} non-finite steps in a row and no checkpoint to go back to: {cause}")
        self.rows, self.skipped = rows, skipped
        self._write()  # with the new cursor: a kill now must not lead to the same rows again
        self.finish()
        self.warn(
            f"{self.guard.failures} non-finite steps in a row: back to {path.name}, continuing with row {rows} "
            f"(rollback {self.guard.rolled_back} of {self.guard.rollbacks})"
        )
