"""The claims as one HTML file in English and Chinese: the question, the answer, the verdicts, what V3 would have cost,
twelve cards, and the rest by chapter.

The page holds both languages, filled from the same values; a button switches between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from bessemer import __version__
from bessemer.addons.evals.intervals import Interval
from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html
from bessemer_claims import PARTS, exact, phrases, planned, results, runs
from bessemer_claims.cards import Card, counts, make
from bessemer_claims.phrases import COLON, SEMICOLON, SPACE, both, word, words
from bessemer_claims.registry import claims, data, experiments, rules, rules_hash
from bessemer_claims.verdict import ClaimVerdict, Doubt, Outcome, PartFinding

HEADLINES = ("M5", "M12", "L5", "L6", "T5", "F7", "P2", "Z2", "Z3", "R6", "K5", "K1")
SYMBOLS = {
    ClaimVerdict.SHOWN: "✓", ClaimVerdict.PART: "◐", ClaimVerdict.NOT_SHOWN: "○", ClaimVerdict.CONTRADICTED: "✗",
    ClaimVerdict.NOT_TESTABLE: "–", ClaimVerdict.NOT_RUN: "…",
}  # fmt: skip
STYLES = {
    ClaimVerdict.SHOWN: "v-shown", ClaimVerdict.PART: "v-part", ClaimVerdict.NOT_SHOWN: "v-not-shown",
    ClaimVerdict.CONTRADICTED: "v-contradicted", ClaimVerdict.NOT_TESTABLE: "v-not-testable",
    ClaimVerdict.NOT_RUN: "v-not-run",
}  # fmt: skip


def committed() -> list[Card]:
    """The cards from the results in the package: those of docs/claims.html."""
    return make(list(claims()), runs.best(results.committed().results))


def document(cards: Sequence[Card]) -> str:
    """The page of all cards."""
    by_name = {card.name: card for card in cards}
    remaining = [card for card in cards if card.name not in HEADLINES]
    chapters = [_chapter(letter, list(group)) for letter, group in groupby(remaining, lambda card: card.name[0])]
    parts = [
        Html(
            f'<div class="top"><span class="brand">{word("brand", n=len(claims()))}</span>'
            f'<button id="language" type="button">{word("switch")}</button></div>'
        ),
        Html(f"<h1>{word('title')}</h1>"),
        page.paragraph(word("lead"), "sub"),
        _answer(cards),
        page.section("verdicts", word("verdicts"), _bar(cards), word("verdicts_lead")),
        page.section("cost", word("cost"), _cost(), word("cost_lead")),
        page.section(
            "headlines", word("headlines"), _grid(by_name[name] for name in HEADLINES if name in by_name),
            word("headlines_lead"),
        ),
        page.section("all", word("all"), page.join(*chapters), word("all_lead")),
        page.section("unrun", word("unrun"), _unrun(cards), word("unrun_lead")),
        page.section("method", word("how"), page.join(_method(), _glossary())),
        Html(f"<footer>{word('footer', version=__version__, hash=rules_hash()[:16])}</footer>"),
    ]  # fmt: skip
    title = words()["title"][0]
    return page.document(title, page.join(*parts), data("claims.css").decode(), data("claims.js").decode())


def _answer(cards: Sequence[Card]) -> Html:
    """Three sentences, from the cards."""
    number = counts(cards)
    waiting = number[ClaimVerdict.NOT_RUN]
    view, experts, cache_ = planned.outside_view(), exact.COMPUTED["M12"](), exact.COMPUTED["L5"]()
    spread = planned.values("K3")["spread"]
    millions = {name: view[name] for name in ("published", "low", "high")}
    hours = millions | {f"{name}_wan": 100 * value for name, value in millions.items()}  # Chinese counts by 10,000
    sentences = [
        word(
            "answer", n=len(cards), shown=number[ClaimVerdict.SHOWN], part=number[ClaimVerdict.PART],
            contradicted=number[ClaimVerdict.CONTRADICTED], unsettled=number[ClaimVerdict.NOT_SHOWN],
            untestable=number[ClaimVerdict.NOT_TESTABLE],
        ) + (word("answer_open", open=waiting) if waiting else ""),
        word("answer_cost", spread=spread, **hours),
        word("answer_wrong", stored_ratio=experts["stored_ratio"], share=cache_["share"]),
    ]  # fmt: skip
    return Html(f'<ul class="answer">{"".join(f"<li>{sentence}</li>" for sentence in sentences)}</ul>')


def _bar(cards: Sequence[Card]) -> Html:
    pieces, buttons = [], []
    for verdict, number in counts(cards).items():
        if not number:
            continue
        style, symbol = STYLES[verdict], SYMBOLS[verdict]
        pieces.append(f'<span class="{style}" style="flex:{number}">{number}</span>')
        buttons.append(
            f'<button type="button" class="{style}" data-kind="{style}" aria-pressed="false"><b aria-hidden="true">'
            f"{symbol}</b>{both(words()['verdict'][verdict])}<em>{number}</em></button>"
        )
    return Html(
        f'<div class="bar" aria-hidden="true">{"".join(pieces)}</div><div class="verdicts">{"".join(buttons)}</div>'
    )


def _cost() -> Html:
    """A row for every run: where its rate puts V3's bill."""
    view, floor = planned.outside_view(), planned.floor()
    top = 1.06 * max(view["high"], *(run["v3_hours"] for run in planned.reference()))

    def at(hours: float) -> str:
        return f"left:{100 * hours / top:.2f}%"

    def row(name: str, hours: float, mark: str, band: str = "", kind: str = "") -> str:
        days = word("days", days=hours * 1e6 / 2048 / 24)
        amount = f"<b>{hours:.2f}M</b> · ${2 * hours:.1f}M · {days}"
        line = f'<span class="line" style="{at(view["published"])}"></span>'
        dot = f'<span class="dot {mark}" style="{at(hours)}"></span>'
        return (
            f'<div class="run {kind}"><span>{page.text(name)}</span><span class="track" aria-hidden="true">{band}{line}'
            f'{dot}</span><span class="amount">{amount}</span></div>'
        )

    def band(low: float, high: float) -> str:
        return f'<span class="band" style="{at(low)};width:{100 * (high - low) / top:.2f}%"></span>'

    inside = planned.inside_view()
    own, *others = planned.reference()
    rows = [
        row(own["name"], own["v3_hours"], "own", kind="own"),
        row(word("cost_planner", **view), view["median"], "middle", band(view["low"], view["high"]), "own"),
        row(word("cost_draws", **vars(inside)), inside.median, "middle", band(inside.low, inside.high), "own"),
        *(row(run["name"], run["v3_hours"], "") for run in others),
        row(word("cost_floor"), floor, "middle"),
    ]
    return Html(f'<div class="runs">{"".join(rows)}</div>{page.paragraph(word("cost_note"), "unit")}')


