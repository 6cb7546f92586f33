"""Which alarm explains which, so that the likeliest root cause stands first."""

from __future__ import annotations

from collections.abc import Iterable

SETUP = ("learning-rate-zero", "wrong-kl-sign", "frozen-reference", "negative-kl", "sampler-mismatch")
"""Faults of the set-up: nothing that a run does brings them about."""

EXPLAINED_BY = {
    "not-finite": ("steps-too-large", "kl-runaway"),
    "kl-runaway": ("steps-too-large",),
    "entropy-explosion": ("steps-too-large", "kl-runaway", "not-finite"),
    "collapse": ("steps-too-large", "kl-runaway", "entropy-explosion", "entropy-collapse", "never-ending",
                 "length-collapse", "format-hacking", "not-finite"),
    "entropy-collapse": ("steps-too-large", "format-hacking", "length-collapse"),
    "never-ending": ("steps-too-large", "kl-runaway", "entropy-explosion", "not-finite"),
    "length-collapse": ("steps-too-large", "kl-runaway", "entropy-explosion", "entropy-collapse", "not-finite"),
    "thinking-stops": ("length-collapse", "entropy-collapse"),
    "format-hacking": ("steps-too-large", "kl-runaway"),
    "no-growth": ("groups-too-hard", "no-contrast", "entropy-collapse", "format-hacking", "length-collapse"),
    "language-mixing": ("steps-too-large", "kl-runaway", "entropy-explosion"),
    "groups-too-hard": ("steps-too-large", "kl-runaway", "entropy-explosion", "entropy-collapse", "format-hacking",
                        "length-collapse", "never-ending", "collapse", "not-finite"),
    "groups-too-easy": ("entropy-collapse", "format-hacking"),
    "no-contrast": ("steps-too-large", "kl-runaway", "entropy-explosion", "entropy-collapse", "format-hacking",
                    "length-collapse", "never-ending", "collapse", "not-finite"),
}  # fmt: skip
"""Alarm -> alarms that bring it about. Faults of the set-up explain everything."""

FROM_START = ("groups-too-hard", "no-contrast", "never-ending")
"""What holds from the first record on cannot follow from how the run went, so it is then a cause itself."""


def ordered(since: Iterable[tuple[str, int, bool]]) -> list[tuple[str, list[str]]]:
    """The alarms as (code, alarms that explain it), causes before consequences, then by step. `since`: code, position
    of the first record where it holds, and whether that is the beginning of the run."""
    rung = {code: (number, from_start) for code, number, from_start in since}
    explained = {code: _explained(code, rung) for code in rung}
    done: list[str] = []
    while waiting := [code for code in rung if code not in done]:
        free = [code for code in waiting if not {*explained[code]} - {*done}] or waiting
        done.append(min(free, key=lambda code: (code not in SETUP, rung[code][0])))
    return [(code, explained[code]) for code in done]


def _root(code: str, rung: dict[str, tuple[int, bool]]) -> bool:
    return code in FROM_START and rung[code][1]


def _explained(code: str, rung: dict[str, tuple[int, bool]]) -> list[str]:
    if code in SETUP:
        return []
    above = [other for other in SETUP if other in rung and other != "sampler-mismatch"]
    direct = [other for other in rung if other in EXPLAINED_BY.get(code, ())]
    if _root(code, rung):
        return above + [other for other in direct if _root(other, rung)]
    roots = [other for other in rung if other != code and _root(other, rung) and other not in direct]
    return above + direct + roots
