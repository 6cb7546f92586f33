"""The runs behind the trained claims: which there are, and the numbers that they gave.

A *part* is a family of runs in its own module, named in the package's `PARTS`. It has

    jobs(tier, seeds) -> list[ArmJob]              what the tier runs; `seeds`: of every arm, instead of the tier's
    measure(job, folder) -> {metric: number}       the numbers of a finished run; `folder` is its run directory
    METRICS: {(claim, metric of rules.toml): Metric}   how a rule's metric follows from the numbers of several arms
    BESIDE: [Beside]                               what else stands on a card, beside its rule
    SHAPE: {tier: shape}                           which shape (or size) of the runs a tier has
    SIZES: {shape: [English, Chinese]}             a shape's size as the page prints it
    SAME: (arm, arm, number)                       the A/A test: what may differ only by chance; or None

To add an experiment, give the module of its part more jobs and an entry in METRICS. To add a family of runs, write such
a module and name it in PARTS. A job with a `recipe` is run by the recipe runner (`run_job`), so it resumes after a
kill; a job without one does its work in `measure`, in its own process. A job with a `donor` starts after the job of
that name and reuses its finished stages, or measures what that job left (`donated`). The command line, the scheduling,
the result files and the cards need nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from bessemer_claims import PARTS
from bessemer_claims.registry import Text, rules
from bessemer_claims.verdict import Measured, SelfTest, self_test

if TYPE_CHECKING:
    from pathlib import Path

    from bessemer.config.recipe import Recipe

Tier = Literal["quick", "default", "full"]
TIERS: tuple[Tier, ...] = get_args(Tier)


@dataclass(frozen=True, eq=False)
class ArmJob:
    """One run: an arm with a seed."""

    part: str
    arm: str
    seed: int
    shape: str
    """Arms are compared only within a shape (and its tokens)."""
    settings: Mapping[str, Any]
    """What the numbers follow from, apart from the seed: results of different settings are not mixed."""
    minutes: float
    """Estimate, on one core."""
    about: str = ""
    recipe: Callable[[], Recipe] | None = None
    donor: str | None = None
    """Name of the job whose finished stages it reuses, or whose run it measures."""
    arms: bool = True
    """Whether it is an arm with its own numbers, not only a donor."""

    @property
    def name(self) -> str:
        arm = self.arm.replace("'", "-again")
        return f"{self.part}-{self.shape}-{arm}-{self.seed}"

    @property
    def digest(self) -> str:
        return digest(self.settings)


def digest(settings: Mapping[str, Any]) -> str:
    """A short hash of an arm's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ArmResult:
    """The numbers of one job."""

    part: str
    arm: str
    seed: int
    shape: str
    settings: str
    """Digest of the job's settings."""
    rules: str
    """Hash of the rules under which it ran."""
    metrics: Mapping[str, float]
    diverged: str = ""
    """Why there are no numbers: the run did not survive."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions, minutes of the last attempt, command."""


class Runs:
    """Results of one part and shape, by arm and seed."""

    def __init__(self, results: Iterable[ArmResult]) -> None:
        self.arms: dict[str, dict[int, Mapping[str, float]]] = defaultdict(dict)
        self.diverged: dict[str, list[int]] = defaultdict(list)
        for result in results:
            if result.diverged:
                self.diverged[result.arm].append(result.seed)
            else:
                self.arms[result.arm][result.seed] = result.metrics

    def seeds(self, *arms: str) -> list[int]:
        """The seeds for which all of these arms have numbers."""
        return sorted(set.intersection(*(set(self.arms.get(arm, {})) for arm in arms)))


@dataclass(frozen=True)
class Metric:
    """How a rule's metric follows from the numbers of arms. `of` takes the numbers of the arms, one argument each, and
    is evaluated for every seed separately; controls are the same metric of other arms."""

    of: Callable[..., float]
    arms: tuple[str, ...]
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    of_positive: Callable[..., float] | None = None
    """For a control that is another number of the same runs, such as a heavier mask."""
    of_negative: Callable[..., float] | None = None
    over: Callable[[list[tuple[Mapping[str, float], ...]]], list[float]] | None = None
    """Instead of `of`, if a seed's value needs the other seeds: the arms' numbers of all seeds -> the values."""

    @property
    def needs(self) -> set[str]:
        return {*self.arms, *self.positive, *self.negative}

    def measured(self, runs: Runs, most: int | None = None) -> Measured | None:
        """The metric over seeds, at most `most` of them; None if an arm is missing."""
        values = self._values(runs, self.of, self.arms, most)
        if not values:
            return None
        positive = self._values(runs, self.of_positive or self.of, self.positive, most) if self.positive else None
        negative = self._values(runs, self.of_negative or self.of, self.negative, most) if self.negative else None
        return Measured(values, positive or None, negative or None)

    def _values(self, runs: Runs, of: Callable[..., float], arms: tuple[str, ...], most: int | None) -> list[float]:
        numbers = [tuple(runs.arms[arm][seed] for arm in arms) for seed in runs.seeds(*arms)[:most]]
        return [of(*sides) for sides in numbers] if self.over is None or not numbers else self.over(numbers)