def _chapter(letter: str, cards: list[Card]) -> Html:
    tally = "".join(
        f'<i class="{STYLES[verdict]}">{SYMBOLS[verdict]} {number}</i>'
        for verdict, number in counts(cards).items()
        if number
    )
    title = both(words()["chapter"][letter])
    return Html(
        f'<details class="chapter"><summary><span>{title}</span><span class="tally">{tally}</span></summary>'
        f"{_grid(cards)}</details>"
    )


def _grid(cards: Iterable[Card]) -> Html:
    return Html(f'<div class="cards">{"".join(_card(card) for card in cards)}</div>')


def _card(card: Card) -> Html:
    claim, style = card.claim, STYLES[card.verdict]
    verdict = both(words()["verdict"][card.verdict])
    chip = f'<span class="chip"><span aria-hidden="true">{SYMBOLS[card.verdict]}</span> {verdict}</span>'
    body = page.paragraph(both(card.found), "found") if card.found else ""
    does = both(experiments()[claim.experiment].does)
    if card.verdict is ClaimVerdict.NOT_RUN:
        body += page.paragraph(page.join(word("would"), does, by=SPACE), "would")
    elif any(finding.seeds for finding in card.findings):
        body += page.paragraph(page.join(word("ran"), does, by=SPACE), "would")
    if card.open:
        waiting = (phrases.plain(card.name, finding) for finding in card.findings if finding.outcome is Outcome.OPEN)
        body += page.paragraph(page.join(word("open"), page.join(*waiting, by=SEMICOLON), by=SPACE), "would")
    scores = [finding for finding in card.findings if finding.score is not None]
    pictures = "".join(
        _gap(card.name, finding, scores if finding in scores else ())
        for finding in card.findings
        if phrases.pictured(finding)
    )
    return Html(
        f'<article class="claim {style}" id="{card.name}">'
        f'<div class="head"><a href="#{card.name}">{card.name}</a>{chip}</div>'
        f"<h3>{both(claim.text)}</h3>{body}{pictures}"
        f"<details><summary>{word('more')}</summary>{_details(card)}</details></article>"
    )


