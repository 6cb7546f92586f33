"""The people who wrote the code pages of the pre-training corpus: what they think before they answer.

A thinker says in words what is wanted, writes an expression, tries it on one value and compares with what should come
out: `n+3:f(4)=7:7 yes`. Verdicts are true except where a sloppy author sees what is not there; so checking pays for a
model that has learnt to calculate, as in countdown. Whatever is written down, right or wrong, is of the train split.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from bessemer.tasks.base import check_shares
from bessemer.tasks.code.book import FAMILIES, Wanted, wanted

WORDS = {"en": {"yes": " yes", "no": " no"}, "zh": {"yes": "对", "no": "错"}}
CHECKS = 4  # expressions a thinker tries at most


@dataclass(frozen=True)
class CodeMix:
    """Knobs of the code documents, shares between 0 and 1."""

    direct: float = 0.2
    """Pages that answer without thinking."""
    direct_right: float = 0.5
    """Of those, the part that is right."""
    sloppy: float = 0.5
    """Thinking pages by authors who err, give up and see what is not there; the others go on until it is right."""
    wrong_sloppy: float = 0.6
    """Chance that a sloppy author's next expression is wrong."""
    wrong_careful: float = 0.3
    """The same for a careful one."""
    give_up: float = 0.5
    """Chance that a sloppy author answers with an expression just refuted."""
    false_yes: float = 0.05
    """Chance that a sloppy author says yes to it."""
    truncated: float = 0.03
    """Thinking pages that break off before the answer."""

    def __post_init__(self) -> None:
        check_shares(self, list(self.__dataclass_fields__))


def definition(argument: str, code: str) -> str:
    return f"def f({argument}):\n    return {code}"


def respond(goal: Wanted, language: str, mix: CodeMix, rng: random.Random) -> tuple[str, str]:
    """(author, what is written after `Assistant:`)."""
    argument = goal.family.argument
    if rng.random() < mix.direct:
        answer = goal if rng.random() < mix.direct_right else _other(goal, rng)
        return "direct", f"<answer>{definition(argument, answer.code)}</answer>"
    author = "sloppy" if rng.random() < mix.sloppy else "careful"
    wrong = mix.wrong_sloppy if author == "sloppy" else mix.wrong_careful
    lines, words = [goal.words(language)], WORDS[language]
    for count in range(1, CHECKS + 1):
        last = count == CHECKS and author == "careful"
        attempt = _other(goal, rng) if rng.random() < wrong and not last else goal
        value = _telling(goal, attempt, rng)
        right = attempt(value) == goal(value)
        yes = right or (author == "sloppy" and rng.random() < mix.false_yes)
        lines.append(f"{attempt.code}:f({value!r})={attempt(value)!r}:{goal(value)!r}{words['yes' if yes else 'no']}")
        if yes or (author == "sloppy" and rng.random() < mix.give_up):
            break
    if rng.random() < mix.truncated:
        return author, "<think>" + "\n".join(lines)
    return author, "<think>" + "\n".join(lines) + f"</think><answer>{definition(argument, attempt.code)}</answer>"


def _other(goal: Wanted, rng: random.Random) -> Wanted:
    """A likely mistake: the same function with other numbers, or another function with the same numbers."""
    same = _of_family(goal.family.name) if rng.random() < 0.5 else ()
    pool: Sequence[Wanted] = [one for one in same if one != goal] or [
        one
        for one in (Wanted(family, goal.parameters) for family in _like(goal.family))
        if one.split == "train" and one.family.allows(*one.parameters)
    ]
    return rng.choice(pool or [one for one in wanted("train") if one.family.argument == goal.family.argument])


@cache
def _of_family(name: str) -> tuple[Wanted, ...]:
    return tuple(one for one in wanted("train") if one.family.name == name)


def _like(family: Any) -> list[Any]:
    """Other families over the same argument whose parameters come from the same ranges."""
    return [
        other
        for other in FAMILIES.values()
        if other is not family and other.argument == family.argument and other.ranges == family.ranges
    ]


def _telling(goal: Wanted, attempt: Wanted, rng: random.Random) -> Any:
    """A short value on which a wrong attempt differs from the goal, if a few draws find one."""
    values = sorted((value for value in goal.inputs(rng, 12) if value not in ([], "")), key=lambda one: len(repr(one)))
    usable = [value for value in values if len(repr(value)) <= 16] or values[:1]
    telling = [value for value in usable if attempt(value) != goal(value)]
    return rng.choice(telling or usable)
