"""What the page says about the parts of a rule, in both languages: measured values, requirements, conclusions."""

from __future__ import annotations

import datetime
import math
import re
import tomllib
from collections.abc import Sequence
from functools import cache
from typing import Any

from bessemer.addons.evals.intervals import Interval
from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html
from bessemer_claims.registry import Part, data, metrics
from bessemer_claims.verdict import Again, Doubt, Outcome, PartFinding


@cache
def words() -> dict[str, Any]:
    """The page's own words, in both languages."""
    return tomllib.loads(data("words.toml").decode())


def both(texts: Sequence[object], **values: object) -> Html:
    """A text in both languages, of which the page shows one. A value that is [English, Chinese] enters each in its own;
    Chinese has no space before % and between
    its characters."""
    english, chinese = (
        (str(phrase).format(**_of(language, values)) if values else str(phrase)).replace(" %", percent)
        for language, (phrase, percent) in enumerate(zip(texts, ("\u202f%", "%"), strict=True))
    )
    chinese = re.sub(r"(?<=[一-鿿]) (?=[一-鿿])", "", chinese)
    if english == chinese:
        return page.text(english)
    html = f'<span class="en" lang="en">{page.text(english)}</span>'
    return Html(f'{html}<span class="zh" lang="zh-Hans">{page.text(chinese)}</span>')


def _of(language: int, values: dict[str, object]) -> dict[str, object]:
    return {name: value[language] if isinstance(value, list) else value for name, value in values.items()}


def day(date: datetime.date) -> list[str]:
    """A day in English and Chinese."""
    return [f"{date.day} {date:%B %Y}", f"{date.year} 年 {date.month} 月 {date.day} 日"]


def word(name: str, **values: object) -> Html:
    return both(words()[name], **values)


COLON, SEMICOLON, COMMA, SPACE = (both(pair) for pair in ((": ", "："), ("; ", "；"), (", ", "，"), (" ", "")))


def pictured(finding: PartFinding) -> bool:
    """Whether the card has a picture of a part, which shows its value and what was needed."""
    return bool(finding.seeds) or finding.score is not None


def compared(again: Again) -> Sequence[str]:
    """How one more run compares with those that decided, in English and Chinese; its size, if that is another."""
    if again.agrees is None:
        return again.size
    phrase: list[str] = words()["agrees" if again.agrees else "disagrees"]
    return phrase


def decided(claim: str, finding: PartFinding) -> Html:
    """A part in one line: its value and what was needed, unless a picture shows them, and what follows."""
    pieces = [judged(finding)]
    if finding.value is not None and not pictured(finding):
        pieces = [value(claim, finding), needed(claim, finding), outcome(claim, finding)]
    if finding.visible and math.isfinite(finding.visible):
        pieces.append(page.join(word("visible"), both(amount(claim, finding, finding.visible, signed=False)), by=COLON))
    if finding.needed_seeds is not None and finding.needed_seeds > finding.seeds > 1:
        pieces.append(word("needed_seeds", n=finding.needed_seeds))
    if finding.again is not None:
        again = page.join(both(amount(claim, finding, finding.again.value)), both(compared(finding.again)), by=COMMA)
        pieces.append(page.join(word("this_run"), again, by=COLON))
    return page.join(plain(claim, finding), page.join(*pieces, by=SEMICOLON), by=COLON)


def beside(claim: str, finding: PartFinding) -> Html:
    """A measurement beside a rule, in one line: its value, what the rule's part needs, what follows, and the runs."""
    parts = (value(claim, finding), needed(claim, finding), outcome(claim, finding), runs(finding))
    return page.join(plain(claim, finding), page.join(*parts, by=SEMICOLON), by=COLON)


def plain(claim: str, finding: PartFinding) -> Html:
    """What a part of a rule is about."""
    if finding.score is not None:
        return word("score", **finding.score.model_dump())
    return both(metric(claim, finding)[:2])


def value(claim: str, finding: PartFinding) -> Html:
    """The value of a part with its interval and unit."""
    assert finding.value is not None, "an open part has no value"
    return both(amount(claim, finding, finding.value, finding.interval))


