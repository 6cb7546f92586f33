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
from bessemer_claims.verdict import ClaimVerdict, Evidence, Measured, Outcome, PartFinding


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
        return self.verdict is not ClaimVerdict.NOT_RUN and any(one.outcome is Outcome.OPEN for one in self.findings)

    @property
    def wrong_equalities(self) -> list[str]:
        """Printed figures that arithmetic does not give."""
        return [one.label for one in self.findings if one.exact and one.outcome is Outcome.FAILS]

    def facts(self) -> dict[str, Any]:
        """The card as JSON."""
        claim = self.claim
        return {
            "id": self.name, "claim": dict(zip(registry.LANGUAGES, claim.text, strict=True)), "verdict": self.verdict,
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
        (place, at) for place, card in enumerate(cards) for at, one in enumerate(card.findings) if one.p is not None
    ]
    corrected = holm([cards[place].findings[at].p or 0.0 for place, at in tested])
    for (place, at), p in zip(tested, corrected, strict=True):
        cards[place].findings[at] = replace(cards[place].findings[at], p=p)
    return cards


def _card(name: str, claim: ClaimEntry, measured: Mapping[str, Measured] | None, again: Mapping[str, Measured]) -> Card:
    from bessemer_claims import exact, planned, spot_checks

    values: dict[str, Any] = {}
    for computed in (exact.COMPUTED, spot_checks.CHECKS):
        if name in computed:
            values |= computed[name]()
    if name in planned.PLANNED:
        values |= planned.values(name)
    besides = [(one, measured[one.name]) for one in runs.beside(name) if measured and one.name in measured]
    if besides and measured is not None:
        others = {one.name for one, _ in besides}
        measured = {metric: found for metric, found in measured.items() if metric not in others} or None
    earlier = _earlier().get(name) if measured is None else None
    evidence = Evidence(values, measured or ({} if earlier is None else earlier.measured), again)
    decided, findings = verdict.judge(name, claim, evidence, registry.rules())
    values["n_holds"] = sum(one.outcome is Outcome.HOLDS for one in findings)
    limit = claim.limit or experiments()[claim.experiment].limit
    beside = [_beside(name, one, found) for one, found in besides]
    return Card(name, claim, decided, findings, _found(name, claim, values, earlier), limit, earlier, values, beside)


def _beside(name: str, one: runs.Beside, measured: Measured) -> PartFinding:
    rules = registry.rules()
    [like] = [part for part in rules.claim[name].parts if part.metric == one.like]
    return verdict.beside(like, one.name, measured, rules, (bool(one.metric.positive), bool(one.metric.negative)))


def _found(name: str, claim: ClaimEntry, values: dict[str, Any], earlier: EarlierRun | None) -> tuple[str, str] | None:
    if claim.found is None:
        return None if earlier is None else (earlier.text[0], earlier.text[1])
    before = _earlier()[name].text if name in _earlier() else ["", ""]
    english, chinese = (
        sentence.format(**values, earlier=text) for sentence, text in zip(claim.found, before, strict=True)
    )
    return english, chinese


def _measured(claim: str, one: PartFinding) -> str:
    """What runs gave for a part of a rule, in a line; empty for other parts."""
    if not one.seeds or one.value is None:
        return ""
    runs = f"{one.seeds} runs" if one.seeds > 1 else "one run"
    size = one.size[0] and f", {one.size[0]}"
    beside = ""
    if one.again is not None:
        value, compared = phrases.amount(claim, one, one.again.value)[0], phrases.compared(one.again)[0]
        beside = f"; {phrases.words()['this_run'][0]} {value}, {compared}"
    value = phrases.amount(claim, one, one.value, one.interval)[0]
    return f"{phrases.metric(claim, one)[0]}: {value}, {runs}{size}: {one.outcome}{beside}"


def counts(cards: Sequence[Card]) -> dict[ClaimVerdict, int]:
    """How many cards have each verdict, in the order of the verdicts."""
    found = Counter(card.verdict for card in cards)
    return {one: found[one] for one in ClaimVerdict}


def describe(cards: Sequence[Card]) -> str:
    """The cards for a terminal."""
    lines = []
    for card in cards:
        lines.append(f"{card.name:<4} {card.verdict:<24} {card.claim.text[0]}")
        would = f"would be run: {experiments()[card.claim.experiment].does[0]}"
        text = card.found[0] if card.found else would if card.verdict is ClaimVerdict.NOT_RUN else ""
        measured = [_measured(card.name, one) for one in card.findings]
        measured += [f"beside the rule: {_measured(card.name, one)}" for one in card.beside]
        lines += [f"{'':<30}{one}" for one in (text, *measured) if one]
    total = ", ".join(f"{number} {one}" for one, number in counts(cards).items() if number)
    return "\n".join([*lines, "", f"{len(cards)} claims: {total}"])
