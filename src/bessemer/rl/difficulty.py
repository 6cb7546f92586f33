"""The difficulty filter: samples problems that the policy solves sometimes, by a moving estimate of their pass rate.

A group whose samples are all right or all wrong has no advantage and teaches nothing (R1 eq. 3). The filter keeps
problems whose pass rate lies strictly between 0 and 1: if at most half a sample of a group is expected to be right, or
to be wrong, the group is expected to be dead. DeepSeek's reports describe no such filter.

The estimate is an exponential moving average over samples. A problem has its own if its task has a finite set of
problems, so that problems recur. Until it is first sampled, and in tasks whose problems never recur, the estimate of
its family (task, difficulty, language) counts. A problem without an estimate is kept. A share of the selection explores
left-out problems, since estimates go stale as the policy learns.

`Estimates` are immutable: a pending rollout keeps those it started with. The loop updates them with each rollout it
takes from the queue. Rollouts that start before the update have started by then, so selection never depends on timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

from bessemer.config.rl import RLConfig
from bessemer.eval.contamination import identity
from bessemer.tasks.base import Problem, Task, stable_hash
from bessemer.train.trainer import Trainer

FAMILY_WINDOW = 16
"""The window of a family's estimate, as a multiple of one problem's."""
FAMILY_FIRST = 4
"""Groups of a family before its estimate counts: its problems differ from one another."""
KEY = "difficulty"
"""Key of the estimates in the trainer's checkpoint."""

PassTally = tuple[float, float]
"""(samples, right samples); older samples count less."""


@dataclass(frozen=True)
class ProblemKey:
    """The identity of a problem for the estimates."""

    family: str
    problem: str | None
    """None if the task's problems never recur."""


@dataclass(frozen=True)
class PassCount:
    """The result of one group of samples."""

    key: ProblemKey
    right: float
    """Right samples; a partly right one counts as the credit that it earned."""
    samples: int


@dataclass(frozen=True)
class Selection:
    """What the filter did in a rollout, and the pass counts of all its groups."""

    candidates: int = 0
    left_out: int = 0
    """Candidates outside the band."""
    explored: int = 0
    """Left-out problems that were sampled to keep their estimates fresh."""
    counts: tuple[PassCount, ...] = ()

    def __add__(self, other: Selection) -> Selection:
        return Selection(
            self.candidates + other.candidates,
            self.left_out + other.left_out,
            self.explored + other.explored,
            self.counts + other.counts,
        )

    def to_json(self) -> dict[str, Any]:
        tried = [[count.key.family, count.key.problem, count.right, count.samples] for count in self.counts]
        return {"candidates": self.candidates, "left_out": self.left_out, "explored": self.explored, "tried": tried}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Selection:
        counts = [
            PassCount(ProblemKey(family, problem), right, samples)
            for family, problem, right, samples in values["tried"]
        ]
        return Selection(values["candidates"], values["left_out"], values["explored"], tuple(counts))

    def metrics(self) -> dict[str, float]:
        """Left-out problems as a share of the candidates, explored ones as a share of the problems sampled."""
        return {
            "rl/filter_left_out": self.left_out / max(1, self.candidates),
            "rl/filter_explored": self.explored / max(1, len(self.counts)),
        }


@dataclass(frozen=True)
class Estimates:
    """Estimated pass rates. `group` is G, the samples per problem. `window` is the decay length in groups: a group that
    is so much older than another counts 1/e as much."""

    group: int
    window: float
    problems: Mapping[str, PassTally] = field(default_factory=dict)
    families: Mapping[str, PassTally] = field(default_factory=dict)

    def rate(self, key: ProblemKey) -> float | None:
        """The estimated pass rate; None if too little is known."""
        if key.problem is not None and key.problem in self.problems:
            return _rate(self.problems[key.problem])
        if self.families.get(key.family, (0.0, 0.0))[0] >= self._first:
            return _rate(self.families[key.family])
        return None

    def keeps(self, key: ProblemKey) -> bool:
        """Whether more than half a sample of a group is expected to be right, and more than half to be wrong."""
        rate, margin = self.rate(key), 0.5 / self.group
        return rate is None or margin < rate < 1 - margin

    def updated(self, counts: Sequence[PassCount]) -> Estimates:
        """The estimates after these groups, in order."""
        problems, families = dict(self.problems), dict(self.families)
        for count in counts:
            if count.key.problem is not None:
                _add(problems, count.key.problem, count, self.group * self.window)
            _add(families, count.key.family, count, self.group * self.window * FAMILY_WINDOW)
        return Estimates(self.group, self.window, problems, families)

    def metrics(self) -> dict[str, float]:
        """The estimate of every family that has one."""
        known = {name: tally for name, tally in sorted(self.families.items()) if tally[0] >= self._first}
        return {f"rl/pass/{name}": _rate(tally) for name, tally in known.items()}

    @property
    def _first(self) -> float:
        """Decayed weight of FAMILY_FIRST groups, the newest of which counts fully."""
        fade = exp(-1 / (self.window * FAMILY_WINDOW))
        return self.group * sum(fade**age for age in range(FAMILY_FIRST)) * (1 - 1e-9)


