"""From evidence to a verdict, by rules that were fixed before any run.

A rule has parts. The evidence decides each part on its own (`Outcome`); `combine` turns the outcomes into the verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from bessemer.addons.evals.intervals import Interval, over_seeds, shares_apart, smallest_visible
from bessemer_claims.registry import ClaimEntry, Part, PublishedScore, Role, Rules
from bessemer_claims.seeds import equivalent, p_value


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
    EARLIER = "earlier"
    PREDICTED = "predicted"


class ClaimVerdict(StrEnum):
    """What the evidence says about a claim."""

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
    earlier: bool = False
    """From before the rules: it can show a claim in part, at most."""
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
            "smallest_visible_effect": self.visible if self.visible != math.inf else None, "p": self.p,
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


def judge(name: str, claim: ClaimEntry, evidence: Evidence, rules: Rules) -> tuple[ClaimVerdict, list[PartFinding]]:
    """The verdict on a claim, and the finding on each of its parts."""
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
    if claim.kinds[0] == "N" or not findings:
        return ClaimVerdict.NOT_TESTABLE, findings
    return combine([finding.outcome for finding in findings], rule is not None and rule.needs == "all"), findings


def beside(like: Part, name: str, measured: Measured, rules: Rules, controls: tuple[bool, bool]) -> PartFinding:
    """The finding on a measurement by the threshold of another part, `like`. `controls`: whether it has that part's
    (positive, negative) control. No verdict uses it."""
    positive, negative = (
        named if has else "" for named, has in zip((like.positive, like.negative), controls, strict=True)
    )
    own = {"metric": name, "paper": None, "positive": positive, "negative": negative}
    return run(like.model_copy(update=own), measured, rules)


def combine(outcomes: Sequence[Outcome], needs_all: bool = False) -> ClaimVerdict:
    """The verdict on a claim whose parts have these outcomes."""
    seen = set(outcomes)
    if Outcome.FAILS in seen and (needs_all or not seen & {Outcome.HOLDS, Outcome.WEAK}):
        return ClaimVerdict.CONTRADICTED
    if seen == {Outcome.HOLDS}:
        return ClaimVerdict.SHOWN
    if seen & {Outcome.HOLDS, Outcome.WEAK}:
        return ClaimVerdict.PART
    if Outcome.OPEN in seen:
        return ClaimVerdict.NOT_RUN
    return ClaimVerdict.NOT_SHOWN if Outcome.UNCLEAR in seen else ClaimVerdict.NOT_TESTABLE


def parts_held(findings: Sequence[PartFinding], role: Role) -> tuple[int, int]:
    """How many parts of this role hold, and of how many: "2 of 3 parts"."""
    outcomes = [finding.outcome for finding in findings if finding.role == role]
    return outcomes.count(Outcome.HOLDS), len(outcomes)


def documented(findings: Sequence[PartFinding], needs_all: bool = False) -> Documented:
    """What documents say of a claim with these findings. One that cannot be known weighs nothing; a claim of several
    parts that fails in one of them and holds in none is wrong only if nothing about it is open."""
    outcomes = {finding.outcome for finding in findings if finding.role == "documents"}
    outcomes -= {Outcome.OPEN, Outcome.UNKNOWABLE}
    if Outcome.FAILS in outcomes and (needs_all or outcomes == {Outcome.FAILS}):
        return Documented.NO
    if outcomes == {Outcome.HOLDS}:
        return Documented.YES
    return Documented.PARTLY if Outcome.HOLDS in outcomes else Documented.UNKNOWN


def seen(findings: Sequence[PartFinding], needs_all: bool = False) -> Seen:
    """What runs say of a claim with these findings: yes, if every part that has run holds; no, if none holds and one
    fails, or if all must hold and one fails."""
    outcomes = {finding.outcome for finding in findings if finding.role == "seen"} - {Outcome.OPEN}
    if not outcomes:
        return Seen.NOT_ASKED
    if Outcome.FAILS in outcomes and (needs_all or Outcome.HOLDS not in outcomes):
        return Seen.NO
    return Seen.YES if outcomes == {Outcome.HOLDS} else Seen.CANNOT_TELL


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
    """Judges a metric over seeds by the rule: interval, controls, number of seeds, size of the effect."""
    if measured is None:
        return PartFinding(part, Outcome.OPEN, part.metric)
    interval = over_seeds(measured.values, rules.confidence)
    few = len(measured.values) < rules.seeds
    outcome = _side(part, interval)
    if part.side == "equal" and outcome is Outcome.UNCLEAR:
        threshold, margin = part.threshold or 0.0, part.margin or 0.0
        if equivalent(measured.values, threshold, margin, rules.confidence):  # two one-sided tests
            outcome = Outcome.HOLDS
    if few:  # too few for a spread of their own: at most the direction
        point = Interval(interval.middle, interval.middle, interval.middle)
        outcome = Outcome.WEAK if _side(part, point) is Outcome.HOLDS else Outcome.UNCLEAR
    doubts = {Doubt.FEW: few, Doubt.SPREAD: outcome is Outcome.UNCLEAR}
    control = None if measured.positive is None else over_seeds(measured.positive, rules.confidence)
    if control is not None and few:  # a point, like the value that it controls
        control = Interval(control.middle, control.middle, control.middle)
    if control is not None and not _fires(part, control):
        outcome = Outcome.UNCLEAR  # the run could not have seen the effect, or its absence
        doubts[Doubt.BLIND] = True
    negative = None if measured.negative is None else over_seeds(measured.negative, rules.confidence)
    missing = bool(part.positive) and control is None
    if negative is not None and _fires(part, negative):
        outcome = Outcome.UNCLEAR  # what must not show the effect shows it too
        doubts[Doubt.ANYHOW] = True
    elif part.negative and len(measured.negative or ()) < rules.seeds:
        missing = True  # with one seed it can show no effect
    doubts |= {Doubt.UNCONTROLLED: missing, Doubt.EARLIER: measured.earlier, Doubt.SMALL: _small(part, interval, rules)}
    if outcome is Outcome.HOLDS and (missing or measured.earlier or _small(part, interval, rules)):
        outcome = Outcome.WEAK
    return PartFinding(
        part, outcome, part.metric, interval if len(measured.values) > 1 else None, control,
        smallest_visible(measured.values, rules.confidence), p_value(measured.values, part.threshold or 0.0),
        seeds=len(measured.values), size=measured.size, value=interval.middle,
        doubts=tuple(doubt for doubt, there in doubts.items() if there),
    )  # fmt: skip


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


def _side(part: Part, interval: Interval) -> Outcome:
    """On which side of the threshold the whole interval lies."""
    threshold, margin = part.threshold or 0.0, part.margin or 0.0
    if part.side == "equal":
        low, high = threshold - margin, threshold + margin
        if low < interval.low and interval.high < high:
            return Outcome.HOLDS
        return Outcome.FAILS if interval.high < low or interval.low > high else Outcome.UNCLEAR
    above, below = interval.low > threshold, interval.high < threshold
    if part.side == "below":
        above, below = below, above
    return Outcome.HOLDS if above else Outcome.FAILS if below else Outcome.UNCLEAR


def _fires(part: Part, control: Interval) -> bool:
    """Whether a control shows the effect that the run looks for: harm, if the claim is that there is none."""
    threshold, margin = part.threshold or 0.0, part.margin or 0.0
    if part.side == "equal":
        return control.low > threshold + margin or control.high < threshold - margin
    harmless = part.side == "below" and threshold > 0
    return control.low > 0 if harmless else _side(part, control) is Outcome.HOLDS


def _small(part: Part, interval: Interval, rules: Rules) -> bool:
    return part.paper is not None and abs(interval.middle) * rules.smaller < abs(part.paper)


def agrees(reference: Sequence[float], again: Sequence[float], rules: Rules) -> bool:
    """The A/A test: the reference and the reference with other initial weights show no visible difference."""
    gaps = [value - repeated for value, repeated in zip(reference, again, strict=True)]
    interval = over_seeds(gaps, rules.aa_confidence)
    return interval.low <= 0 <= interval.high or statistics.fmean(gaps) == 0
