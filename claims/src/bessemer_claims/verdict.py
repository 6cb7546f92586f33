"""From evidence to two answers, by the rules of rules.toml: what documents say of a claim, and what runs show.

A rule has parts. The evidence decides each part on its own (`Outcome`), the parts of runs after the correction for many
tests (`corrected`); `documented` and `seen` turn the outcomes into the answers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from bessemer.addons.evals.intervals import Interval, over_seeds, shares_apart, smallest_visible
from bessemer.addons.study.rule import answer
from bessemer.addons.study.seeds import alike, equivalent, p_equivalent, p_value, seeds_for
from bessemer_claims.registry import ClaimEntry, Part, PrintedFigure, PrintedRuns, PublishedScore, Role, Rules


class Doubt(StrEnum):
    """Why a part does not hold, or holds only weakly. For the reader; the rules decide without it."""

    FEW = "few seeds"
    SPREAD = "spread"
    """The interval crosses the threshold."""
    BLIND = "blind"
    """The positive control does not show the effect."""
    ANYHOW = "anyhow"
    """The negative control shows the effect too."""
    UNCONTROLLED = "uncontrolled"
    """A control has not been run, or the negative one with fewer seeds than the rules ask for."""
    SMALL = "small"
    """An effect, if there is any, is smaller than matters."""
    CHANCE = "chance"
    """The part holds or fails alone, but not after the correction for many tests."""
    ALIKE = "alike"
    """The same in every run."""
    MEANS = "means"
    """Only the means over the runs are left, not their spread."""
    PREDICTED = "predicted"


class ClaimVerdict(StrEnum):
    """What rules 1 said of a claim."""

    SHOWN = "shown"
    PART = "shown in part"
    NOT_SHOWN = "not shown at this size"
    CONTRADICTED = "contradicted"
    NOT_TESTABLE = "not testable here"
    NOT_RUN = "not run yet"


class Documented(StrEnum):
    """Whether documents bear a claim out: its sources, published figures compared, arithmetic on published figures."""

    YES = "yes"
    PARTLY = "partly"
    NO = "no"
    UNKNOWN = "unknown"


class Seen(StrEnum):
    """Whether runs of trained networks, or measured code, show a claim at their size."""

    YES = "yes"
    NO = "no"
    CANNOT_TELL = "cannot-tell"
    NOT_ASKED = "not-asked"


class Outcome(StrEnum):
    """What the evidence says about one part of a claim."""

    HOLDS = "holds"
    WEAK = "holds, weakly"
    """Few seeds, a point estimate, a small effect."""
    UNCLEAR = "unclear"
    FAILS = "fails"
    OPEN = "not run"
    UNKNOWABLE = "unknowable"


@dataclass(frozen=True)
class Measured:
    """What runs gave for one metric: a value per seed, and those of its controls."""

    values: Sequence[float]
    positive: Sequence[float] | None = None
    negative: Sequence[float] | None = None
    size: Sequence[str] = ("", "")
    """Size of the runs, for the reader: English, Chinese."""


class Again(NamedTuple):
    """One more run beside the seeds that decided: its value, and where 95 % of such values fall, unless its size is
    another."""

    value: float
    expected: Interval | None
    size: Sequence[str]

    @property
    def agrees(self) -> bool | None:
        return None if self.expected is None else self.expected.low <= self.value <= self.expected.high

    def facts(self) -> dict[str, Any]:
        judged = {"expected": self.expected, "agrees": self.agrees}
        return {"value": self.value} | ({"size": self.size[0]} if self.expected is None else judged)


@dataclass(frozen=True)
class PartFinding:
    """One part of a claim with its evidence."""

    part: Part | None
    outcome: Outcome
    label: str
    interval: Interval | None = None
    control: Interval | None = None
    visible: float | None = None
    p: float | None = None
    """The p value of the part's own question, margin included; None without spread."""
    q: float | None = None
    """The p value after the correction for many tests."""
    needed_seeds: int | None = None
    """How many seeds of this spread could see the margin."""
    exact: bool = False
    """A printed figure that arithmetic must give."""
    again: Again | None = None
    seeds: int = 0
    size: Sequence[str] = ("", "")
    """Size of the runs that decided: English, Chinese."""
    value: float | None = None
    """The computed value, or the mean over seeds."""
    between: tuple[float, float] | None = None
    """The computed bounds that the value must lie between, or outside of."""
    doubts: tuple[Doubt, ...] = ()
    score: PublishedScore | None = None
    """The published scores that the part compares, if it does."""

    @property
    def role(self) -> Role:
        """What the part speaks to; an audit has no rule, and is of documents."""
        return "documents" if self.part is None else self.part.speaks_to

    def facts(self) -> dict[str, Any]:
        summary = {
            "what": self.label, "role": self.role, "outcome": self.outcome, "interval": self.interval,
            "positive_control": self.control,
            "smallest_visible_effect": self.visible if self.visible != math.inf else None, "p": self.p, "q": self.q,
            "seeds_to_see_the_margin": self.needed_seeds,
            "seeds": self.seeds or None, "size": self.size[0] or None, "value": self.value,
            "doubts": self.doubts or None,
            "this_run": self.again and self.again.facts(),
        }  # fmt: skip
        rule = {} if self.part is None else self.part.model_dump(exclude_defaults=True)
        return {"rule": rule} | {name: value for name, value in summary.items() if value is not None}


