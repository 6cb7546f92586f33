"""From the figures of arms to what a study says: intervals, controls, power.

A comparison is a difference within each seed. Its rule, fixed beforehand, bounds the mean: `above` and `below` a bound,
or `within` it of 0. The whole t interval beyond the bound: it holds. The whole interval short of it: it does not hold.
Otherwise, with fewer than FEWEST seeds, and with a run missing that the study does not count: cannot tell.

The study holds if all its rules do, which needs no correction for several rules. It fails with one of them; to keep
that error rate, failing is judged at a confidence divided among the rules (Bonferroni). If a control does not hold, the
apparatus is blind, and the study cannot tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from bessemer.addons.evals.intervals import Interval, over_seeds, smallest_visible
from bessemer.addons.study.file import RuleTable
from bessemer.addons.study.seeds import alike, chance_beyond, chance_within, fewest

FEWEST = 3
"""Seeds from which a spread is taken for known."""
Side = Literal["above", "below", "equal"]
Answer = Literal["holds", "fails", "unclear"]


class StudyVerdict(StrEnum):
    HOLDS = "holds"
    FAILS = "does not hold"
    UNCLEAR = "cannot tell"


ANSWERS: Mapping[Answer, StudyVerdict] = {
    "holds": StudyVerdict.HOLDS, "fails": StudyVerdict.FAILS, "unclear": StudyVerdict.UNCLEAR
}  # fmt: skip


def answer(side: Side, threshold: float, margin: float, interval: Interval) -> Answer:
    """Whether the whole interval lies beyond threshold and margin, short of that, or neither. `equal`: within the
    margin of the threshold, outside, or neither."""
    if side == "equal":
        low, high = threshold - margin, threshold + margin
        if low < interval.low and interval.high < high:
            return "holds"
        return "fails" if interval.high < low or interval.low > high else "unclear"
    cut = threshold + (margin if side == "above" else -margin)
    above, below = interval.low > cut, interval.high < cut
    if side == "below":
        above, below = below, above
    return "holds" if above else "fails" if below else "unclear"


@dataclass(frozen=True)
class Comparison:
    """A rule, or a control, with what the runs gave."""

    rule: RuleTable
    values: Mapping[int, float]
    """Seed -> the difference."""
    verdict: StudyVerdict
    interval: Interval | None
    """None without a value."""
    doubts: tuple[str, ...] = ()
    visible: float | None = None
    """Half the width of the interval."""
    chance: float | None = None
    """How likely a study of these seeds and this spread shows the expected effect."""
    seeds_needed: int | None = None
    """Seeds of this spread that show the expected effect with the study's power."""

    def facts(self) -> dict[str, Any]:
        facts = {
            "rule": self.rule.model_dump(exclude_defaults=True), "verdict": self.verdict,
            "values": {str(seed): value for seed, value in self.values.items()},
            "interval": self.interval and [end if math.isfinite(end) else None for end in self.interval],
            "doubts": list(self.doubts),
            "visible": self.visible, "power": self.chance, "seeds_needed": self.seeds_needed,
        }  # fmt: skip
        return {name: value for name, value in facts.items() if value is not None}


def power(rule: RuleTable, n: int, spread: float, confidence: float) -> float:
    """How likely a study of n seeds shows what the rule expects, if seeds have this spread."""
    if rule.side == "within":
        return chance_within(n, rule.expected, rule.by, spread, confidence)
    beyond = rule.expected - rule.by if rule.side == "above" else rule.by - rule.expected
    return chance_beyond(n, beyond, spread, confidence)


def compare(
    rule: RuleTable, values: Mapping[int, float], missing: Sequence[int], confidence: float, aim: float, rules: int = 1
) -> Comparison:
    """`missing`: seeds that have no value although they were to have one; `aim`: the power that the study asks for;
    `rules`: how many the study has, each of which can make it fail."""
    doubts = [f"no figure of seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"] if missing else []
    if not values:
        return Comparison(rule, values, StudyVerdict.UNCLEAR, None, tuple(doubts))
    numbers = list(values.values())
    same = alike(numbers)
    middle = statistics.fmean(numbers)
    point = Interval(middle, middle, middle)
    side: Side = "equal" if rule.side == "within" else rule.side
    threshold, margin = (0.0, rule.by) if rule.side == "within" else (rule.by, 0.0)

    def at(sure: float) -> Answer:
        return answer(side, threshold, margin, point if same else over_seeds(numbers, sure))

    verdict = at(confidence)
    if verdict == "fails":
        verdict = at(1 - (1 - confidence) / rules)
    if len(numbers) < FEWEST:
        doubts.append(f"{len(numbers)} seed{'s' * (len(numbers) > 1)}, {FEWEST} are the fewest that can tell")
    if same:
        doubts.append("the same on every seed")
    if len(numbers) < FEWEST or missing:
        verdict = "unclear"
    elif verdict == "unclear":
        doubts.append("the interval crosses the bound")
    found = Comparison(rule, values, ANSWERS[verdict], over_seeds(numbers, confidence), tuple(doubts))
    if len(numbers) < 2 or same:
        return found
    spread = statistics.stdev(numbers)
    needed = fewest(lambda n: power(rule, n, spread, confidence), aim, FEWEST)
    chance = power(rule, len(numbers), spread, confidence)
    visible = smallest_visible(numbers, confidence)
    return Comparison(rule, values, found.verdict, found.interval, found.doubts, visible, chance, needed)


def verdict(rules: Sequence[Comparison], controls: Sequence[Comparison]) -> tuple[StudyVerdict, list[str]]:
    """What the study says, and why it cannot tell."""
    blind = [
        f'control "{control.rule.name}" {control.verdict}: the study is blind'
        for control in controls
        if control.verdict is not StudyVerdict.HOLDS
    ]
    if blind:
        return StudyVerdict.UNCLEAR, blind
    found = {rule.verdict for rule in rules}
    if StudyVerdict.FAILS in found:
        return StudyVerdict.FAILS, []
    if found == {StudyVerdict.HOLDS}:
        return StudyVerdict.HOLDS, []
    unclear = [rule for rule in rules if rule.verdict is StudyVerdict.UNCLEAR]
    return StudyVerdict.UNCLEAR, [f'"{rule.rule.name}": {"; ".join(rule.doubts)}' for rule in unclear]
