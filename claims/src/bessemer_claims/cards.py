"""One card for every claim: the claim, its evidence, its verdict, and what the verdict does not say."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from types import MappingProxyType
from typing import Any

from bessemer.addons.evals.intervals import over_seeds
from bessemer.addons.study.seeds import corrected
from bessemer_claims import phrases, registry, runs, sentences, verdict
from bessemer_claims.registry import ClaimEntry, claims, data, experiments
from bessemer_claims.verdict import ClaimVerdict, Documented, Evidence, Measured, Outcome, PartFinding, Seen


@dataclass(frozen=True)
class Card:
    """A judged claim; texts are (English, Chinese)."""

    name: str
    claim: ClaimEntry
    documented: Documented
    """Whether documents bear the claim out: what the headline counts."""
    seen: Seen
    """Whether runs show it at their size."""
    rules_1: ClaimVerdict | None
    """The verdict that the claim had under rules 1, which had one answer for both questions; none for a newer claim."""
    findings: list[PartFinding]
    found: tuple[str, str] | None
    """What documents and arithmetic say."""
    seen_text: tuple[str, str] | None
    """What the runs gave, if there is a sentence for it and they have been made."""
    does: tuple[str, str]
    """What is run, or would be."""
    longer: tuple[str, str] | None
    limit: tuple[str, str]
    values: dict[str, Any]
    """Everything computed for this card, by name."""
    beside: list[PartFinding]
    """Other measurements, which the verdict does not read."""

    @property
    def open(self) -> bool:
        """Whether a part still needs a run."""
        return any(finding.outcome is Outcome.OPEN for finding in self.findings)

    @property
    def seen_at(self) -> Sequence[str]:
        """The sizes of the runs behind `seen`, English and Chinese; empty without any."""
        decided = [finding for finding in self.findings if finding.seeds and finding.size[0]]
        sizes = list(dict.fromkeys(tuple(finding.size) for finding in decided))
        return ["; ".join(size[0] for size in sizes), "；".join(size[1] for size in sizes)]

    @property
    def same_as(self) -> str:
        """The claim that states the same fact; empty for most."""
        rule = registry.rules().claim.get(self.name)
        return "" if rule is None else rule.same

    @property
    def wrong_equalities(self) -> list[str]:
        """Printed figures that arithmetic does not give."""
        return [finding.label for finding in self.findings if finding.exact and finding.outcome is Outcome.FAILS]

    def facts(self) -> dict[str, Any]:
        """The card as JSON."""
        claim = self.claim
        return {
            "id": self.name, "claim": dict(zip(registry.LANGUAGES, claim.text, strict=True)),
            "documented": self.documented, "documented_parts": verdict.parts_held(self.findings, "documents"),
            "seen": self.seen, "seen_parts": verdict.parts_held(self.findings, "seen"), "seen_at": self.seen_at[0],
            "rules_1": self.rules_1, "same_fact_as": self.same_as,
            "kinds": claim.kinds, "experiment": claim.experiment, "arms": claim.arms,
            "published": dict(zip(registry.LANGUAGES, map(claim.published, (0, 1)), strict=True)),
            "sources": [cited.facts() for cited in claim.citations()],
            "found": None if self.found is None else dict(zip(registry.LANGUAGES, self.found, strict=True)),
            "runs_found": self.seen_text and dict(zip(registry.LANGUAGES, self.seen_text, strict=True)),
            "longer_recipe": self.longer and dict(zip(registry.LANGUAGES, self.longer, strict=True)),
            "does_not_show": dict(zip(registry.LANGUAGES, self.limit, strict=True)),
            "would_run": dict(zip(registry.LANGUAGES, self.does, strict=True)),
            "values": self.values, "parts": [finding.facts() for finding in self.findings],
            "beside": [finding.facts() for finding in self.beside],
        }  # fmt: skip


@cache
def zero_long() -> dict[str, Any]:
    """(lowest, highest) over the seeds of the recipe zero-long: tokens, and shares in percent; their number as n."""
    table = tomllib.loads(data("zero_long.toml").decode())
    ranges = {
        name: [end(values) * (1 if name.startswith("tokens") else 100) for end in (min, max)]
        for name, values in table.items()
    }
    return ranges | {"n": len(table["tokens"])}


@cache
def filtering() -> dict[str, Any]:
    """The study rl-against-filtering after its last budget: mean accuracy in percent, GRPO's lead over rounds of
    filtering in points with its 95 % interval over the seeds, and the share of GRPO's gain, in percent, that the
    rounds have."""
    table = tomllib.loads(data("filtering.toml").decode())
    base, grpo, rounds = (100 * fmean(table[name]) for name in ("base", "grpo", "rounds"))
    lead = over_seeds([100 * (ours - theirs) for ours, theirs in zip(table["grpo"], table["rounds"], strict=True)])
    return {
        "base": base, "grpo": grpo, "rounds": rounds, "share": 100 * (rounds - base) / (grpo - base),
        "lead": lead.middle, "low": lead.low, "high": lead.high, "n": len(table["base"]),
    }  # fmt: skip


def _of_recipes() -> dict[str, Any]:
    return {"long": zero_long(), "filter": filtering()}


Results = Mapping[str, Mapping[str, Measured]]
"""What runs gave: claim -> metric of its rule -> values by seed."""


def make(
    names: Sequence[str], results: Results = MappingProxyType({}), again: Results = MappingProxyType({})
) -> list[Card]:
    """The cards of these claims; computes everything they need, in seconds for all of them. `again`: one seed of
    other runs, which is judged by `results` of the same size and only shown beside others. The correction for many
    tests is over all claims in `results`."""
    tested = corrections(results)
    return [_card(name, claims()[name], results.get(name), again.get(name, {}), tested) for name in names]


def corrections(results: Results) -> dict[tuple[str, str], float]:
    """(claim, metric) -> the p value after the correction for many tests, of every part of a rule that runs test."""
    rules = registry.rules()
    tests = {
        (name, part.metric): verdict.run(part, _of_runs(name, results.get(name)).get(part.metric), rules).p
        for name, rule in rules.claim.items()
        for part in rule.parts
        if part.speaks_to == "seen" and part.kind == "R"
    }
    tested = {key: p for key, p in tests.items() if p is not None}
    return dict(zip(tested, corrected(list(tested.values())), strict=True))


def _of_runs(name: str, measured: Mapping[str, Measured] | None) -> Mapping[str, Measured]:
    """What runs gave for the parts of a claim's rule."""
    others = {side.name for side in runs.beside(name)}
    return {metric: value for metric, value in (measured or {}).items() if metric not in others}


