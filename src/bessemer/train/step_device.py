"""How training steps use a device, and what measures them. An add-on that knows more of GPUs takes the place of
`StepDevice` by the hook `step-device`, one that measures that of `Unmeasured` by `instruments`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from bessemer import plugins
from bessemer.errors import UserError

if TYPE_CHECKING:
    from bessemer.config.training import OptimizerConfig
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


class Unmeasured:
    """The instruments of a trainer where no add-on brings any (the hook `instruments`)."""

    def step(self, number: int) -> AbstractContextManager[None]:
        """Entered around a step."""
        return nullcontext()

    def values(self, tokens: int, rows: int, mtp: bool, seconds: float) -> dict[str, float]:
        """Metrics of a step."""
        return {}


def instruments(config: OptimizerConfig, *arguments: Any) -> Any:
    """The arguments are those of `instruments.Instruments`."""
    make = plugins.hook("instruments")
    if make is None and config.profile_steps:
        raise UserError(f'stage "{config.name}": profile_steps needs the add-on that watches runs; leave it out')
    return Unmeasured() if make is None else make(config, *arguments)
