"""Countdown with three numbers 1..10 and a target of at most 60: the search task of the R1-Zero demonstration.

Use each number exactly once with + - * / and parentheses to make the target. Verifying an answer is easy and finding
one is hard, so reflection helps. Every problem has a solution in + - *; the verifier also accepts exact division.
All problems are enumerated, so the first n problems of a split are distinct.

A share of the documents are drill pages: single skills in exactly the form traces use. Facts have the two shapes of
a step (two small numbers; a running value and a small number). A try begins with the numbers as a prompt lists them,
because using each given number once is what small models learn last. `order:` is the systematic author's opening.
Comparisons favour equality and near misses, where the verdict is hard. Lines with three numbers use numbers of the
train split only; facts and comparisons have too few numbers to reveal a problem.
"""

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import combinations_with_replacement
from typing import ClassVar

from bessemer import plugins
from bessemer.tasks.base import (
    CORRECT,
    UNPARSABLE,
    WRONG_NUMBERS,
    WRONG_VALUE,
    Problem,
    Task,
    Written,
    read_templates,
    split_of,
    stable_hash,
)
from bessemer.tasks.countdown_expressions import LARGEST, OPS, Unparsable, all_tries, apply, parse_expression
from bessemer.tasks.countdown_traces import WORDS, TraceMix, respond

NUMBERS = range(1, 11)
MAX_TARGET = 60

TEMPLATES = read_templates(__package__, "templates.toml", "countdown")
COMMA = {"en": ", ", "zh": "、"}
DRILL_HEADS = {"en": "Drill:\n", "zh": "练习:\n"}


@plugins.register("tasks", "countdown")
class Countdown(Task):
    name, domain = "countdown", "search"
    translated = True
    Mix: ClassVar[type] = TraceMix

    def size(self, split: str) -> int | None:
        """Number of different problems (multiset and target) in a split."""
        return len(_problems(split))

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng, size = self.rng("problem", split, index, seed), len(_problems(split))
        numbers, target = _shuffled(split, seed, index // size)[index % size]
        name = f"{self.name}/{split}/{seed}/{index}/{language}"
        return self.asked(name, numbers, target, _difficulty(numbers, target), language, phrasing, rng)

    def asked(
        self, name: str, numbers: Sequence[int], target: int, difficulty: int, language: str, phrasing: str,
        rng: random.Random,
    ) -> Problem:  # fmt: skip
        """The problem in one of the wordings, its numbers in any order."""
        listed = rng.sample(numbers, len(numbers))
        templates = TEMPLATES[language, phrasing]
        template = rng.randrange(len(templates))
        prompt = templates[template].format(numbers=COMMA[language].join(map(str, listed)), target=target)
        meta = {"numbers": listed, "target": target, "template": f"{language}-{phrasing}-{template}"}
        return Problem(name, prompt, language, meta | {"difficulty": difficulty})

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        try:
            expression = parse_expression(answer)
        except Unparsable:
            return UNPARSABLE, None
        if Counter(expression.numbers) != Counter(problem.meta["numbers"]):
            return WRONG_NUMBERS, expression.canonical
        return CORRECT if expression.value == problem.meta["target"] else WRONG_VALUE, expression.canonical

    def document(self, index: int, seed: int = 0, language: str | None = None) -> str:
        """A problem page or, for `mix.drill_share` of the indices, a drill page."""
        if self.rng("kind", index, seed).random() < self.mix.drill_share:
            return self.drill(index, seed, language)
        return self.written(index, seed, language).text

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem = self.train_problem(index, seed, language)
        rng = self.rng("document", index, seed)
        author = self.mix.author(rng)
        others = [other for other in self.languages if other != problem.language]
        mixed = others and rng.random() < self.mix.other_language
        words = WORDS[others[0] if mixed else problem.language]
        numbers = tuple(sorted(problem.meta["numbers"]))
        return Written(problem, author.kind, respond(numbers, problem.meta["target"], author, self.mix, words, rng))

    def drill(self, index: int, seed: int = 0, language: str | None = None) -> str:
        """A drill page of 8 to 16 lines."""
        language = self._language(language, "drill", index, seed)
        rng = self.rng("drill", index, seed)
        lines = [_drill_line(WORDS[language], COMMA[language], rng) for _ in range(rng.randint(8, 16))]
        return DRILL_HEADS[language] + "\n".join(lines)


@cache
def _problems(split: str) -> tuple[tuple[tuple[int, int, int], int], ...]:
    """Every (multiset, target) of a split that some try solves."""
    problems: list[tuple[tuple[int, int, int], int]] = []
    for numbers in combinations_with_replacement(NUMBERS, 3):
        if split_of(numbers) == split:
            targets = {t.value for t in all_tries(numbers) if 1 <= t.value <= MAX_TARGET}
            problems.extend((numbers, target) for target in sorted(targets))
    return tuple(problems)


@lru_cache(maxsize=8192)
def _difficulty(numbers: tuple[int, int, int], target: int) -> int:
    """1 if sums and differences make the target, 2 if a product must come first, 3 if it must come last."""
    solutions = [solution for solution in all_tries(numbers) if solution.value == target]
    if any("*" not in (solution.op, solution.then) for solution in solutions):
        return 1
    return 2 if any(solution.then != "*" for solution in solutions) else 3


@lru_cache(maxsize=64)
def _shuffled(split: str, seed: int, epoch: int) -> tuple[tuple[tuple[int, int, int], int], ...]:
    return tuple(sorted(_problems(split), key=lambda p: stable_hash("countdown", split, seed, epoch, *p)))


def _drill_line(words: dict[str, str], comma: str, rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return _drill_comparison(words, rng)
    if kind < 0.53:
        return _drill_fact(rng)
    numbers = _train_numbers(rng)
    listed = comma.join(map(str, rng.sample(numbers, 3)))
    if kind < 0.67:
        return f"{listed} {words['order']}" + ",".join(map(str, sorted(numbers, reverse=True)))
    attempt = rng.choice(all_tries(numbers))
    return f"{listed}:{(attempt.swapped() if rng.random() < 0.5 else attempt).write()[0]}"


def _train_numbers(rng: random.Random) -> tuple[int, int, int]:
    """Three numbers of the train split, ascending."""
    while True:
        low, middle, high = sorted(rng.randint(1, 10) for _ in range(3))
        numbers = (low, middle, high)
        if split_of(numbers) == "train":
            return numbers


def _drill_fact(rng: random.Random) -> str:
    op, small = rng.choice(OPS), rng.randint(1, 10)
    if rng.random() < 0.5:
        other = rng.randint(1, min(10, LARGEST // small))
    else:
        other = rng.randint(0, LARGEST // small if op == "*" else LARGEST - small)
    left, right = (other, small) if op != "-" or other >= small else (small, other)
    return f"{left}{op}{right}={apply(left, op, right)}"


def _drill_comparison(words: dict[str, str], rng: random.Random) -> str:
    target = rng.randint(1, 60)
    kind = rng.random()
    if kind < 0.30:
        value = target
    elif kind < 0.70:
        value = max(0, target + rng.randint(-5, 5))
    else:
        value = rng.randint(0, LARGEST)
    verdict = "yes" if value == target else "low" if value < target else "high"
    return f"{value}:{target}{words[verdict]}"