def _card(
    name: str, claim: ClaimEntry, measured: Mapping[str, Measured] | None, again: Mapping[str, Measured],
    tested: Mapping[tuple[str, str], float],
) -> Card:  # fmt: skip
    from bessemer_claims import exact, planned, spot_checks

    values: dict[str, Any] = _published(name, claim)
    for computed in (exact.COMPUTED, spot_checks.CHECKS):
        if name in computed:
            values |= computed[name]()
    if name in planned.PLANNED:
        values |= planned.values(name)
    besides = [(side, measured[side.name]) for side in runs.beside(name) if measured and side.name in measured]
    decided = _of_runs(name, measured)
    rules, rule = registry.rules(), registry.rules().claim.get(name)
    findings = [
        verdict.corrected(finding, tested.get((name, finding.label)), rules)
        for finding in verdict.judge(name, claim, Evidence(values, decided, again), rules)
    ]
    values["n_holds"] = sum(finding.outcome is Outcome.HOLDS for finding in findings if finding.score is not None)
    needs_all = rule is not None and rule.needs == "all"
    run = sentences.RunValues.of(measured or {}, rules.confidence)
    experiment, context = experiments()[claim.experiment], exact.shared() | values | {"run": run}
    return Card(
        name=name, claim=claim, documented=verdict.documented(findings, needs_all),
        seen=verdict.seen(findings, needs_all), findings=findings,
        rules_1=ClaimVerdict(before) if (before := registry.verdicts_1().get(name)) else None,
        found=None if claim.found is None else sentences.filled(claim.found, context),
        seen_text=_seen_text(claim, context), does=sentences.filled(experiment.does, context),
        longer=None if claim.longer is None else sentences.filled(claim.longer, _of_recipes()),
        limit=sentences.filled(claim.limit or experiment.limit, context), values=values,
        beside=[_beside(name, side, value) for side, value in besides] + _printed(name),
    )  # fmt: skip


