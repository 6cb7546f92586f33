"""A claim's card on the page: its answers, what was found, the pictures of its parts, evidence, sources and limits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html
from bessemer_claims import phrases, pictures
from bessemer_claims.cards import Card
from bessemer_claims.phrases import COLON, SEMICOLON, SPACE, both, word, words
from bessemer_claims.registry import Citation, ClaimEntry
from bessemer_claims.verdict import Documented, Outcome, PartFinding, Seen, parts_held


class Look(NamedTuple):
    """How an answer looks."""

    symbol: str
    style: str


ANSWERS: Mapping[str, Mapping[str, Look]] = {
    "documented": {
        Documented.YES: Look("✓", "yes"), Documented.PARTLY: Look("◐", "partly"), Documented.NO: Look("✗", "no"),
        Documented.UNKNOWN: Look("–", "unknown"),
    },
    "seen": {
        Seen.YES: Look("✓", "yes"), Seen.NO: Look("✗", "no"), Seen.CANNOT_TELL: Look("○", "cannot-tell"),
        Seen.NOT_ASKED: Look("–", "not-asked"),
    },
}  # fmt: skip
"""Field of a card -> its values in the order of the bar."""
SENTENCE_ENDS = (r"(?<=\.) ", r"(?<=。)")


def tally(cards: Sequence[Card], field: str) -> list[tuple[str, Look, int]]:
    """(answer, its look, how many cards have it), for every answer that a card has."""
    numbers = Counter(getattr(card, field) for card in cards)
    return [(answer, look, numbers[answer]) for answer, look in ANSWERS[field].items() if numbers[answer]]


def chips(card: Card) -> Html:
    """The card's two answers in a word each, and how many parts hold where only some do."""
    shown = []
    for field, looks in ANSWERS.items():
        answer = getattr(card, field)
        parts = [finding for finding in card.findings if finding.part is not None]
        held, of = parts_held(parts, "documents" if field == "documented" else "seen")
        some = word("parts_held", held=held, of=of) if 0 < held < of else ""
        shown.append(
            f'<span class="chip v-{looks[answer].style}"><span>{word(f"{field}_short")}</span> '
            f'<b><span aria-hidden="true">{looks[answer].symbol}</span> {both(words()[field][answer])}</b>{some}</span>'
        )
    return Html(f'<span class="chips">{"".join(shown)}</span>')


def brief(card: Card) -> Html:
    """The card in short, which leads to the whole: the first sentence of what was found, or else the first result."""
    body = Html()
    if card.found:
        body = both([re.split(end, text, maxsplit=1)[0] for end, text in zip(SENTENCE_ENDS, card.found, strict=True)])
    elif shown := [finding for finding in card.findings if phrases.pictured(finding)]:
        gave = page.join(phrases.value(card.name, shown[0]), phrases.judged(shown[0]), by=SEMICOLON)
        body = page.join(phrases.plain(card.name, shown[0]), gave, by=COLON)
    return Html(
        f'<div class="brief"><a class="id" href="#{card.name}">{card.name}</a>{chips(card)}'
        f'<h3><a href="#{card.name}">{both(card.claim.text)}</a></h3>{page.paragraph(body, "found")}</div>'
    )


def full(card: Card) -> Html:
    """The whole card."""
    body = "".join(page.paragraph(both(text), "found") for text in (card.found, card.seen_text) if text)
    does = both(card.does)
    if any(finding.seeds for finding in card.findings):
        body += page.paragraph(page.join(word("ran"), does, by=SPACE), "would")
    elif not card.found:
        body += page.paragraph(page.join(word("would"), does, by=SPACE), "would")
    if card.open:
        waiting = (phrases.plain(card.name, finding) for finding in card.findings if finding.outcome is Outcome.OPEN)
        body += page.paragraph(page.join(word("open"), page.join(*waiting, by=SEMICOLON), by=SPACE), "would")
    scores = [finding for finding in card.findings if finding.score is not None]
    drawn = "".join(
        pictures.measured(card.name, finding, scores if finding in scores else ())
        for finding in card.findings
        if phrases.pictured(finding)
    )
    styles = " ".join(f"{field}-{looks[getattr(card, field)].style}" for field, looks in ANSWERS.items())
    return Html(
        f'<article class="claim {styles}" id="{card.name}">'
        f'<div class="head"><a class="id" href="#{card.name}">{card.name}</a>'
        f'<button type="button" class="share">{word("share")}</button>{chips(card)}</div>'
        f'<div class="say"><h3>{both(card.claim.text)}</h3>{body}</div><div class="drawn">{drawn}</div>'
        f"<details><summary>{word('more')}</summary>{_details(card)}</details></article>"
    )


def listed(cards: Iterable[Card]) -> Html:
    return Html(f'<div class="cards">{"".join(full(card) for card in cards)}</div>')


def links(cards: Iterable[Card]) -> Html:
    """The cards' names, which lead to them."""
    return page.join(*(Html(f'<a href="#{card.name}">{card.name}</a>') for card in cards), by=" ")


def _sources(claim: ClaimEntry) -> Html:
    """What the card cites, each a link with its title and date; or that nothing was published."""
    if not claim.source:
        return both(claim.sources())
    return page.join(*(_cited(cited) for cited in claim.citations()), by=SEMICOLON)


def _cited(cited: Citation) -> Html:
    label, source = both([cited.label(0), cited.label(1)]), cited.source
    if source.url is None:
        return label
    title = page.text(f"{source.title} ({source.date})")
    return Html(f'<a href="{page.text(source.url)}" title="{title}" rel="noopener">{label}</a>')


def _details(card: Card) -> Html:
    claim = card.claim
    audits = [finding for finding in card.findings if finding.part is None]
    audited = word("audited_part" if len(audits) > 1 else "audited")

    def shown(finding: PartFinding) -> Html:
        if finding.part:
            return page.join(phrases.decided(card.name, finding), phrases.role(finding), by=SEMICOLON)
        return page.join(audited, Html(f"<b>{both(words()['audit'][finding.outcome])}</b>"), by=COLON)

    parts = "".join(f"<li>{shown(finding)}</li>" for finding in card.findings)
    beside = "".join(f"<li>{phrases.beside(card.name, finding)}</li>" for finding in card.beside)
    kinds = page.join(*(both(words()["kind"][kind]) for kind in claim.kinds), by=" + ")
    lines = [
        (word("published"), both([claim.published(0), claim.published(1)]) if claim.paper != "-" else ""),
        (word("source"), _sources(claim)),
        (word("parts"), Html(f"<ul>{parts}</ul>") if parts else ""),
        (word("beside"), Html(f"<ul>{beside}</ul>") if beside else ""),
        (word("seen_at"), both(card.seen_at) if card.seen_at[0] else ""),
        (word("longer"), both(card.longer) if card.longer else ""),
        (word("same"), Html(f'<a href="#{card.same_as}">{card.same_as}</a>') if card.same_as else ""),
        (word("rules_1"), both(words()["verdict"][card.rules_1]) if card.rules_1 else ""),
        (word("limit"), Html(f'<span class="limit">{both(card.limit)}</span>')),
        (word("kinds"), kinds),
        (word("arms"), page.text(claim.arms)),
        (word("again"), Html(f"<code>bessemer claims --part none --only {card.name}</code>")),
    ]
    return Html(
        "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in lines if value) + "</dl>"
    )