@dataclass(frozen=True)
class Evidence:
    """All the evidence on one claim."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """Computed values by name: for the parts of kinds X and S, and for the sentences of the card."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    again: Mapping[str, Measured] = field(default_factory=dict)
    """One seed from this machine, beside the measured ones."""


def judge(name: str, claim: ClaimEntry, evidence: Evidence, rules: Rules) -> list[PartFinding]:
    """The finding on each part of a claim, those of runs before the correction for many tests."""
    rule = rules.claim.get(name)
    findings = list(_audit(claim))
    for part in rule.parts if rule else ():
        if part.kind == "B":
            findings += [score(part, published) for published in claim.scores]
        elif part.kind == "R":
            finding = run(part, evidence.measured.get(part.metric), rules)
            beside = again(evidence.measured.get(part.metric), evidence.again.get(part.metric), rules)
            findings.append(replace(finding, again=beside))
        else:
            findings.append(computed(part, evidence.values))
    return findings


def corrected(finding: PartFinding, q: float | None, rules: Rules) -> PartFinding:
    """The finding after the correction for many tests; `q`: its p value after it, None for a part without one."""
    if q is None:
        return finding
    if finding.outcome in (Outcome.HOLDS, Outcome.FAILS) and q > rules.false_share:
        return replace(finding, q=q, outcome=Outcome.UNCLEAR, doubts=(*finding.doubts, Doubt.CHANCE))
    return replace(finding, q=q)


def beside(like: Part, name: str, measured: Measured, rules: Rules, controls: tuple[bool, bool]) -> PartFinding:
    """The finding on a measurement by the threshold of another part, `like`. `controls`: whether it has that part's
    (positive, negative) control. No verdict uses it."""
    positive, negative = (
        named if has else "" for named, has in zip((like.positive, like.negative), controls, strict=True)
    )
    own = {"metric": name, "paper": None, "positive": positive, "negative": negative}
    return run(like.model_copy(update=own), measured, rules)


