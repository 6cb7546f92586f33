"""Formulas over the constants true and false: drawing, writing in two languages, and reducing step by step.

A formula is True, False, ("not", f), or (op, f, g) with op "and" or "or". A reduction step replaces every operation
whose operands are constants by its value, all at once: `not (true and false) or true` -> `not false or true` ->
`true or true` -> `true`. So each step is a local rewriting of the line before, and a trace has few of them.
"""

import random
from collections.abc import Callable
from itertools import product

from bessemer.tasks.base import split_of_text

Formula = bool | tuple

WORDS = {
    "en": {True: "true", False: "false", "not": "not ", "and": " and ", "or": " or "},
    "zh": {True: "真", False: "假", "not": "非", "and": "且", "or": "或"},
}


FEWEST = 3
"""Constants of a formula that is asked for; smaller ones are steps, and both splits share them like the tables of +."""


def draw(leaves: int, split: str, wanted: bool, rng: random.Random) -> Formula:
    """A formula of at least FEWEST constants which belongs to `split` and has the value `wanted`.

    No step of a train formula, not even one gone wrong, is a formula of the test split.
    """
    while True:
        formula = _tree(leaves, rng)
        if value(formula) != wanted or _split(formula) != split:
            continue
        if split == "test" or all(_split(step) == split for step in _reachable(formula)):
            return formula


def _split(formula: Formula) -> str:
    return split_of_text(write(formula, "en"))


def _reachable(formula: Formula) -> set[Formula]:
    """Whatever of at least FEWEST constants a step, right or wrong, can leave of a formula, and of that, and so on."""
    found: set[Formula] = set()
    for step in _outcomes(formula) - {formula}:
        if _size(step) >= FEWEST:
            found |= {step} | _reachable(step)
    return found


def _outcomes(formula: Formula) -> set[Formula]:
    """What one step leaves when each value in it may be put down right or wrong."""
    if isinstance(formula, bool):
        return {formula}
    op, *parts = formula
    if all(isinstance(part, bool) for part in parts):
        return {True, False}
    return {(op, *chosen) for chosen in product(*map(_outcomes, parts))}


def _size(formula: Formula) -> int:
    return 1 if isinstance(formula, bool) else sum(map(_size, formula[1:]))


def _tree(leaves: int, rng: random.Random) -> Formula:
    if leaves == 1:
        constant = rng.random() < 0.5
        return ("not", constant) if rng.random() < 0.25 else constant
    left = rng.randint(1, leaves - 1)
    tree = (rng.choice(("and", "or")), _tree(left, rng), _tree(leaves - left, rng))
    return ("not", tree) if rng.random() < 0.15 else tree


def value(formula: Formula) -> bool:
    if isinstance(formula, bool):
        return formula
    parts = [value(part) for part in formula[1:]]
    return _apply(formula[0], parts)


def _apply(op: str, parts: list[bool]) -> bool:
    return not parts[0] if op == "not" else all(parts) if op == "and" else any(parts)


def write(formula: Formula, language: str) -> str:
    """`not` binds tightest; an operation inside another stands in parentheses."""
    words = WORDS[language]
    if isinstance(formula, bool):
        return words[formula]
    op, *parts = formula
    written = [f"({write(p, language)})" if _binary(p) else write(p, language) for p in parts]
    return words["not"] + written[0] if op == "not" else words[op].join(written)


def _binary(formula: Formula) -> bool:
    return not isinstance(formula, bool) and formula[0] != "not"


def reduce(formula: Formula, err: Callable[[bool], bool] = lambda truth: truth) -> Formula:
    """One step. `err(truth)` is what the author puts down for a value."""
    if isinstance(formula, bool):
        return formula
    op, *parts = formula
    if all(isinstance(part, bool) for part in parts):
        return err(_apply(op, parts))
    return (op, *(reduce(part, err) for part in parts))


def steps(formula: Formula, err: Callable[[bool], bool] = lambda truth: truth) -> list[Formula]:
    """The formula and what each step leaves of it; the last is the value."""
    found = [formula]
    while not isinstance(found[-1], bool):
        found.append(reduce(found[-1], err))
    return found