@dataclass(frozen=True)
class Beside:
    """A measurement that a card shows beside its rule: the question of one part of the rule, asked of other runs. It is
    compared with that part's threshold and has its own controls; no verdict reads it."""

    claim: str
    like: str
    """The metric of that part."""
    name: str
    """Its own name, which metrics.toml explains."""
    metric: Metric
    shape: str = ""
    """The shape of its runs, if it is not the tier's."""


class RunsPart(Protocol):
    """The module of a part."""

    METRICS: Mapping[tuple[str, str], Metric]
    BESIDE: Sequence[Beside]
    SHAPE: Mapping[Tier, str]
    SIZES: Mapping[str, Text]
    SAME: tuple[str, str, str] | None

    def jobs(self, tier: Tier, seeds: int | None = None) -> list[ArmJob]: ...

    def measure(self, job: ArmJob, folder: Path) -> dict[str, float]: ...


def part(name: str) -> RunsPart:
    return cast(RunsPart, importlib.import_module(f"bessemer_claims.{name}"))


def planned(
    tier: Tier, parts: Sequence[str], claims: Iterable[str] | None = None, seeds: int | None = None
) -> list[ArmJob]:
    """The jobs of a tier in the order in which they run, donors before the jobs they serve. With `claims`, only the
    jobs that their cards need."""
    planned_jobs: list[ArmJob] = []
    for name in parts:
        module = part(name)
        jobs = module.jobs(tier, seeds)
        if claims is not None:
            arms = {(arm, shape) for claim, shape, arm in serving(name, tier) if claim in set(claims)}
            donors = {job.name: job.donor for job in jobs}
            names = {job.name for job in jobs if (job.arm, job.shape) in arms}
            while more := {donor for job in names if (donor := donors[job]) is not None} - names:
                names |= more
            jobs = [job for job in jobs if job.name in names]
        planned_jobs += jobs
    return planned_jobs


def serving(name: str, tier: Tier) -> list[tuple[str, str, str]]:
    """(claim, shape, arm) for every arm of a part that a card needs."""
    module = part(name)
    shape = module.SHAPE[tier]
    needed = [(claim, shape, arm) for (claim, _), how in module.METRICS.items() for arm in how.needs]
    return needed + [(side.claim, side.shape or shape, arm) for side in module.BESIDE for arm in side.metric.needs]


def donated(job: ArmJob, folder: Path) -> Path:
    """The run directory of a job's donor, beside the job's own `folder`."""
    assert job.donor is not None, f"{job.name} has no donor"
    return folder.parents[1] / job.donor / folder.name


def beside(claim: str) -> list[Beside]:
    """What a claim's card shows beside its rule."""
    return [side for name in PARTS for side in part(name).BESIDE if side.claim == claim]


def shapes(tier: Tier) -> dict[str, str]:
    """Part -> the shape of its runs in a tier."""
    return {name: part(name).SHAPE[tier] for name in PARTS}


def _of(results: Sequence[ArmResult], name: str, shape: str) -> Runs:
    return Runs(result for result in results if (result.part, result.shape) == (name, shape))


def _runs(results: Sequence[ArmResult], tier: Tier) -> dict[str, Runs]:
    return {name: _of(results, name, shape) for name, shape in shapes(tier).items()}


