"""Boolean logic: the truth of three formulas at once, so that a guess is right in one case of eight.

The truth of one formula is a coin toss, so a reward for it would reward guessing. Here each of the eight patterns of
three values is equally likely, and the answer is the whole pattern. A formula of the test split occurs in no training
problem and on no page, neither as a question nor as a step nor as a part of either, whatever the other two are.

A formula is True, False, ("not", f), or (op, f, g) with op "and" or "or". A reduction step replaces every operation
whose operands are constants by its value, all at once: `not (true and false) or true` -> `not false or true` ->
`true or true` -> `true`. So each step rewrites the line before locally, and a trace has few steps.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from bessemer.tasks.base import (
    CORRECT,
    UNPARSABLE,
    WRONG_VALUE,
    Problem,
    Task,
    Written,
    check_shares,
    read_templates,
    split_of_text,
)

Formula = bool | tuple

WORDS = {
    "en": {True: "true", False: "false", "not": "not ", "and": " and ", "or": " or "},
    "zh": {True: "真", False: "假", "not": "非", "and": "且", "or": "或"},
}
FEWEST = 3
"""Fewest constants of a formula in a question; smaller formulas are steps, which both splits share."""
FORMULAS = 3
LEAVES = (3, 4)
"""Constants per formula: with two there are too few formulas to hold some out, with five the trace is too long."""
MAX_CHARS = 60

TEMPLATES = read_templates(__package__, "questions.toml", "logic")
BETWEEN = {"en": "; ", "zh": "；"}
COMMA = {"en": ", ", "zh": "、"}
_VALUES = [{words[truth]: truth for truth in (True, False)} for words in WORDS.values()]


@dataclass(frozen=True)
class LogicMix:
    """Settings of the logic documents, shares between 0 and 1."""

    direct: float = 0.20
    """Pages that answer without thinking."""
    direct_right: float = 0.3
    """The share of those that are right for sure; the others toss three coins."""
    sloppy: float = 0.75
    """Thinking pages by authors who slip and give up; the others are careful and always right."""
    slip: float = 0.15
    """Chance per reduction that a sloppy author writes the wrong value."""
    give_up: float = 0.45
    """Chance, before the second and the third formula, that a sloppy author stops and guesses the rest."""
    other_language: float = 0.10
    """Thinking pages whose thoughts are in the other language."""
    truncated: float = 0.05
    """Thinking pages that break off before the answer."""

    def __post_init__(self) -> None:
        check_shares(self, list(self.__dataclass_fields__))


class Logic(Task):
    name, domain = "logic", "logic"
    translated = True
    Mix = LogicMix

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng = self.rng("problem", split, index, seed)
        leaves = rng.choice(LEAVES)
        formulas = []
        for truth in (rng.random() < 0.5 for _ in range(FORMULAS)):
            while (formula := sample(leaves, split, truth, rng)) in formulas:
                pass
            formulas.append(formula)
        templates = TEMPLATES[language, phrasing]
        template = rng.randrange(len(templates))
        listed = BETWEEN[language].join(write(formula, language) for formula in formulas)
        meta = {
            "formulas": formulas,
            "values": [value(formula) for formula in formulas],
            "template": f"{language}-{phrasing}-{template}",
            "difficulty": LEAVES.index(leaves) + 1,
        }
        prompt = templates[template].format(list=listed)
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", prompt, language, meta)

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        """Three truth values with commas between, in one language; the canonical form is like `TFT`."""
        if len(answer) > MAX_CHARS:
            return UNPARSABLE, None
        words = [word.strip(" \r\n\t") for word in re.split("[,，、]", answer)]
        meanings = next((values for values in _VALUES if values.keys() >= set(words)), None)
        if meanings is None or len(words) != FORMULAS:
            return UNPARSABLE, None
        values = [meanings[word] for word in words]
        return CORRECT if values == problem.meta["values"] else WRONG_VALUE, _letters(values)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem, mix = self.train_problem(index, seed, language), self.mix
        rng = self.rng("document", index, seed)
        tossed = [rng.random() < 0.5 for _ in range(FORMULAS)]
        if rng.random() < mix.direct:
            values = problem.meta["values"] if rng.random() < mix.direct_right else tossed
            return Written(problem, "direct", _answer(values, problem.language))
        author = "sloppy" if rng.random() < mix.sloppy else "careful"
        slip, give_up = (mix.slip, mix.give_up) if author == "sloppy" else (0.0, 0.0)
        others = [other for other in self.languages if other != problem.language]
        thinks_in = others[0] if others and rng.random() < mix.other_language else problem.language

        lines, values = [], []
        for formula in problem.meta["formulas"]:
            if values and rng.random() < give_up:
                break
            reduced = steps(formula, lambda truth: truth != (rng.random() < slip))
            lines.append("=".join(write(step, thinks_in) for step in reduced))
            values.append(value(reduced[-1]))
        if rng.random() < mix.truncated:
            return Written(problem, author, "<think>" + "\n".join(lines[: rng.randint(1, len(lines))]))
        values += tossed[len(values) :]
        return Written(problem, author, "<think>" + "\n".join(lines) + "</think>" + _answer(values, problem.language))


def _answer(values: list[bool], language: str) -> str:
    return f"<answer>{COMMA[language].join(WORDS[language][truth] for truth in values)}</answer>"


def _letters(values: list[bool]) -> str:
    return "".join("T" if truth else "F" for truth in values)


def sample(leaves: int, split: str, truth: bool, rng: random.Random) -> Formula:
    """A formula of at least FEWEST constants that belongs to `split` and has the value `truth`.

    No part of a train formula or of its steps, right or wrong, is a formula of the test split.
    """
    while True:
        formula = _tree(leaves, rng)
        if value(formula) != truth or _split(formula) != split:
            continue
        if split == "test" or all(_split(part) == split for step in _reachable(formula) for part in _parts(step)):
            return formula


@cache
def _split(formula: Formula) -> str:
    return split_of_text(write(formula, "en"))


def _reachable(formula: Formula) -> set[Formula]:
    """A formula and all of at least FEWEST constants that right or wrong steps can reach from it."""
    reached = {formula}
    for step in _outcomes(formula) - {formula}:
        if _size(step) >= FEWEST:
            reached |= _reachable(step)
    return reached


def _parts(formula: Formula) -> Iterator[Formula]:
    """A formula and its parts, of at least FEWEST constants each."""
    if not isinstance(formula, bool) and _size(formula) >= FEWEST:
        yield formula
        for part in formula[1:]:
            yield from _parts(part)


def _outcomes(formula: Formula) -> set[Formula]:
    """Results of one step in which each value may be right or wrong."""
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
    """The formula in words. `not` binds tightest; an operation inside another is in parentheses."""
    words = WORDS[language]
    if isinstance(formula, bool):
        return words[formula]
    op, *parts = formula
    written = [f"({write(p, language)})" if _binary(p) else write(p, language) for p in parts]
    return words["not"] + written[0] if op == "not" else words[op].join(written)


def _binary(formula: Formula) -> bool:
    return not isinstance(formula, bool) and formula[0] != "not"


def reduce(formula: Formula, err: Callable[[bool], bool] = lambda truth: truth) -> Formula:
    """One reduction step. `err(truth)` is the value that the author writes down."""
    if isinstance(formula, bool):
        return formula
    op, *parts = formula
    if all(isinstance(part, bool) for part in parts):
        return err(_apply(op, parts))
    return (op, *(reduce(part, err) for part in parts))


def steps(formula: Formula, err: Callable[[bool], bool] = lambda truth: truth) -> list[Formula]:
    """The formula and the result of each step; the last is the value."""
    chain = [formula]
    while not isinstance(chain[-1], bool):
        chain.append(reduce(chain[-1], err))
    return chain