def _published(name: str, claim: ClaimEntry) -> dict[str, Any]:
    """The published figures of a card, and of its first pair of scores: problems, gap, and how far is still equal."""
    values: dict[str, Any] = dict(claim.figures)
    if claim.scores:
        first = claim.scores[0]
        [rule] = [part for part in registry.rules().claim[name].parts if part.kind == "B"]
        margin = abs(rule.threshold or 0) + (rule.margin or 0)
        values |= {"problems": first.problems, "gap": abs(first.one - first.other), "margin": margin}
    return values | {"n": len(claim.scores)}


def _seen_text(claim: ClaimEntry, context: Mapping[str, Any]) -> tuple[str, str] | None:
    if claim.seen is None:
        return None
    try:
        return sentences.filled(claim.seen, context)
    except sentences.MissingRun:
        return None


def _beside(name: str, side: runs.Beside, measured: Measured) -> PartFinding:
    rules = registry.rules()
    [like] = [part for part in rules.claim[name].parts if part.metric == side.like]
    return verdict.beside(like, side.name, measured, rules, (bool(side.metric.positive), bool(side.metric.negative)))


def _printed(name: str) -> list[PartFinding]:
    """What runs of the recipe r1-small gave, of which only figures are left."""
    rules, small = registry.rules(), registry.r1_small()
    findings = []
    for figure in small.figures.get(name, ()):
        [like] = [part for part in rules.claim[name].parts if part.metric == figure.like]
        findings.append(verdict.printed(like, figure, small, rules))
    return findings


def _measured(claim: str, finding: PartFinding) -> str:
    """What runs gave for a part of a rule, in a line; empty for other parts."""
    if not finding.seeds or finding.value is None:
        return ""
    runs = f"{finding.seeds} runs" if finding.seeds > 1 else "one run"
    size = finding.size[0] and f", {finding.size[0]}"
    beside = ""
    if finding.again is not None:
        value, compared = phrases.amount(claim, finding, finding.again.value)[0], phrases.compared(finding.again)[0]
        beside = f"; {phrases.words()['this_run'][0]} {value}, {compared}"
    value = phrases.amount(claim, finding, finding.value, finding.interval)[0]
    return f"{phrases.metric(claim, finding)[0]}: {value}, {runs}{size}: {finding.outcome}{beside}"


def counts(cards: Sequence[Card]) -> dict[ClaimVerdict, int]:
    """How many cards had each verdict under rules 1, in the order of the verdicts."""
    totals = Counter(card.rules_1 for card in cards)
    return {kind: totals[kind] for kind in ClaimVerdict}


def answers(cards: Sequence[Card]) -> tuple[dict[Documented, int], dict[Seen, int]]:
    """How many cards have each answer of either kind, in the order of the answers."""
    documented, seen = Counter(card.documented for card in cards), Counter(card.seen for card in cards)
    return {kind: documented[kind] for kind in Documented}, {kind: seen[kind] for kind in Seen}


def describe(cards: Sequence[Card]) -> str:
    """The cards for a terminal."""
    lines = []
    for card in cards:
        lines.append(f"{card.name:<4} documented: {card.documented:<8} seen: {card.seen:<12} {card.claim.text[0]}")
        texts = [text[0] for text in (card.found, card.seen_text) if text]
        if card.open and not texts:
            texts = [f"would be run: {card.does[0]}"]
        measured = [_measured(card.name, finding) for finding in card.findings]
        measured += [f"beside the rule: {_measured(card.name, finding)}" for finding in card.beside]
        lines += [f"{'':<30}{line}" for line in (*texts, *measured) if line]
    return "\n".join([*lines, "", f"{len(cards)} claims. {totals(cards)}"])


def totals(cards: Sequence[Card]) -> str:
    """How many cards have each answer, in a line."""
    documented, seen = answers(cards)
    papers = ", ".join(f"{number} {answer}" for answer, number in documented.items() if number)
    small = ", ".join(f"{number} {answer}" for answer, number in seen.items() if number)
    return f"Documented: {papers}. Seen in small: {small}"