def joined(committed: Sequence[ArmResult], own: Sequence[ArmResult], how: Metric | None = None) -> list[ArmResult]:
    """The seeds of both sources; with `how`, only the arms that this metric needs. The arms of a seed are compared with
    each other, so they come from one source: from `held`, unless `own` alone has numbers for all that are compared, or
    also for more controls or in more runs. Without `how`, arms that only the other source has are added."""
    sources: list[dict[tuple[str, str, int], dict[str, ArmResult]]] = [{}, {}]
    for source, results in zip(sources, (committed, own), strict=True):
        for result in results:
            if how is None or result.arm in how.needs:
                source.setdefault((result.part, result.shape, result.seed), {})[result.arm] = result
    chosen: list[ArmResult] = []
    for key in dict.fromkeys((*sources[0], *sources[1])):
        arms_of = [source.get(key, {}) for source in sources]
        numbers = [{arm for arm, result in arms.items() if not result.diverged} for arms in arms_of]
        runs = [sum(len(arms) for other, arms in source.items() if other[:2] == key[:2]) for source in sources]
        compared = set(how.arms) if how else numbers[0] | numbers[1]
        ranks = [(len(has), n) if has >= compared else (0, 0) for has, n in zip(numbers, runs, strict=True)]
        first, other = arms_of if ranks[0] >= ranks[1] else arms_of[::-1]
        chosen += (first if how else other | first).values()
    return chosen


def measured(
    results: Sequence[ArmResult], tier: Tier, most: int | None = None, own: Sequence[ArmResult] = ()
) -> dict[str, dict[str, Measured]]:
    """{claim: {metric: values over seeds}} for `cards.make`, from the runs of one tier, including what stands beside
    the rules. `most`: how many seeds count, at most. `own`: results from another source, `joined` for each metric."""
    by_claim: dict[str, dict[str, Measured]] = defaultdict(dict)

    def note(claim: str, metric: str, how: Metric, name: str, shape: str) -> None:
        if (values := how.measured(_of(joined(results, own, how), name, shape), most)) is not None:
            by_claim[claim][metric] = replace(values, size=part(name).SIZES[shape])

    for name, shape in shapes(tier).items():
        for (claim, metric), how in part(name).METRICS.items():
            note(claim, metric, how, name, shape)
        for side in part(name).BESIDE:
            note(side.claim, side.name, side.metric, name, side.shape or shape)
    return dict(by_claim)


def missing(results: Sequence[ArmResult], claims: Iterable[str]) -> dict[str, list[str]]:
    """Arms for which no tier has a number -> those of the claims whose rules need them."""
    present = {result.arm for result in results if not result.diverged}
    needed, lacking = set(claims), defaultdict[str, set[str]](set)
    for name in PARTS:
        for (claim, _), how in part(name).METRICS.items():
            for arm in how.needs - present if claim in needed else ():
                lacking[arm].add(claim)
    return {arm: sorted(claims) for arm, claims in sorted(lacking.items())}


def best(results: Sequence[ArmResult], own: Sequence[ArmResult] = ()) -> dict[str, dict[str, Measured]]:
    """As `measured`, from the largest runs with as many seeds as the rules ask for, of the controls as well, or, if
    there are none, from those with the most seeds."""

    def seeds(values: Measured) -> list[int]:
        return [len(arm or ()) for arm in (values.values, values.positive, values.negative)]

    by_claim: dict[str, dict[str, Measured]] = defaultdict(dict)
    for tier in TIERS:  # from the smallest to the largest
        for claim, metrics in measured(results, tier, own=own).items():
            for metric, values in metrics.items():
                earlier = by_claim[claim].get(metric)
                if earlier is None or all(
                    n >= min(rules().seeds, most) for n, most in zip(seeds(values), seeds(earlier), strict=True)
                ):
                    by_claim[claim][metric] = values
    return dict(by_claim)


def self_tests(results: Sequence[ArmResult]) -> list[SelfTest]:
    """The A/A tests: pairs of arms that may differ only by chance, at every size that has run."""
    tests = []
    for name in PARTS:
        if (pair := part(name).SAME) is None:
            continue
        *arms, number = pair
        for shape, size in part(name).SIZES.items():
            of_shape = _of(results, name, shape)
            one, other = (of_shape.arms.get(arm, {}) for arm in arms)
            gaps = [other[seed][number] - one[seed][number] for seed in of_shape.seeds(*arms)]
            if len(gaps) > 1:
                tests.append(self_test(gaps, rules(), name, size, (arms[0], arms[1]), number))
    return tests


def different(results: Sequence[ArmResult]) -> list[str]:
    """A sentence for every A/A test that fails."""
    return [
        f"A/A test: {test.number} of {test.arms[0]} and {test.arms[1]} differ by more than chance, "
        f"{len(test.gaps)} seeds"
        for test in self_tests(results)
        if test.agrees is False
    ]
