"""The claims as one HTML file in English and Chinese: an answer with its corrections, the counts behind it, how it is
known, what V3 would have cost, twelve cards in short, and all cards by chapter.

The page holds both languages, filled from the same values; `?lang=` and a button choose one. It needs no network.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from bessemer import __version__
from bessemer.addons.study.seeds import seeds_for
from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html
from bessemer_claims import PARTS, card_page, chance, exact, first_screen, phrases, pictures, results, runs
from bessemer_claims.card_page import ANSWERS, links, tally
from bessemer_claims.cards import Card, make
from bessemer_claims.phrases import SPACE, both, word, words
from bessemer_claims.registry import claims, data, rules, rules_hash
from bessemer_claims.verdict import ClaimVerdict, Documented, Doubt, Seen

HEADLINES = ("K2", "K1", "K5", "M5", "M12", "L5", "L6", "F7", "P2", "Z2", "Z3", "R6")
SECTIONS = ("cost", "headlines", "all", "changed", "unrun", "method", "words")
UNDER_RULES_1: dict[ClaimVerdict | None, str] = {
    ClaimVerdict.SHOWN: "yes", ClaimVerdict.PART: "partly", ClaimVerdict.CONTRADICTED: "no",
    ClaimVerdict.NOT_SHOWN: "unknown", ClaimVerdict.NOT_TESTABLE: "unknown", ClaimVerdict.NOT_RUN: "unknown",
}  # fmt: skip
"""The one verdict of rules 1 -> the answer that stands for it under rules 2."""


def committed() -> list[Card]:
    """The cards from the results of the repository: those of docs/claims.html."""
    return make(list(claims()), runs.best(results.committed().results))


def document(cards: Sequence[Card], made: datetime.date) -> str:
    """The page of all cards, made on a day."""
    by_name = {card.name: card for card in cards}
    chapters = [_chapter(letter, list(group)) for letter, group in groupby(cards, lambda card: card.name[0])]
    short = "".join(card_page.brief(by_name[name]) for name in HEADLINES if name in by_name)
    since = phrases.day(datetime.date.fromisoformat(rules().date))
    legend = word("legend", sure=100 * rules().confidence)
    parts = [
        Html(
            f'<header><div class="top"><span class="brand">{word("brand", n=len(cards))}</span>'
            f'<button id="language" type="button">{word("switch")}</button></div>'
            f"{first_screen.answer(cards)}{_bars(cards)}{first_screen.known(cards, made)}</header>"
        ),
        _finder(len(cards)),
        page.section("cost", word("cost"), pictures.cost(), word("cost_lead", share=100 * chance.SHARE)),
        page.section("headlines", word("headlines"), Html(f'<div class="briefs">{short}</div>')),
        page.section(
            "all", word("all", n=len(cards)), page.join(page.paragraph(legend, "lead"), *chapters), word("all_lead"),
        ),
        page.section("changed", word("changed"), _changed(cards), word("changed_lead", day=since)),
        page.section("unrun", word("unrun"), _unrun(cards), word("unrun_lead")),
        page.section("method", word("method"), _method(), word("method_lead")),
        page.section("words", word("words"), _glossary()),
        Html(f"<footer>{word('footer', version=__version__, hash=rules_hash()[:16])}</footer>"),
    ]  # fmt: skip
    title = words()["title"][0]
    return page.document(title, page.join(*parts), data("claims.css").decode(), data("claims.js").decode())


def _bars(cards: Sequence[Card]) -> Html:
    """For every question a bar of its answers, which the buttons under it choose from."""
    bars = []
    for field in ANSWERS:
        pieces, buttons = [], []
        for answer, look, number in tally(cards, field):
            pieces.append(f'<span class="v-{look.style}" style="flex:{number}">{number}</span>')
            buttons.append(
                f'<button type="button" class="v-{look.style}" data-kind="{field}-{look.style}" aria-pressed="false">'
                f'<b aria-hidden="true">{look.symbol}</b>{both(words()[field][answer])}<em>{number}</em></button>'
            )
        bars.append(
            f'<div><p class="asked">{word(f"{field}_asked", n=len(cards))}</p>'
            f'<div class="bar {field}" aria-hidden="true">{"".join(pieces)}</div>'
            f'<div class="answers">{"".join(buttons)}</div></div>'
        )
    return Html(f'<div class="bars" id="answers">{"".join(bars)}</div>')


def _finder(number: int) -> Html:
    """The contents, the search, and how many cards it leaves."""
    contents = "".join(f'<a href="#{name}">{word(f"to_{name}")}</a>' for name in SECTIONS)
    return Html(
        f'<div class="finder"><nav aria-label="Contents · 目录">{contents}</nav><form role="search">'
        f'<label for="search">{word("search")}</label><input id="search" type="search" autocomplete="off"></form>'
        f'<p id="showing" role="status" hidden>{word("showing", shown="…", n=number)}</p>'
        f'<button type="button" id="everything" hidden>{word("everything")}</button></div>'
    )


def _chapter(letter: str, cards: list[Card]) -> Html:
    first = next(iter(ANSWERS))
    numbers = "".join(
        f'<i class="v-{look.style}"><span aria-hidden="true">{look.symbol}</span> {number}</i>'
        for _, look, number in tally(cards, first)
    )
    title = both(words()["chapter"][letter])
    return Html(
        f'<details class="chapter"><summary><span>{title}</span><span class="tally">{numbers}</span></summary>'
        f"{card_page.listed(cards)}</details>"
    )


def _changed(cards: Sequence[Card]) -> Html:
    """The counts under rules 1 beside those under rules 2, and the claims whose answer is another now."""
    columns = [(field, answer) for field, looks in ANSWERS.items() for answer in looks]
    headings = [word("rules_1"), word("claims")]
    headings += [page.join(word(f"{field}_short"), both(words()[field][answer]), by=SPACE) for field, answer in columns]
    rows, lists = [], []
    for verdict in (*ClaimVerdict, None):
        before = [card for card in cards if card.rules_1 == verdict]
        if not before:
            continue
        name = both(words()["verdict"][verdict]) if verdict else word("new")
        now = [sum(getattr(card, field) is answer for card in before) for field, answer in columns]
        rows.append([name, *map(str, (len(before), *now))])
        for answer in Documented if verdict else ():
            other = [card for card in before if _now(card) == answer != UNDER_RULES_1[verdict]]
            change = page.join(name, both(words()["documented"][answer]), by=" → ")
            lists.append(f"<li>{change} ({len(other)}): {links(other)}</li>" if other else "")
    rows.append(
        [word("total"), str(len(cards)), *(str(sum(getattr(card, f) is a for card in cards)) for f, a in columns)]
    )
    table = page.table(headings, rows, numeric=range(1, len(headings)))
    return Html(f'<div class="wide" tabindex="0">{table}</div><ul class="how">{"".join(lists)}</ul>')


def _now(card: Card) -> str:
    """The answer of documents, or where they decide nothing that of the runs."""
    if card.documented is not Documented.UNKNOWN:
        return card.documented
    return {Seen.YES: "yes", Seen.NO: "no"}.get(card.seen, "unknown")


def tallies(cards: Sequence[Card]) -> list[str]:
    """The counts of answers as the READMEs print them: English, Chinese."""
    numbers = {
        f"{field}_{look.style.replace('-', '_')}": number
        for field in ANSWERS
        for _, look, number in tally(cards, field)
    }
    return [text.format_map({"n": len(cards)} | numbers) for text in words()["tallies"]]


def _unrun(cards: Sequence[Card]) -> Html:
    """Which claims wait for runs, wholly or in part, which have few seeds, and which no runs are written for."""
    waiting = [card for card in cards if card.open and card.seen is Seen.NOT_ASKED]
    partly = [card for card in cards if card.open and card not in waiting]
    few = [card for card in cards if any(Doubt.FEW in finding.doubts for finding in card.findings)]
    built = {claim for name in PARTS for claim, _ in runs.part(name).METRICS}
    unbuilt = [card for card in waiting + partly if card.name not in built]

    def listed(title: str, some: list[Card]) -> Html:
        return Html(f"<li>{word(title, n=len(some))} {links(some)}</li>" if some else "")

    listing = "".join(f"<li>{links([card])} {both(card.claim.text)}</li>" for card in waiting)
    lists = (("unrun_part", partly), ("unrun_few", few), ("unrun_built", unbuilt))
    others = "".join(listed(title, some) for title, some in lists)
    first = f'<p>{word("unrun_whole", n=len(waiting))}</p><ul class="how">{listing}</ul>' if waiting else ""
    last = f'<ul class="how">{others}</ul>' if others else ""
    return Html(first + last or f"<p>{word('unrun_none')}</p>")


def _method() -> Html:
    """What the answers mean, the rules, a check in seconds, and where errors are reported."""
    meanings = "".join(
        f'<h3>{word(f"{field}_question")}</h3><ul class="how">'
        + "".join(
            f'<li class="v-{look.style}"><b>{look.symbol} {both(words()[field][answer])}</b>: '
            f"{both(words()[f'{field}_meaning'][answer])}</li>"
            for answer, look in looks.items()
        )
        + "</ul>"
        for field, looks in ANSWERS.items()
    )
    judged = {"seeds": rules().seeds, "share": 100 * rules().false_share, "sure": 100 * rules().confidence}
    judged |= {"problems": claims()["H1"].scores[0].problems, **exact.COMPUTED["H1"]()}
    judged |= _same_network()
    listed = "".join(f"<li>{both(rule, **judged)}</li>" for rule in words()["rules"].values())
    commands = page.text("\n".join(words()["commands"]))
    return Html(
        f'{meanings}<h3>{word("rules_title")}</h3><ul class="how">{listed}</ul>'
        f'<h3 id="check">{word("check")}</h3><p>{word("check_lead")}</p><pre>{commands}</pre>'
        f"<p>{word('check_more')}</p>"
        f'<h3 id="errors">{word("errors")}</h3><p>{word("errors_lead")}</p>'
    )


def _same_network() -> dict[str, Any]:
    """The A/A test at the size that decides most claims."""
    size = runs.part("pretrain").SIZES[runs.shapes("full")["pretrain"]]
    [test] = [test for test in runs.self_tests(results.committed().results) if test.size == size]
    [margin] = [part.margin for part in rules().claim["M5"].parts if part.kind == "R"]
    middle, low, high = test.interval
    agrees = words()["by_chance"][{True: "yes", False: "no", None: "unknown"}[test.agrees]]
    needed = seeds_for(test.gaps, margin or 0.0, rules().confidence)
    return {
        "aa": middle, "aa_low": low, "aa_high": high, "aa_seeds": len(test.gaps), "aa_needed": needed,
        "aa_margin": margin, "agrees": agrees,
    }  # fmt: skip


def _glossary() -> Html:
    entries = "".join(
        f"<div><dt>{both(entry['term'])}</dt><dd>{both(entry['means'])}</dd></div>" for entry in words()["word"]
    )
    return Html(f'<dl class="glossary">{entries}</dl>')
