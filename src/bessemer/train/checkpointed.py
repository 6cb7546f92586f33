"""The trainer's checkpoints: everything that a kill must not lose.

Every checkpoint holds weights, moments, biases, random states, counters, the data cursor and what others put into
`extras`, so a run that is stopped and resumed equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bessemer.config.units import show_seconds
from bessemer.model import ops
from bessemer.model.gate import Gate
from bessemer.model.protocol import LanguageModel
from bessemer.train import checkpoint, guard
from bessemer.train.objective import Objective
from bessemer.train.optimizer import Optimizer, load_exactly
from bessemer.train.plan import TrainingPlan

if TYPE_CHECKING:
    from bessemer.config.training import OptimizerConfig
    from bessemer.data.batch import Batch

SHARE = 0.05
"""The largest share of the time that timed checkpoints take: of the training thread, and of the disk."""
COUNTERS = ("step", "tokens", "rows", "skipped")
RARE = 300.0
"""Seconds between checkpoints above which a run says that they are rarer than `save_seconds`."""


class CheckpointStore:
    """Where and how a trainer's checkpoints are written: by the training thread, while it waits. An add-on that writes
    while training goes on takes its place by the hook `checkpoint-store`."""

    def __init__(self, trainer: Checkpointed) -> None:
        assert trainer.state_dir is not None, "a trainer without a folder has no store"
        self.folder = trainer.state_dir

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return False

    @property
    def seconds(self) -> float:
        """Seconds for which the last one was written beside the training."""
        return 0.0

    def write(self, trainer: Checkpointed) -> Path:
        """Writes the trainer's state, or starts to, and returns where to."""
        return checkpoint.save(self.folder, trainer.step, trainer.state(), trainer.plan.keep)

    def restore(self, trainer: Checkpointed) -> Path | None:
        """Goes back to the newest intact checkpoint, whatever layout wrote it; returns its path, None without one."""
        latest = checkpoint.latest(self.folder, trainer.model_config, trainer.warn, trainer.restore)
        return None if latest is None else latest[0]

    def poll(self) -> None:
        """Raises the error of a write that has failed, if this process may raise it alone."""

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk; raises the error if it could not be written."""

    def close(self) -> None:
        """Called after another error; raises nothing. No write may overlap with the next attempt."""


class Checkpointed:
    """The half of `Trainer` that saves and resumes. The other half sets the attributes declared here."""

    model: LanguageModel
    optimizer: Optimizer
    gates: dict[str, Gate]
    guard: guard.StepGuard
    config: OptimizerConfig
    model_config: dict[str, Any]
    generators: dict[str, np.random.Generator]
    plan: TrainingPlan
    objective: Objective
    asked_to_stop: Callable[[], bool]
    state_dir: Path | None
    shape: tuple[int, int, bool]
    collective: Any
    on_device: Any
    """`collective.Collective` and `step_device.StepDevice`, which build on this file."""
    warn: Callable[[str], None]
    device: torch.device
    compute_dtype: torch.dtype
    step: int
    tokens: int
    rows: int
    skipped: int

    def __init__(self, save_steps: int | None) -> None:
        self.save_steps = save_steps
        self.extras: dict[str, Any] = {}
        self.extra_tensors: dict[str, Tensor] = {}
        self.companions: dict[str, Checkpointed] = {}
        """Trainers by name whose weights and moments are saved in this one's checkpoints, so that after a kill all
        resume from the same step. Fill it before `start`."""
        self.before_write: Callable[[], None] = lambda: None
        """Called before a checkpoint is written, to complete `extras` and `extra_tensors`."""
        self._saved_at, self._saved_step = time.monotonic(), -1
        self._save_cost = 0.0
        """Seconds that training waited for the last checkpoint."""
        self._rare = False
        self.store: CheckpointStore | None = None
        """None: this trainer saves nothing itself."""

    def rows_of_step(self, tokens: int) -> int:
        """Rows of the step that begins after so many tokens."""
        raise NotImplementedError

    def read(self, tokens: int, first_row: int) -> Iterator[Batch]:
        """The micro-batches of this process in that step."""
        raise NotImplementedError

    def start(self) -> bool:
        """Resumes (True), or writes the first checkpoint (False), so that there is always one to go back to."""
        if self._restore_latest() is not None:
            self._saved_step = self.step
            return True
        self.save()
        return False

    def _restore_latest(self) -> Path | None:
        self.finish()
        return None if self.store is None else self.store.restore(self)

    def finish(self) -> None:
        """Waits for the checkpoint that is still being written, and raises its error."""
        if self.store is not None:
            self.store.finish()

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def save_if_due(self) -> None:
        """Saves if a checkpoint is due by steps or by seconds; never within a streak of bad steps."""
        if self.store is not None:
            self.store.poll()
        steps = self.save_steps
        due = (steps is not None and self.step % steps == 0) or self.collective.is_due(self.due_by_time)
        if due and self.guard.streak == 0:
            self.save()
            if self.config.save_seconds == 0:
                self.finish()

    def due_by_time(self) -> bool:
        """Whether `save_seconds` have passed and the last checkpoint is written. Training waits for at most a twentieth
        of its time, and the disk is written to for at most a twentieth. With 0 seconds, true after every step, and
        training waits until it is written."""
        seconds = self.config.save_seconds
        if seconds == 0:
            return True
        if self.store is None or self.store.busy:
            return False
        interval = max(seconds, max(self._save_cost, self.store.seconds) / SHARE)
        if interval > max(seconds, RARE) and not self._rare:
            self._rare = True
            self.warn(
                f"a checkpoint takes {interval * SHARE:.0f} s to write, so one is written every "
                f"{show_seconds(interval)}, not every {show_seconds(seconds)} (save_seconds); a kill loses what was "
                "trained since"
            )
        return time.monotonic() - self._saved_at >= interval

    def save(self) -> Path | None:
        """Starts writing a checkpoint of this step unless there is one already; `finish` waits for it."""
        if self.store is None or self._saved_step == self.step:
            return None
        self.guard.saved()
        return self._write()

    def _write(self) -> Path:
        assert self.store is not None, "save() has checked it"
        start = time.monotonic()
        self.before_write()
        path = self.store.write(self)
        self._saved_at, self._saved_step = time.monotonic(), self.step
        self._save_cost = self._saved_at - start
        return path

    def state(self) -> checkpoint.State:
        random_tensors, random_values = guard.capture_rng(self.generators)
        theirs = {
            f"{name}/{stem}/{key}": tensor
            for name, other in self.companions.items()
            for stem, tensors in (("model", other._weights()), ("optimizer", other.optimizer.state_dict()))
            for key, tensor in tensors.items()
        }
        return checkpoint.State(
            tensors={
                "model": self.optimizer.masters() | self._buffers(),
                "optimizer": self.optimizer.state_dict(),
                "gates": self.gate_tensors(),
                "rng": random_tensors,
                "extras": self.extra_tensors | theirs,
            },
            counters=self.counters() | {"rng": random_values, "extras": self.extras},
            config=self.model_config,
        )

    def counters(self) -> dict[str, Any]:
        computed = {"backend": ops.backend(self.device), "dtype": str(self.compute_dtype).removeprefix("torch.")}
        return {name: getattr(self, name) for name in COUNTERS} | computed

    def restore_counters(self, saved: dict[str, Any]) -> None:
        for name in COUNTERS:
            setattr(self, name, saved[name])
        before, now = saved.get("backend"), ops.backend(self.device)
        if before not in (None, now):  # None: from before there were kernels
            self.warn(
                f"step {self.step} was saved on {before}, this run continues on {now}: results differ by rounding"
            )

    def restore(self, state: checkpoint.State) -> None:
        load_exactly(self.optimizer.masters() | self._buffers(), state.tensors["model"], "model")
        self.optimizer.refresh()
        self.optimizer.load_state_dict(state.tensors["optimizer"])
        load_exactly(self.gate_tensors(), state.tensors["gates"], "gate")
        guard.restore_rng(state.tensors["rng"], state.counters["rng"], self.generators)
        extras, elsewhere = state.tensors["extras"], tuple(f"{name}/" for name in self.companions)
        self.extra_tensors = {key: extras[key] for key in extras if not key.startswith(elsewhere)}
        self.extras = state.counters["extras"]
        self.restore_counters(state.counters)
        for name, other in self.companions.items():
            companion_tensors = checkpoint.Under(extras, f"{name}/")
            if companion_tensors or self.step or other.step:  # the first may be from before it had companions
                other._restore_companion(companion_tensors, name)
            other.step = self.step

    def _restore_companion(self, tensors: Mapping[str, Tensor], name: str) -> None:
        load_exactly(self._weights(), checkpoint.Under(tensors, "model/"), name)
        self.optimizer.refresh()
        self.optimizer.load_state_dict(checkpoint.Under(tensors, "optimizer/"))

    def _weights(self) -> dict[str, Tensor]:
        """Everything that forward computes with, as masters where it is trained."""
        return self.model.state_dict() | self.optimizer.masters()

    def gate_tensors(self) -> dict[str, Tensor]:
        tensors = {f"load/{name}": gate.load_E for name, gate in self.gates.items()}
        return tensors | {f"bias/{name}": g.bias_E for name, g in self.gates.items() if g.bias_E is not None}

    def _buffers(self) -> dict[str, Tensor]:
        """Persistent buffers other than those of the gates."""
        persistent, gates = self.model.state_dict().keys(), {id(tensor) for tensor in self.gate_tensors().values()}
        return {name: b for name, b in self.model.named_buffers() if name in persistent and id(b) not in gates}