def _details(card: Card) -> Html:
    claim = card.claim
    audits = [finding for finding in card.findings if finding.part is None]
    audited = word("audited_part" if len(audits) > 1 else "audited")

    def shown(finding: PartFinding) -> Html:
        if finding.part:
            return phrases.decided(card.name, finding)
        return page.join(audited, phrases.judged(finding), by=COLON)

    parts = "".join(f"<li>{shown(finding)}</li>" for finding in card.findings)
    beside = "".join(f"<li>{phrases.beside(card.name, finding)}</li>" for finding in card.beside)
    kinds = page.join(*(both(words()["kind"][kind]) for kind in claim.kinds), by=" + ")
    lines = [
        (word("published"), both([claim.published(0), claim.published(1)]) if claim.paper != "-" else ""),
        (word("source"), both(claim.sources())),
        (word("parts"), Html(f"<ul>{parts}</ul>") if parts else ""),
        (word("beside"), Html(f"<ul>{beside}</ul>") if beside else ""),
        (word("earlier"), Html(f"<code>{page.text(card.earlier.where)}</code>") if card.earlier else ""),
        (word("arms"), page.text(claim.arms)),
        (word("limit"), both(card.limit)),
        (word("kinds"), kinds),
        (word("again"), Html(f"<code>bessemer claims --only {card.name}</code>")),
    ]
    return Html("<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines if value) + "</dl>")


def _reach(finding: PartFinding) -> Interval:
    """The interval of a part; for a single run, its value."""
    assert finding.value is not None, "a picture needs a value"
    return finding.interval or Interval(finding.value, finding.value, finding.value)


def _marks(finding: PartFinding) -> list[float]:
    """Everything that the picture of a part must hold."""
    assert finding.part is not None, "only parts of a rule have intervals"
    threshold, margin = float(finding.part.threshold or 0), float(finding.part.margin or 0)
    marks = [*_reach(finding), threshold, 0.0]
    marks += [threshold - margin, threshold + margin] if finding.part.side == "equal" else []
    marks += [finding.part.paper] if finding.part.paper is not None else []
    return marks + ([*finding.control] if finding.control is not None else [])


def _gap(claim: str, finding: PartFinding, others: Sequence[PartFinding] = ()) -> Html:
    """A picture of an interval and its threshold, on one scale with `others`; the paper's figure is a diamond, the
    positive control grey."""
    assert finding.part is not None and finding.value is not None, "only parts of a rule have pictures"
    reach = _reach(finding)
    threshold, margin = float(finding.part.threshold or 0), float(finding.part.margin or 0)
    marks = [mark for part in (finding, *others) for mark in _marks(part)]
    low, high = min(marks), max(marks)
    low, high = low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1)

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    def span(kind: str, of: Interval) -> str:
        width = 100 * (of.high - of.low) / (high - low)
        return f'<span class="{kind}" style="left:{at(of.low)};width:{width:.2f}%"></span>'

    zone = ""
    if finding.part.side == "equal":
        zone = span("zone", Interval(threshold, threshold - margin, threshold + margin))
    control = "" if finding.control is None else span("reach control", finding.control)
    paper = "" if finding.part.paper is None else f'<span class="paper" style="left:{at(finding.part.paper)}"></span>'
    marks_html = (
        f'{zone}<span class="threshold" style="left:{at(threshold)}"></span>{control}{span("reach", reach)}'
        f'<span class="at" style="left:{at(reach.middle)}"></span>{paper}'
    )
    scale = f'<span class="scale" aria-hidden="true">{marks_html}</span>'
    figures = f'<b class="figures">{phrases.value(claim, finding)}</b>'
    note = page.join(
        phrases.outcome(claim, finding),
        phrases.needed(claim, finding),
        phrases.runs(finding) if finding.seeds else "",
        by=" · ",
    )
    return Html(
        f'<div class="gap"><span>{phrases.plain(claim, finding)}</span>{figures}{scale}<small>{note}</small></div>'
    )


def _unrun(cards: Sequence[Card]) -> Html:
    """Which claims wait for runs, wholly or in part, which have few seeds, and which no runs are written for."""
    waiting = [card for card in cards if card.verdict is ClaimVerdict.NOT_RUN]
    partly = [card for card in cards if card.open]
    few = [card for card in cards if any(Doubt.FEW in finding.doubts for finding in card.findings)]
    built = {claim for name in PARTS for claim, _ in runs.part(name).METRICS}
    unbuilt = [card for card in waiting + partly if card.name not in built]

    def listed(title: str, some: list[Card]) -> Html:
        links = page.join(*(Html(f'<a href="#{card.name}">{card.name}</a>') for card in some), by=" ")
        return Html(f"<li>{word(title, n=len(some))} {links}</li>" if some else "")

    listing = "".join(f'<li><a href="#{card.name}">{card.name}</a> {both(card.claim.text)}</li>' for card in waiting)
    lists = (("unrun_part", partly), ("unrun_few", few), ("unrun_built", unbuilt))
    others = "".join(listed(title, some) for title, some in lists)
    first = f'<p>{word("unrun_whole", n=len(waiting))}</p><ul class="how">{listing}</ul>' if waiting else ""
    return Html(f'{first}<ul class="how">{others}</ul>')


def _method() -> Html:
    verdicts = "".join(
        f'<li class="{STYLES[verdict]}"><b>{SYMBOLS[verdict]} {both(words()["verdict"][verdict])}</b>: '
        f"{both(words()['meaning'][verdict])}</li>"
        for verdict in ClaimVerdict
    )
    run = sum(any(part.kind == "R" for part in rule.parts) for rule in rules().claim.values())
    by_chance = math.ceil(run * (1 - rules().confidence) / 2)
    listed = "".join(f"<li>{both(rule, n=run, few=by_chance)}</li>" for rule in words()["rules"].values())
    return Html(f'<ul class="how">{verdicts}</ul><ul class="how">{listed}</ul>')


def _glossary() -> Html:
    entries = "".join(
        f"<div><dt>{both(entry['term'])}</dt><dd>{both(entry['means'])}</dd></div>" for entry in words()["word"]
    )
    return page.fold(word("glossary"), Html(f'<dl class="glossary">{entries}</dl>'))
