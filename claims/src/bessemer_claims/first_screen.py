"""The first screen of the page: the answer, the three corrections, how it is known. Every number is computed."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html
from bessemer_claims import exact, phrases, planned
from bessemer_claims.cards import Card, filtering
from bessemer_claims.phrases import SPACE, word, words
from bessemer_claims.registry import sources
from bessemer_claims.verdict import Documented


def values() -> dict[str, Any]:
    """The computed numbers of the first screen. Dollars in millions, `_wan` in ten thousands, shares in percent, the
    lead of reinforcement learning over filtering in points."""
    one = planned.independent()
    bill, meta = exact.COMPUTED["K2"]()["bill"], exact.COMPUTED["K5"]()
    smaller, study = exact.shared()["smaller"], filtering()
    return {
        "bill": bill, "bill_wan": 100 * bill, "speed": one["nvidia_share"],
        "own": one["own_usd"], "own_wan": 100 * one["own_usd"],
        "again": one["nvidia_usd"], "again_wan": 100 * one["nvidia_usd"],
        "work": meta["work"], "use": meta["use"],
        **{name: study[name] for name in ("share", "lead", "low", "high")},
        "smaller": smaller, "smaller_wan": smaller / 1e4,
    }  # fmt: skip


def answer(cards: Sequence[Card]) -> Html:
    """The question, its answer, and what has to be corrected."""
    wrong = sum(card.documented is Documented.NO for card in cards)
    numbers = values()
    listed = "".join(
        f"<li><b>{word(f'said_{name}', **numbers)}</b>{SPACE}{word(f'correct_{name}', **numbers)}</li>"
        for name in ("cost", "meta", "alone")
    )
    return Html(
        f'<h1><span class="question">{word("title")}</span> {word("answer")}</h1>'
        f'{page.paragraph(word("answer_lead", wrong=wrong), "sub")}<ol class="corrections">{listed}</ol>'
    )


def known(cards: Sequence[Card], made: datetime.date) -> Html:
    """How the answer is known, whose account it is about, and of which day the page is."""
    computed = sum("X" in card.claim.kinds for card in cards)
    audited = sum("A" in card.claim.kinds for card in cards)
    tried = sum(any(finding.seeds for finding in card.findings) for card in cards)
    how = word("known", computed=computed, audited=audited, tried=tried, **values())
    account = word("account", n=len(cards), title=words()["account_name"], date=sources()["account"].date)
    day = word("made", day=phrases.day(made))
    day = Html(f'<time datetime="{made.isoformat()}">{day}</time>')
    errors = Html(f'<a href="#errors">{word("errors")}</a>')
    return Html(f'<div class="known"><p>{how}</p><p class="unit">{page.join(account, day, errors, by=SPACE)}</p></div>')
