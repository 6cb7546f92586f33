"""Which problems a rollout asks: all that are due, or with `difficulty_filter` those of a pool worth asking.

What decides about rollout n is what was paid up to rollout n - 1 - ahead: `Draw.begin` takes the estimates of its
moment, and the loop lets them see a rollout only once it is taken, when all that begin before it have begun. So nothing
depends on who drew how fast. The estimates lie in the trainer's checkpoint and go back to it with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from bessemer.config.rl import RLConfig
from bessemer.eval.contamination import identity
from bessemer.rl.difficulty import Choice, Estimates, Name, Tried, choose
from bessemer.rl.reward import Reward
from bessemer.rl.rollout import Sampled
from bessemer.tasks.base import Problem, Task, stable_hash
from bessemer.train.trainer import Trainer

KEY = "difficulty"


class Pick:
    """`pool` is how many candidates there are for each problem asked; 1 without the filter: all are asked."""

    def __init__(self, settings: RLConfig, trainer: Trainer) -> None:
        self.settings, self.trainer = settings, trainer
        self.on = settings.difficulty_filter
        self.pool = settings.filter_pool if self.on else 1
        self.estimates = self._none()
        self._ends: dict[str, bool] = {}

    def choose(
        self, estimates: Estimates, candidates: list[tuple[Task, Problem]], wanted: int, seed: int
    ) -> tuple[list[tuple[Task, Problem]], Choice]:
        if not self.on:
            return candidates, Choice()
        names = [self._name(task, problem) for task, problem in candidates]
        places, choice = choose(estimates, names, wanted, self.settings.filter_explore, seed)
        return [candidates[place] for place in places], choice

    def tried(
        self, asked: Sequence[tuple[Task, Problem]], groups: Sequence[Sequence[Sampled]], reward: Reward
    ) -> Choice:
        """What the groups of these problems tell."""
        if not self.on:
            return Choice()
        found = [
            Tried(self._name(task, problem), sum(map(reward.passed, group)), len(group))
            for (task, problem), group in zip(asked, groups, strict=True)
        ]
        return Choice(tried=tuple(found))

    def see(self, choice: Choice) -> dict[str, float]:
        """Takes a rollout in; what to log of it."""
        if not self.on:
            return {}
        self.estimates = self.estimates.after(choice.tried)
        kept = {"problems": dict(self.estimates.problems), "families": dict(self.estimates.families)}
        self.trainer.extras = self.trainer.extras | {KEY: kept}
        return choice.figures() | self.estimates.figures()

    def follow(self, before: int) -> None:
        """After a step that began at step `before`."""
        if self.trainer.step <= before:  # the guard went back to a checkpoint
            self.load()

    def load(self) -> None:
        """As they were at the checkpoint the trainer came from."""
        self.estimates = self._none()
        if self.on and KEY in self.trainer.extras:
            kept = {
                name: {key: (weight, right) for key, (weight, right) in tallies.items()}
                for name, tallies in self.trainer.extras[KEY].items()
            }
            self.estimates = Estimates(self.estimates.group, self.estimates.window, **kept)

    def _none(self) -> Estimates:
        return Estimates(self.settings.samples, self.settings.filter_window)

    def _name(self, task: Task, problem: Problem) -> Name:
        """A problem is the same however it is worded, but not in another language."""
        if task.name not in self._ends:
            self._ends[task.name] = task.size("train") is not None
        difficulty = problem.meta.get("difficulty")
        family = [task.name, *([] if difficulty is None else [difficulty]), problem.language]
        own = f"{stable_hash(task.name, problem.language, identity(problem)):016x}" if self._ends[task.name] else None
        return Name(" ".join(map(str, family)), own)
