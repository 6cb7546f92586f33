"""What an option adds to the loop of an RL stage. An option that is off has no component.

A recipe adds components of its own as `hooks`; the other keys of a hook's table are keyword arguments of its class:

    [[stage.hooks]]
    name = "lengths.py:Lengths"
    every = 10
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bessemer import plugins

if TYPE_CHECKING:
    from bessemer.config.rl import RLConfig
    from bessemer.data.batch import Batch
    from bessemer.rl.parts import LoopParts
    from bessemer.rl.rollout import Group, Rollout
    from bessemer.tasks import Problem, Task

Metrics = dict[str, float]
Problems = list[tuple["Task", "Problem"]]
Select = Callable[[Problems, int, int], Problems]
"""(candidates, how many, seed of the round) -> the problems that are asked."""


class Component:
    """Every method may be left out; all ranks call it. The arguments of a subclass after the loop are settings, which
    are keyword arguments. What must survive a kill belongs into `loop.trainer.extras` (JSON) or `extra_tensors`."""

    options: ClassVar[Mapping[str, bool]] = {}
    """What the sampler is asked for beside the samples: options of `Engine.generate`, such as record_routing."""
    reads: ClassVar[int] = 0
    trains: ClassVar[int] = 0
    """For estimates: passes over every rollout with a network of the policy's size, forward alone, and with a
    gradient."""
    exports: ClassVar[bool] = False
    """It writes the samples as conversations for an SFT stage."""
    everywhere: ClassVar[bool] = True
    """It reads tokens or texts of samples, so that on many ranks all have all of them."""

    def __init__(self, loop: LoopParts) -> None:
        pass

    ahead: ClassVar[bool] = False
    """Its rollouts may be sampled before the updates of the one before."""

    @staticmethod
    def check(config: RLConfig, **settings: Any) -> None:
        """UserError for a stage that it cannot serve."""

    @staticmethod
    def pool(**settings: Any) -> int:
        """Candidates per problem of the tasks, for `selector`."""
        return 1

    def restore(self) -> None:
        """The trainer is at a checkpoint, or at the start."""

    def selector(self) -> Select | None:
        """What chooses the problems of a rollout that starts now. It must not depend on later events, since its rounds
        may run during the updates of the rollout before. None: all candidates are asked."""
        return None

    def take(self, number: int) -> Rollout | None:
        """Rollout `number`, if this component brings the rollouts. None: it is sampled now."""
        return None

    def sampled(self, number: int, rollout: Rollout) -> Metrics:
        """Rollout `number` is sampled and scored; its advantages are not yet set."""
        return {}

    def before_updates(self, batches: list[Batch]) -> Metrics:
        """This rank's micro-batches of the whole rollout; metrics are means over their trained tokens."""
        return {}

    def before_step(self, batches: list[Batch]) -> None:
        """The micro-batches of the next optimizer step."""

    def after_step(self) -> None:
        """The step is done; not called if the guard went back to a checkpoint, which `restore` follows."""

    def before_save(self, number: int) -> None:
        """A checkpoint is written now, and rollout `number` comes next."""

    def metrics(self) -> Metrics:
        """After the last update of a rollout."""
        return {}

    def finish(self, folder: Path) -> None:
        """The last rollout is done; `folder` is the stage's."""


def hooks_of(config: RLConfig) -> list[tuple[type[Component], dict[str, Any]]]:
    """(class, settings) of a stage's hooks. UserError for a name that leads to no component."""
    return [(plugins.find("hooks", hook.name, derives=Component), hook.settings) for hook in config.hooks]


class Advantage(Component):
    """An advantage that a function cannot compute: with a network of its own, or per token with the tokenizer."""

    within_groups = True
    """Whether samples are compared within their group alone, so that one with equal rewards teaches nothing."""

    def assign(self, groups: Sequence[Group]) -> Metrics:
        """Sets `advantage` of every sample: a number, or a list of one per trained token."""
        raise NotImplementedError
