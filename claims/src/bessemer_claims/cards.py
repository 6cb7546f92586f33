"""One card for every claim: the claim, its evidence, its verdict, and what the verdict does not say."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from bessemer_claims import phrases, registry, runs, verdict
from bessemer_claims.registry import ClaimEntry, Text, claims, data, experiments
from bessemer_claims.seeds import holm
from bessemer_claims.verdict import ClaimVerdict, Documented, Evidence, Measured, Outcome, PartFinding, Seen


@dataclass(frozen=True)
class EarlierRun:
    """Runs from before the rules, as earlier.toml holds them."""

    text: Text
    where: str
    measured: dict[str, Measured]


@dataclass(frozen=True)
class Card:
    """A judged claim; texts are (English, Chinese)."""

    name: str
    claim: ClaimEntry
    verdict: ClaimVerdict
    documented: Documented
    """Whether documents bear the claim out: what the headline counts."""
    seen: Seen
    """Whether runs show it at their size."""
    rules_1: ClaimVerdict
    """The verdict that the claim had under rules 1, which had one answer for both questions."""
    findings: list[PartFinding]
    found: tuple[str, str] | None
    limit: Text
    earlier: EarlierRun | None
    values: dict[str, Any]
    """Everything computed for this card, by name."""
    beside: list[PartFinding]
    """Other measurements, which the verdict does not read."""

    @property
    def open(self) -> bool:
        """Whether a part still needs a run, though others have decided."""
        return self.verdict is not ClaimVerdict.NOT_RUN and any(
            finding.outcome is Outcome.OPEN for finding in self.findings
        )

    @property
    def wrong_equalities(self) -> list[str]:
        """Printed figures that arithmetic does not give."""
        return [finding.label for finding in self.findings if finding.exact and finding.outcome is Outcome.FAILS]

    def facts(self) -> dict[str, Any]:
        """The card as JSON."""
        claim = self.claim
        return {
            "id": self.name, "claim": dict(zip(registry.LANGUAGES, claim.text, strict=True)), "verdict": self.verdict,
            "documented": self.documented, "documented_parts": verdict.parts_held(self.findings, "documents"),
            "seen": self.seen, "seen_parts": verdict.parts_held(self.findings, "seen"), "rules_1": self.rules_1,
            "kinds": claim.kinds, "experiment": claim.experiment, "arms": claim.arms,
            "published": dict(zip(registry.LANGUAGES, map(claim.published, (0, 1)), strict=True)),
            "source": claim.sources()[0],
            "found": None if self.found is None else dict(zip(registry.LANGUAGES, self.found, strict=True)),
            "does_not_show": dict(zip(registry.LANGUAGES, self.limit, strict=True)),
            "would_run": dict(zip(registry.LANGUAGES, experiments()[claim.experiment].does, strict=True)),
            "values": self.values, "parts": [finding.facts() for finding in self.findings],
            "beside": [finding.facts() for finding in self.beside],
            "earlier_runs": None if self.earlier is None else self.earlier.where,
        }  # fmt: skip


@cache
def _earlier() -> dict[str, EarlierRun]:
    runs = {}
    for name, table in tomllib.loads(data("earlier.toml").decode()).items():
        text, where = table.pop("text"), table.pop("where")
        measured = {metric: Measured(**values, earlier=True) for metric, values in table.items()}
        runs[name] = EarlierRun(text, where, measured)
    return runs


Results = Mapping[str, Mapping[str, Measured]]
"""What runs gave: claim -> metric of its rule -> values by seed. They replace runs from before the rules."""


def make(
    names: Sequence[str], results: Results = MappingProxyType({}), again: Results = MappingProxyType({})
) -> list[Card]:
    """The cards of these claims; computes everything they need, in seconds for all of them. `again`: one seed of
    other runs, which is judged by `results` of the same size and only shown beside others."""
    cards = [_card(name, claims()[name], results.get(name), again.get(name, {})) for name in names]
    tested = [
        (number, at)
        for number, card in enumerate(cards)
        for at, finding in enumerate(card.findings)
        if finding.p is not None
    ]
    corrected = holm([cards[number].findings[at].p or 0.0 for number, at in tested])
    for (number, at), p in zip(tested, corrected, strict=True):
        cards[number].findings[at] = replace(cards[number].findings[at], p=p)
    return cards


def _card(name: str, claim: ClaimEntry, measured: Mapping[str, Measured] | None, again: Mapping[str, Measured]) -> Card:
    from bessemer_claims import exact, planned, spot_checks

    values: dict[str, Any] = {}
    for computed in (exact.COMPUTED, spot_checks.CHECKS):
        if name in computed:
            values |= computed[name]()
    if name in planned.PLANNED:
        values |= planned.values(name)
    besides = [(side, measured[side.name]) for side in runs.beside(name) if measured and side.name in measured]
    if besides and measured is not None:
        others = {side.name for side, _ in besides}
        measured = {metric: value for metric, value in measured.items() if metric not in others} or None
    earlier = _earlier().get(name) if measured is None else None
    evidence = Evidence(values, measured or ({} if earlier is None else earlier.measured), again)
    decided, findings = verdict.judge(name, claim, evidence, registry.rules())
    values["n_holds"] = sum(side.outcome is Outcome.HOLDS for side in findings)
    limit = claim.limit or experiments()[claim.experiment].limit
    beside = [_beside(name, side, value) for side, value in besides]
    rule = registry.rules().claim.get(name)
    needs_all = rule is not None and rule.needs == "all"
    answers = verdict.documented(findings, needs_all), verdict.seen(findings, needs_all)
    rules_1 = ClaimVerdict(registry.verdicts_1()[name])
    return Card(
        name,
        claim,
        decided,
        *answers,
        rules_1,
        findings,
        _found(name, claim, values, earlier),
        limit,
        earlier,
        values,
        beside,
    )


def _beside(name: str, side: runs.Beside, measured: Measured) -> PartFinding:
    rules = registry.rules()
    [like] = [part for part in rules.claim[name].parts if part.metric == side.like]
    return verdict.beside(like, side.name, measured, rules, (bool(side.metric.positive), bool(side.metric.negative)))


def _found(name: str, claim: ClaimEntry, values: dict[str, Any], earlier: EarlierRun | None) -> tuple[str, str] | None:
    if claim.found is None:
        return None if earlier is None else (earlier.text[0], earlier.text[1])
    before = _earlier()[name].text if name in _earlier() else ["", ""]
    english, chinese = (
        sentence.format(**values, earlier=text) for sentence, text in zip(claim.found, before, strict=True)
    )
    return english, chinese


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
    """How many cards have each verdict, in the order of the verdicts."""
    totals = Counter(card.verdict for card in cards)
    return {kind: totals[kind] for kind in ClaimVerdict}


def describe(cards: Sequence[Card]) -> str:
    """The cards for a terminal."""
    lines = []
    for card in cards:
        lines.append(f"{card.name:<4} {card.verdict:<24} {card.claim.text[0]}")
        would = f"would be run: {experiments()[card.claim.experiment].does[0]}"
        text = card.found[0] if card.found else would if card.verdict is ClaimVerdict.NOT_RUN else ""
        measured = [_measured(card.name, finding) for finding in card.findings]
        measured += [f"beside the rule: {_measured(card.name, finding)}" for finding in card.beside]
        lines += [f"{'':<30}{line}" for line in (text, *measured) if line]
    total = ", ".join(f"{number} {verdict}" for verdict, number in counts(cards).items() if number)
    return "\n".join([*lines, "", f"{len(cards)} claims: {total}"])