def printed(like: Part, figure: PrintedFigure, runs: PrintedRuns, rules: Rules) -> PartFinding:
    """The finding on a figure of which no run is left, by the threshold of another part, `like`. No verdict uses it."""
    if figure.values:
        return beside(like, figure.name[0], Measured(figure.values, size=runs.size), rules, (False, False))
    part = like.model_copy(update={"metric": figure.name[0], "paper": None, "positive": "", "negative": ""})
    gap = (figure.after or 0.0) - (figure.before or 0.0)
    finding = PartFinding(
        part, Outcome.UNCLEAR, part.metric, seeds=runs.seeds, size=runs.size, value=gap, doubts=(Doubt.MEANS,)
    )
    if figure.mean is None or figure.low is None or figure.high is None:
        return finding
    interval = Interval(figure.mean, figure.low, figure.high)
    outcome = _side(part, interval)
    doubts = {
        Doubt.SPREAD: outcome is Outcome.UNCLEAR,
        Doubt.SMALL: outcome is Outcome.FAILS and _beyond(part, figure.mean),
    }
    there = tuple(doubt for doubt, holds in doubts.items() if holds)
    return replace(finding, outcome=outcome, interval=interval, value=figure.mean, doubts=there)


def parts_held(findings: Sequence[PartFinding], role: Role) -> tuple[int, int]:
    """How many parts of this role hold, and of how many: "2 of 3 parts"."""
    outcomes = [finding.outcome for finding in findings if finding.role == role]
    return outcomes.count(Outcome.HOLDS), len(outcomes)


def documented(findings: Sequence[PartFinding], needs_all: bool = False) -> Documented:
    """What documents say of a claim with these findings. One that cannot be known weighs nothing; a claim of several
    parts that fails in one of them and holds in none is wrong only if nothing about it is open. If all parts must hold,
    one of the rule's parts that fails is enough; a source that is right in part is not."""
    documents = [finding for finding in findings if finding.role == "documents"]
    outcomes = {finding.outcome for finding in documents} - {Outcome.OPEN, Outcome.UNKNOWABLE}
    part_fails = any(finding.outcome is Outcome.FAILS for finding in documents if finding.part is not None)
    if (needs_all and part_fails) or outcomes == {Outcome.FAILS}:
        return Documented.NO
    if outcomes == {Outcome.HOLDS}:
        return Documented.YES
    return Documented.PARTLY if Outcome.HOLDS in outcomes else Documented.UNKNOWN


def seen(findings: Sequence[PartFinding], needs_all: bool = False) -> Seen:
    """What runs say of a claim with these findings: yes, if every part that has run holds, or every part, if all must;
    no, if none holds and one fails, or if all must hold and one fails."""
    outcomes = {finding.outcome for finding in findings if finding.role == "seen"}
    if not outcomes - {Outcome.OPEN}:
        return Seen.NOT_ASKED
    if Outcome.FAILS in outcomes and (needs_all or Outcome.HOLDS not in outcomes):
        return Seen.NO
    decisive = outcomes if needs_all else outcomes - {Outcome.OPEN}
    return Seen.YES if decisive == {Outcome.HOLDS} else Seen.CANNOT_TELL


def _audit(claim: ClaimEntry) -> list[PartFinding]:
    outcomes = {
        None: (), "mixed": (Outcome.HOLDS, Outcome.FAILS), "holds": (Outcome.HOLDS,), "fails": (Outcome.FAILS,),
        "unclear": (Outcome.UNCLEAR,), "unknowable": (Outcome.UNKNOWABLE,),
    }  # fmt: skip
    return [PartFinding(None, outcome, claim.sources()[0]) for outcome in outcomes[claim.audit]]


def computed(part: Part, values: Mapping[str, Any]) -> PartFinding:
    """Compares an exact value, or the planner's, with the threshold."""
    if part.metric not in values:
        return PartFinding(part, Outcome.OPEN, part.metric)
    value = values[part.metric]
    if part.side in ("between", "outside"):
        low, high = values[part.low], values[part.high]
        inside = low <= value <= high
        if part.side == "between":
            outcome = Outcome.WEAK if inside else Outcome.FAILS
        else:
            outcome = Outcome.UNCLEAR if inside else Outcome.WEAK
        label = f"{value:.4g} in {low:.4g} to {high:.4g}"
        return PartFinding(part, outcome, label, value=value, between=(low, high), doubts=(Doubt.PREDICTED,))
    if part.printed is not None:
        equal = as_printed(value, part.printed) == part.printed
        label = f"{_plain(part.metric)} = {part.printed}"
        return PartFinding(part, Outcome.HOLDS if equal else Outcome.FAILS, label, exact=True, value=value)
    assert part.threshold is not None
    right = value > part.threshold if part.side == "above" else value < part.threshold
    label = f"{_plain(part.metric)} {value:.4g}, {part.side} {part.threshold:g}"
    if part.kind == "S":  # no interval, so neither strong nor wrong
        outcome = Outcome.WEAK if right else Outcome.UNCLEAR
        return PartFinding(part, outcome, label, value=value, doubts=(Doubt.PREDICTED,))
    return PartFinding(part, Outcome.HOLDS if right else Outcome.FAILS, label, value=value)


