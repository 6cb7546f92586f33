"""Training steps on a GPU: batches are read and sent ahead, steps may repeat bit for bit, and errors are explained. On
other devices batches are read ahead if the plan says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bessemer.addons.accelerate import determinism, gpu_faults
from bessemer.addons.accelerate.transfer import Position, ReadAhead, Transfer
from bessemer.errors import UserError
from bessemer.train.step_device import StepDevice

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.train.checkpointed import Checkpointed


def steps_of(trainer: Checkpointed) -> StepDevice:
    """GPUSteps where they make a difference."""
    setting = trainer.plan.read_ahead
    ahead = trainer.device.type == "cuda" if setting is None else setting
    return GPUSteps(trainer, ahead) if ahead or trainer.device.type == "cuda" else StepDevice(trainer)


class GPUSteps(StepDevice):
    def __init__(self, trainer: Checkpointed, ahead: bool) -> None:
        super().__init__(trainer)
        self._transfer = Transfer(trainer.device)
        self._ahead = ReadAhead(lambda position: trainer.read(*position)) if ahead else None

    def transfer(self, batch: Batch) -> Batch:
        return self._transfer(batch)

    def micro_batches(self) -> Iterator[Batch]:
        if self._ahead is None:
            yield from super().micro_batches()
            return
        trainer, position = self.trainer, Position(self.trainer.tokens, self.trainer.rows)
        batches, rows = self._ahead.take(position), trainer.rows_of_step(position.tokens)
        following = Position(position.tokens + rows * batches[0].tokens_BT.shape[1], position.rows + rows)
        if following.tokens < trainer.plan.tokens:
            self._ahead.begin(following)
        yield from batches

    def run(self, step: Callable[[], dict[str, float]]) -> dict[str, float]:
        return determinism.held(step)()

    def too_large(self, mtp: bool) -> UserError:
        trainer = self.trainer
        return gpu_faults.of_step(
            trainer.device, trainer.optimizer.groups, trainer.model, trainer.config, trainer.shape,
            trainer.plan.compute_dtype.itemsize, mtp,
        )  # fmt: skip

    def stop(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