def needed(claim: str, finding: PartFinding) -> Html:
    """What the rule asks of a part."""
    part = finding.part
    assert part is not None, "only parts of a rule need anything"
    kind: str = part.side
    if finding.between is not None:
        numbers = list(finding.between)
    elif part.printed is not None:
        kind, numbers = "printed", [float(part.printed)]
    else:
        kind = "within" if part.side == "equal" else part.side
        numbers = [bound(part), part.margin or 0.0]
    amounts = [amount(claim, finding, number, signed=kind != "within") for number in numbers]
    if kind in ("within", "between", "outside"):  # the unit stands once
        unit = words()["unit"][metric(claim, finding)[2]]["text"]
        amounts[0] = [finding.removesuffix(text) for finding, text in zip(amounts[0], unit, strict=True)]
    return both(
        [text.format(*(finding[language] for finding in amounts)) for language, text in enumerate(words()[kind])]
    )


def bound(part: Part) -> float:
    """What the interval of a part must lie beyond: the threshold, and by at least the smallest effect of interest. Of
    "equal", its middle."""
    beyond = {"above": part.margin or 0.0, "below": -(part.margin or 0.0)}
    return (part.threshold or 0.0) + beyond.get(part.side, 0.0)


def judged(finding: PartFinding) -> Html:
    """What follows from a part, in a word."""
    return Html(f"<b>{both(words()['outcome'][finding.outcome])}</b>")


def role(finding: PartFinding) -> Html:
    """Why a part decides neither answer; empty for one that decides."""
    why = words()["role"].get(finding.role)
    return both(why) if why else Html()


def outcome(claim: str, finding: PartFinding) -> Html:
    """What follows from a part, and why no more follows."""
    doubts = finding.doubts
    if finding.part is None or finding.outcome not in (Outcome.WEAK, Outcome.UNCLEAR):
        doubts = tuple(doubt for doubt in doubts if doubt in (Doubt.SMALL, Doubt.ALIKE))
    if finding.part is None or not doubts:
        return judged(finding)
    names = {"positive": finding.part.positive, "negative": finding.part.negative}
    phrases = {key: control(claim, name) for key, name in names.items()}
    why = [
        both(
            [
                text.format(**{key: finding[language] for key, finding in phrases.items()})
                for language, text in enumerate(texts)
            ]
        )
        for texts in (words()["doubt"][doubt] for doubt in doubts)
    ]
    return page.join(judged(finding), page.join(*why, by=SEMICOLON), by=COLON)


def control(claim: str, name: str) -> Sequence[str]:
    """What a control of a claim is, in English and Chinese."""
    controls = metrics()["control"]
    return controls.get(f"{claim}: {name}", controls.get(name, [name, name]))


def controlled(claim: str, finding: PartFinding) -> Html:
    """What the positive control gave, with its interval if it has one."""
    assert finding.part is not None and finding.control is not None, "only parts of a rule have controls"
    reach = finding.control if finding.control.low < finding.control.high else None
    gave = both(amount(claim, finding, finding.control.middle, reach))
    return page.join(word("control"), page.join(both(control(claim, finding.part.positive)), gave, by=COLON), by=COLON)


def runs(finding: PartFinding) -> Html:
    """How many runs decided a part, and what they were."""
    number = word("seeds", n=finding.seeds) if finding.seeds > 1 else word("one_run")
    return page.join(number, both(finding.size) if finding.size[0] else "", by=COMMA)


def metric(claim: str, finding: PartFinding) -> Sequence[str]:
    """[English, Chinese, unit] of a part of a rule."""
    assert finding.part is not None, "only parts of a rule have metrics"
    name = finding.part.metric
    names = metrics().get(claim, {}) | metrics().get(f"beside {claim}", {})
    return names.get(name, [name, name, "+points" if finding.part.kind == "B" else "+n"])


def amount(
    claim: str, finding: PartFinding, value: float, reach: Interval | None = None, signed: bool = True
) -> list[str]:
    """A value of a part with its interval and unit, in both languages; a printed figure with the digits it has."""
    assert finding.part is not None, "only parts of a rule have amounts"
    unit, printed = words()["unit"][metric(claim, finding)[2]], finding.part.printed
    signed = signed and unit.get("sign", False)

    def digits(number: float, factor: float) -> str:
        number *= unit.get("times", 1) * factor
        form = ",.0f" if 1000 <= abs(number) < 1e9 else ".3g"
        form = form if printed is None else f",.{len(printed.partition('.')[2])}f"
        return format(number or 0, "+" * bool(signed and number) + form).replace("-", "−")

    def written(factor: float) -> str:
        ends = "" if reach is None else f" ({digits(reach.low, factor)} … {digits(reach.high, factor)})"
        return digits(value, factor) + ends

    return [written(factor) + text for factor, text in zip((1, unit.get("chinese", 1)), unit["text"], strict=True)]
