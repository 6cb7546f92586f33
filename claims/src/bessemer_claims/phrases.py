"""What the page says about the parts of a rule, in both languages: measured values, requirements, conclusions."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from functools import cache
from typing import Any

from bessemer.addons.evals.intervals import Interval
from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html
from bessemer_claims.registry import data, metrics
from bessemer_claims.verdict import Again, Outcome, PartFinding


@cache
def words() -> dict[str, Any]:
    """The page's own words, in both languages."""
    return tomllib.loads(data("words.toml").decode())


def both(texts: Sequence[object], **values: object) -> Html:
    """A text in both languages; the page shows one of them."""
    english, chinese = ((str(one).format(**values) if values else str(one)).replace(" %", "\u202f%") for one in texts)
    if english == chinese:
        return page.text(english)
    shown = f'<span class="en" lang="en">{page.text(english)}</span>'
    return Html(f'{shown}<span class="zh" lang="zh-Hans">{page.text(chinese)}</span>')


def word(name: str, **values: object) -> Html:
    return both(words()[name], **values)


COLON, SEMICOLON, COMMA, SPACE = (both(pair) for pair in ((": ", "："), ("; ", "；"), (", ", "，"), (" ", "")))


def pictured(one: PartFinding) -> bool:
    """Whether the card has a picture of a part, which shows its value and what was needed."""
    return bool(one.seeds) or one.score is not None


def compared(again: Again) -> Sequence[str]:
    """How one more run compares with those that decided, in English and Chinese; its size, if that is another."""
    if again.agrees is None:
        return again.size
    found: list[str] = words()["agrees" if again.agrees else "disagrees"]
    return found


def decided(claim: str, one: PartFinding) -> Html:
    """A part in one line: its value and what was needed, unless a picture shows them, and what follows."""
    pieces = [judged(one)]
    if one.value is not None and not pictured(one):
        pieces = [value(claim, one), needed(claim, one), outcome(claim, one)]
    if one.visible and math.isfinite(one.visible):
        pieces.append(page.join(word("visible"), both(amount(claim, one, one.visible, signed=False)), by=COLON))
    if one.again is not None:
        again = page.join(both(amount(claim, one, one.again.value)), both(compared(one.again)), by=COMMA)
        pieces.append(page.join(word("this_run"), again, by=COLON))
    return page.join(plain(claim, one), page.join(*pieces, by=SEMICOLON), by=COLON)


def beside(claim: str, one: PartFinding) -> Html:
    """A measurement beside a rule, in one line: its value, what the rule's part needs, what follows, and the runs."""
    parts = (value(claim, one), needed(claim, one), outcome(claim, one), runs(one))
    return page.join(plain(claim, one), page.join(*parts, by=SEMICOLON), by=COLON)


def plain(claim: str, one: PartFinding) -> Html:
    """What a part of a rule is about."""
    if one.score is not None:
        return word("score", **one.score.model_dump())
    return both(metric(claim, one)[:2])


def value(claim: str, one: PartFinding) -> Html:
    """The value of a part with its interval and unit."""
    assert one.value is not None, "an open part has no value"
    return both(amount(claim, one, one.value, one.interval))


def needed(claim: str, one: PartFinding) -> Html:
    """What the rule asks of a part."""
    part = one.part
    assert part is not None, "only parts of a rule need anything"
    kind: str = part.side
    if one.between is not None:
        numbers = list(one.between)
    elif part.printed is not None:
        kind, numbers = "printed", [float(part.printed)]
    else:
        kind = "within" if part.side == "equal" else part.side
        numbers = [part.threshold or 0.0, part.margin or 0.0]
    amounts = [amount(claim, one, number, signed=kind != "within") for number in numbers]
    if kind in ("within", "between", "outside"):  # the unit stands once
        unit = words()["unit"][metric(claim, one)[2]]["text"]
        amounts[0] = [one.removesuffix(text) for one, text in zip(amounts[0], unit, strict=True)]
    return both([text.format(*(one[place] for one in amounts)) for place, text in enumerate(words()[kind])])


def judged(one: PartFinding) -> Html:
    """What follows from a part, in a word."""
    return both(words()["outcome"][one.outcome])


def outcome(claim: str, one: PartFinding) -> Html:
    """What follows from a part, and why no more follows."""
    if one.part is None or one.outcome not in (Outcome.WEAK, Outcome.UNCLEAR):
        return judged(one)
    controls = metrics()["control"]
    names = {"positive": one.part.positive, "negative": one.part.negative}
    said = {key: controls.get(f"{claim}: {name}", controls.get(name, [name, name])) for key, name in names.items()}
    why = [
        both([text.format(**{key: one[place] for key, one in said.items()}) for place, text in enumerate(texts)])
        for texts in (words()["doubt"][doubt] for doubt in one.doubts)
    ]
    return page.join(judged(one), page.join(*why, by=SEMICOLON), by=COLON)


def runs(one: PartFinding) -> Html:
    """How many runs decided a part, and what they were."""
    number = word("seeds", n=one.seeds) if one.seeds > 1 else word("one_run")
    return page.join(number, both(one.size) if one.size[0] else "", by=COMMA)


def metric(claim: str, one: PartFinding) -> Sequence[str]:
    """[English, Chinese, unit] of a part of a rule."""
    assert one.part is not None, "only parts of a rule have metrics"
    name = one.part.metric
    known = metrics().get(claim, {}) | metrics().get(f"beside {claim}", {})
    return known.get(name, [name, name, "+points" if one.part.kind == "B" else "+n"])


def amount(claim: str, one: PartFinding, value: float, reach: Interval | None = None, signed: bool = True) -> list[str]:
    """A value of a part with its interval and unit, in both languages; a printed figure with the digits it has."""
    assert one.part is not None, "only parts of a rule have amounts"
    unit, printed = words()["unit"][metric(claim, one)[2]], one.part.printed
    signed = signed and unit.get("sign", False)

    def digits(number: float) -> str:
        number *= unit.get("times", 1)
        form = ",.0f" if 1000 <= abs(number) < 1e9 else ".3g"
        form = form if printed is None else f",.{len(printed.partition('.')[2])}f"
        return format(number or 0, "+" * bool(signed and number) + form).replace("-", "−")

    ends = "" if reach is None else f" ({digits(reach.low)} … {digits(reach.high)})"
    return [digits(value) + ends + text for text in unit["text"]]
