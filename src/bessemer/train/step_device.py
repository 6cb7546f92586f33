"""How training steps use a device. `StepDevice` serves any; an add-on that knows more of GPUs takes its place, by the
hook `step-device`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bessemer import plugins
from bessemer.errors import UserError

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.train.checkpointed import Checkpointed


class StepDevice:
    """Of one trainer."""

    def __init__(self, trainer: Checkpointed) -> None:
        self.trainer = trainer

    def transfer(self, batch: Batch) -> Batch:
        """The batch where the trainer computes."""
        return batch.to(self.trainer.device)

    def micro_batches(self) -> Iterator[Batch]:
        """Those of the step that begins now; `Trainer.read` reads the step that begins anywhere."""
        return self.trainer.read(self.trainer.tokens, self.trainer.rows)

    def run(self, step: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Runs a training step; returns its metrics."""
        return step()

    def too_large(self, mtp: bool) -> UserError:
        """The error for a step that ran out of memory."""
        name = self.trainer.config.name
        return UserError(f'stage "{name}" ran out of memory; lower micro_rows or micro_tokens, or shorten the rows')

    def stop(self) -> None:
        """Called when `Trainer.run` ends."""


def of_trainer(trainer: Checkpointed) -> StepDevice:
    return (plugins.hook("step-device") or StepDevice)(trainer)
