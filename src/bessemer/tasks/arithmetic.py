"""Multi-step arithmetic: sums and differences of 2 to 4 terms, a term being a number or a product of two.

A task that rewards thinking but needs no search: RL removes slips and direct guesses in a few steps, which makes it a
regression test alongside countdown. A problem has at least three operands, so that it is never a single fact from a
drill page; every intermediate value lies in 0..120 (LARGEST).
"""

import math
import random
from dataclasses import dataclass

from bessemer import plugins
from bessemer.tasks.base import Problem, Task, Written, check_shares, read_templates, split_of
from bessemer.tasks.countdown_expressions import LARGEST, apply

TEMPLATES = read_templates(__package__, "templates.toml", "arithmetic")


@dataclass(frozen=True)
class ArithmeticMix:
    """Settings of the arithmetic documents, shares between 0 and 1."""

    direct: float = 0.25
    """Pages that answer without thinking."""
    direct_right: float = 0.3
    """The share of those that are right; the others are off by up to 20."""
    slip: float = 0.15
    """Chance per step that a sloppy thinker writes a wrong result."""
    sloppy: float = 0.6
    """Thinking pages by authors who slip; the others are careful and always right."""
    truncated: float = 0.05
    """Thinking pages that break off before the answer."""

    def __post_init__(self) -> None:
        check_shares(self, list(self.__dataclass_fields__))


@plugins.register("tasks", "arithmetic")
class Arithmetic(Task):
    name, domain = "arithmetic", "arithmetic"
    translated = True
    Mix = ArithmeticMix

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng = self.rng("problem", split, index, seed)
        terms, signs = _sample(rng)
        while split_of([n for term in terms for n in term]) != split:
            terms, signs = _sample(rng)
        templates = TEMPLATES[language, phrasing]
        template = rng.randrange(len(templates))
        written = ["*".join(map(str, term)) for term in terms]
        chain = written[0] + "".join(sign + term for sign, term in zip(signs, written[1:], strict=True))
        value = _total(terms, signs)
        meta = {"terms": terms, "signs": signs, "value": value, "template": f"{language}-{phrasing}-{template}"}
        meta["difficulty"] = sum(map(len, terms)) - 1  # operations
        prompt = templates[template].format(chain=chain)
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", prompt, language, meta)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem, mix = self.train_problem(index, seed, language), self.mix
        rng = self.rng("document", index, seed)
        terms, signs, value = (problem.meta[key] for key in ("terms", "signs", "value"))
        if rng.random() < mix.direct:
            wrong = max(0, value + rng.choice((-1, 1)) * rng.randint(1, 20))
            return Written(problem, "direct", f"<answer>{value if rng.random() < mix.direct_right else wrong}</answer>")
        author = "sloppy" if rng.random() < mix.sloppy else "careful"
        steps, value = _calculate(terms, signs, mix.slip if author == "sloppy" else 0.0, rng)
        if rng.random() < mix.truncated:
            return Written(problem, author, "<think>" + ",".join(steps[: rng.randint(1, len(steps))]))
        return Written(problem, author, f"<think>{','.join(steps)}</think><answer>{value}</answer>")


def _sample(rng: random.Random) -> tuple[list[list[int]], list[str]]:
    """Terms and the signs between them, with at least three operands and all totals in 0..LARGEST."""
    while True:
        terms = []
        for _ in range(rng.randint(2, 4)):
            product = rng.random() < 0.4
            terms.append([rng.randint(2, 12), rng.randint(2, 12)] if product else [rng.randint(1, 20)])
        signs = [rng.choice("+-") for _ in terms[1:]]
        if sum(map(len, terms)) >= 3 and _total(terms, signs) is not None:
            return terms, signs


def _total(terms: list[list[int]], signs: list[str]) -> int | None:
    """The value of the chain, or None if a running total leaves 0..LARGEST."""
    total = 0
    for sign, term in zip(["+", *signs], terms, strict=True):
        total = apply(total, sign, math.prod(term))
        if not 0 <= total <= LARGEST:
            return None
    return total


def _calculate(terms: list[list[int]], signs: list[str], slip: float, rng: random.Random) -> tuple[list[str], int]:
    """Steps `3*7=21,21+6=27`: the products from left to right, then the running totals; and the final value."""
    steps: list[str] = []

    def step(left: int, op: str, right: int) -> int:
        value = max(0, apply(left, op, right))  # negative only after a slip; authors write natural numbers
        if rng.random() < slip:
            value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
        steps.append(f"{left}{op}{right}={value}")
        return value

    values = [term[0] if len(term) == 1 else step(term[0], "*", term[1]) for term in terms]
    total = values[0]
    for sign, value in zip(signs, values[1:], strict=True):
        total = step(total, sign, value)
    return steps, total
