"""Which problems are worth asking: those the policy solves now and then, told by a moving estimate of their pass rate.

A group whose samples are all right or all wrong has no advantage and teaches nothing (R1 eq. 3). The filter keeps
problems whose pass rate lies strictly between 0 and 1: where fewer than half a sample in a group is expected to be
right, or to be wrong, the group is expected to be dead. DeepSeek's reports describe no such filter.

The estimate is an exponential moving average over samples. A problem has its own where its task has a set of problems
that ends, so that it comes again; until it was tried, and where problems never end, that of its family counts (task,
difficulty, language). What nobody has tried is kept. A share of the draws goes to what is left out, since a policy that
learns makes old estimates wrong.

`Estimates` never change: a rollout that is being drawn holds on to those it began with, however long it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

from bessemer.tasks.base import stable_hash

FAMILY_WINDOW = 16
"""How many times as far back the estimate of a family goes as that of one problem."""
FAMILY_FIRST = 4
"""Groups that must have been seen of a family before it says anything: its problems differ among each other."""

Tally = tuple[float, float]
"""(samples, right ones), older ones counting less."""


@dataclass(frozen=True)
class Name:
    """What a problem is known by."""

    family: str
    problem: str | None
    """None where problems do not come again."""


@dataclass(frozen=True)
class Tried:
    """A group of samples as the estimates take it in."""

    name: Name
    right: int
    samples: int


@dataclass(frozen=True)
class Choice:
    """What the filter did in a rollout, and what the rollout tells it."""

    candidates: int = 0
    left_out: int = 0
    """Candidates outside the band."""
    explored: int = 0
    """Problems asked all the same, because they were left out."""
    tried: tuple[Tried, ...] = ()

    def plus(self, other: Choice) -> Choice:
        return Choice(
            self.candidates + other.candidates, self.left_out + other.left_out, self.explored + other.explored,
            self.tried + other.tried,
        )  # fmt: skip

    def told(self) -> dict[str, Any]:
        """As JSON."""
        tried = [[one.name.family, one.name.problem, one.right, one.samples] for one in self.tried]
        return {
            "candidates": self.candidates, "left_out": self.left_out, "explored": self.explored, "tried": tried,
        }  # fmt: skip

    @staticmethod
    def read(told: Mapping[str, Any]) -> Choice:
        tried = [Tried(Name(family, problem), right, samples) for family, problem, right, samples in told["tried"]]
        return Choice(told["candidates"], told["left_out"], told["explored"], tuple(tried))

    def figures(self) -> dict[str, float]:
        """Shares of the candidates, and of the problems asked."""
        return {
            "rl/filter_left_out": self.left_out / max(1, self.candidates),
            "rl/filter_explored": self.explored / max(1, len(self.tried)),
        }


@dataclass(frozen=True)
class Estimates:
    """Pass rates after some history. `group` is the samples of a problem G, `window` how many groups an estimate goes
    back over: of two groups so far apart the older counts 1/e."""

    group: int
    window: float
    problems: Mapping[str, Tally] = field(default_factory=dict)
    families: Mapping[str, Tally] = field(default_factory=dict)

    def rate(self, name: Name) -> float | None:
        """None where nothing, or too little, is known."""
        if name.problem in self.problems:
            return _rate(self.problems[name.problem])
        if self.families.get(name.family, (0.0, 0.0))[0] >= self._first:
            return _rate(self.families[name.family])
        return None

    def keeps(self, name: Name) -> bool:
        """Whether at least half a sample of a group is expected to be right, and half a one to be wrong."""
        rate, margin = self.rate(name), 0.5 / self.group
        return rate is None or margin < rate < 1 - margin

    def after(self, tried: Sequence[Tried]) -> Estimates:
        """With these groups seen, in their order."""
        problems, families = dict(self.problems), dict(self.families)
        for one in tried:
            if one.name.problem is not None:
                _see(problems, one.name.problem, one, self.group * self.window)
            _see(families, one.name.family, one, self.group * self.window * FAMILY_WINDOW)
        return Estimates(self.group, self.window, problems, families)

    def figures(self) -> dict[str, float]:
        """The estimate of every family that says something."""
        told = {name: tally for name, tally in sorted(self.families.items()) if tally[0] >= self._first}
        return {f"rl/pass/{name}": _rate(tally) for name, tally in told.items()}

    @property
    def _first(self) -> float:
        """Weight of FAMILY_FIRST groups. The newest of them counts whole, those before it less."""
        fade = exp(-1 / (self.window * FAMILY_WINDOW))
        return self.group * sum(fade**age for age in range(FAMILY_FIRST)) * (1 - 1e-9)


def choose(
    estimates: Estimates, names: Sequence[Name], wanted: int, explore: float, seed: int
) -> tuple[list[int], Choice]:
    """`wanted` places of the candidates, in their order: of those kept the first; each of the draws is with probability
    `explore` one of those left out. Where either runs short the other fills up. Depends on the arguments alone."""
    kept = [place for place, name in enumerate(names) if estimates.keeps(name)]
    out = sorted(set(range(len(names))) - set(kept))
    found, explored, left_out = [], 0, len(out)
    for draw in range(wanted):
        explores = stable_hash("explore", seed, draw) < explore * 2**64
        if out and (explores or not kept):
            explored += 1
            found.append(out.pop(0))
        else:
            found.append(kept.pop(0))
    return sorted(found), Choice(len(names), left_out, explored)


def _see(tallies: dict[str, Tally], name: str, one: Tried, window: float) -> None:
    weight, right = tallies.get(name, (0.0, 0.0))
    fade = exp(-one.samples / window)
    tallies[name] = (weight * fade + one.samples, right * fade + one.right)


def _rate(tally: Tally) -> float:
    return tally[1] / tally[0]