def _plain(metric: str) -> str:
    return metric.replace("_", " ").strip()


def as_printed(value: float, printed: str) -> str:
    """The value with as many decimals as the printed figure has."""
    decimals = len(printed.partition(".")[2])
    return f"{value:.{decimals}f}"


def score(part: Part, published: PublishedScore) -> PartFinding:
    """Compares two published scores, in points, with the interval that follows from the number of problems."""
    gap = shares_apart(published.one / 100, published.other / 100, published.problems)
    points = Interval(*(100 * end for end in gap))
    label = f"{published.on}: {published.one:.1f} / {published.other:.1f} ({published.problems:,})"
    return PartFinding(part, _side(part, points), label, points, value=points.middle, score=published)


def run(part: Part, measured: Measured | None, rules: Rules) -> PartFinding:
    """Judges a metric over seeds by the rule: interval, margin, controls, number of seeds."""
    if measured is None:
        return PartFinding(part, Outcome.OPEN, part.metric)
    values, few, same = measured.values, len(measured.values) < rules.seeds, alike(measured.values)
    middle = statistics.fmean(values)
    interval = over_seeds(values, rules.confidence)
    outcome = _side(part, _point(middle) if few or same else interval)
    tested = part.side == "equal" and outcome is Outcome.UNCLEAR and not few
    if tested and equivalent(values, part.threshold or 0.0, part.margin or 0.0, rules.confidence):
        outcome = Outcome.HOLDS
    if few:  # too few for a spread of their own: at most the direction
        outcome = Outcome.WEAK if outcome is Outcome.HOLDS else Outcome.UNCLEAR
    doubts = {
        Doubt.FEW: few, Doubt.SPREAD: outcome is Outcome.UNCLEAR and not few, Doubt.ALIKE: same,
        Doubt.SMALL: outcome is Outcome.FAILS and _beyond(part, middle),
    }  # fmt: skip
    control, negative = (
        None if seeds is None else _reach(seeds, few, rules) for seeds in (measured.positive, measured.negative)
    )
    missing = bool(part.positive) and control is None
    if control is not None and not _fires(part, control, part.margin or 0.0):
        outcome = Outcome.UNCLEAR  # the run could not have seen the effect, or its absence
        doubts[Doubt.BLIND] = True
    if negative is not None and len(measured.negative or ()) > 1 and _fires(part, negative, 0.0):
        outcome = Outcome.UNCLEAR  # what must not show the effect shows it too
        doubts[Doubt.ANYHOW] = True
    elif part.negative and len(measured.negative or ()) < rules.seeds:
        missing = True  # with one seed it can show no effect
    doubts[Doubt.UNCONTROLLED] = missing
    if outcome in (Outcome.HOLDS, Outcome.FAILS) and missing:
        outcome = Outcome.WEAK if outcome is Outcome.HOLDS else Outcome.UNCLEAR
    spread = len(values) > 1 and not same
    return PartFinding(
        part, outcome, part.metric, interval if spread else None, control,
        smallest_visible(values, rules.confidence) if spread else None, None if few or same else _p(part, values),
        needed_seeds=seeds_for(values, part.margin or 0.0, rules.confidence),
        seeds=len(values), size=measured.size, value=middle,
        doubts=tuple(doubt for doubt, there in doubts.items() if there),
    )  # fmt: skip