def select(
    estimates: Estimates, keys: Sequence[ProblemKey], count: int, explore: float, seed: int
) -> tuple[list[int], Selection]:
    """Picks `count` candidates, returning their indices in order: the first ones that the filter keeps, each replaced
    with probability `explore` by a left-out one. If either kind runs out, the other fills in."""
    kept = [place for place, key in enumerate(keys) if estimates.keeps(key)]
    out = sorted(set(range(len(keys))) - set(kept))
    places, explored, left_out = [], 0, len(out)
    for n in range(count):
        explores = stable_hash("explore", seed, n) < explore * 2**64
        if out and (explores or not kept):
            explored += 1
            places.append(out.pop(0))
        else:
            places.append(kept.pop(0))
    return sorted(places), Selection(len(keys), left_out, explored)


class DifficultyFilter:
    """The filter of one run. Its estimates are saved in the trainer's checkpoint and restored with the weights. `pool`
    is the number of candidates per sampled problem."""

    def __init__(self, settings: RLConfig, trainer: Trainer) -> None:
        self.settings, self.trainer, self.pool = settings, trainer, settings.filter_pool
        self.estimates = self._no_estimates()
        self._finite: dict[str, bool] = {}

    def select(
        self, estimates: Estimates, candidates: list[tuple[Task, Problem]], count: int, seed: int
    ) -> tuple[list[tuple[Task, Problem]], Selection]:
        keys = [self.key(task, problem) for task, problem in candidates]
        places, selection = select(estimates, keys, count, self.settings.filter_explore, seed)
        return [candidates[place] for place in places], selection

    def key(self, task: Task, problem: Problem) -> ProblemKey:
        """The key of a problem does not depend on its wording, but it does on its language."""
        if task.name not in self._finite:
            self._finite[task.name] = task.size("train") is not None
        difficulty = problem.meta.get("difficulty")
        family = [task.name, *([] if difficulty is None else [difficulty]), problem.language]
        own = None
        if self._finite[task.name]:
            own = f"{stable_hash(task.name, problem.language, identity(problem)):016x}"
        return ProblemKey(" ".join(map(str, family)), own)

    def update(self, selection: Selection) -> dict[str, float]:
        """Updates the estimates with a rollout; returns metrics."""
        self.estimates = self.estimates.updated(selection.counts)
        stored = {"problems": dict(self.estimates.problems), "families": dict(self.estimates.families)}
        self.trainer.extras = self.trainer.extras | {KEY: stored}
        return selection.metrics() | self.estimates.metrics()

    def restore(self) -> None:
        """Restores the estimates of the checkpoint that the trainer resumed from."""
        self.estimates = self._no_estimates()
        if KEY in self.trainer.extras:
            stored = {
                name: {key: (weight, right) for key, (weight, right) in tallies.items()}
                for name, tallies in self.trainer.extras[KEY].items()
            }
            self.estimates = Estimates(self.estimates.group, self.estimates.window, **stored)

    def _no_estimates(self) -> Estimates:
        return Estimates(self.settings.samples, self.settings.filter_window)


def _add(tallies: dict[str, PassTally], name: str, count: PassCount, window: float) -> None:
    weight, right = tallies.get(name, (0.0, 0.0))
    fade = exp(-count.samples / window)
    tallies[name] = (weight * fade + count.samples, right * fade + count.right)


def _rate(tally: PassTally) -> float:
    return tally[1] / tally[0]