def _point(value: float) -> Interval:
    return Interval(value, value, value)


def _reach(values: Sequence[float], few: bool, rules: Rules) -> Interval:
    """The interval of a control: its value, if it has no spread, or like the value that it controls."""
    point = few or alike(values)
    return _point(statistics.fmean(values)) if point else over_seeds(values, rules.confidence)


def _p(part: Part, values: Sequence[float]) -> float:
    """The p value of what the part asks: that the mean lies beyond threshold and margin, or not; of "equal", inside the
    margin, or outside."""
    threshold, margin = part.threshold or 0.0, part.margin or 0.0
    if part.side != "equal":
        return p_value(values, _cut(part, margin))
    middle = statistics.fmean(values)
    if abs(middle - threshold) < margin:
        return p_equivalent(values, threshold, margin)
    return p_value(values, threshold + math.copysign(margin, middle - threshold))


def again(decided: Measured | None, second: Measured | None, rules: Rules) -> Again | None:
    """One more run and where it should fall: mean +- t s sqrt(1 + 1/n) of the seeds that decided, if it is as large."""
    if decided is None or second is None:
        return None
    if second.size != decided.size:
        return Again(second.values[0], None, second.size)
    if len(decided.values) < 2:
        return None
    n = len(decided.values)
    middle, reach = (
        statistics.fmean(decided.values),
        smallest_visible(decided.values, rules.confidence) * math.sqrt(n + 1),
    )
    return Again(second.values[0], Interval(middle, middle - reach, middle + reach), second.size)


def _cut(part: Part, margin: float) -> float:
    """What the interval of "above" or "below" must clear."""
    return (part.threshold or 0.0) + (margin if part.side == "above" else -margin)


def _beyond(part: Part, value: float) -> bool:
    """Whether a value lies on the claimed side of the threshold, margin apart."""
    threshold = part.threshold or 0.0
    return (part.side == "above" and value > threshold) or (part.side == "below" and value < threshold)


def _side(part: Part, interval: Interval, margin: float | None = None) -> Outcome:
    """Whether the whole interval lies beyond threshold and margin, short of that, or neither; `margin`: instead of the
    part's."""
    margin = (part.margin or 0.0) if margin is None else margin
    assert part.side in ("above", "below", "equal"), "the other sides are of computed values"
    answers = {"holds": Outcome.HOLDS, "fails": Outcome.FAILS, "unclear": Outcome.UNCLEAR}
    return answers[answer(part.side, part.threshold or 0.0, margin, interval)]


def _fires(part: Part, control: Interval, margin: float) -> bool:
    """Whether a control shows the effect that the run looks for: harm, if the claim is that there is none."""
    if part.side == "equal":
        threshold, equal = part.threshold or 0.0, part.margin or 0.0
        return control.low > threshold + equal or control.high < threshold - equal
    if part.harm:
        return control.low > 0 if part.side == "below" else control.high < 0
    return _side(part, control, margin) is Outcome.HOLDS


@dataclass(frozen=True)
class SelfTest:
    """The A/A test: two arms that may differ only by chance."""

    part: str
    size: Sequence[str]
    arms: tuple[str, str]
    number: str
    gaps: Sequence[float]
    """The difference within each seed."""
    interval: Interval
    """Their mean and its interval."""
    agrees: bool | None
    """Whether the interval holds 0; None with fewer seeds than make a test."""


def self_test(
    gaps: Sequence[float], rules: Rules, part: str, size: Sequence[str], arms: tuple[str, str], number: str
) -> SelfTest:
    """The A/A test on the differences `gaps` within each seed; `number`: of what."""
    interval = over_seeds(gaps, rules.aa_confidence)
    holds = interval.low <= 0 <= interval.high or interval.middle == 0
    return SelfTest(part, size, arms, number, gaps, interval, holds if len(gaps) >= rules.aa_seeds else None)
