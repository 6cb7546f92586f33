"""The last digit of a sum of four digits, written in words: the smallest task in which thinking pays.

A guess is right one time in ten; a thought that writes every step, `three+eight=one`, is right unless it slips.
Many authors guess and others think, so RL has something to amplify, and a network of 0.2M parameters learns it:
the smallest R1-Zero there is. Words are English or Chinese, so that a thought can mix them.
"""

import random
from dataclasses import dataclass

from bessemer.tasks.base import Problem, Task, Written, check_shares, read_templates, split_of

TEMPLATES = read_templates(__package__, "questions.toml", "sums")
DIGITS = 4
WORDS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
}
BETWEEN = {"en": ", ", "zh": "、"}


@dataclass(frozen=True)
class SumsMix:
    """Settings of the documents, shares between 0 and 1."""

    direct: float = 0.4
    """Pages that answer without thinking."""
    direct_right: float = 0.1
    """The share of those that are right: chance."""
    slip: float = 0.01
    """Chance that a step of a thought is wrong."""
    other_language: float = 0.0
    """Thinking pages that write each word in either language."""

    def __post_init__(self) -> None:
        check_shares(self, list(self.__dataclass_fields__))


class DigitSums(Task):
    name, domain = "sums", "arithmetic"
    translated = True
    Mix = SumsMix

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng = self.rng("problem", split, index, seed)
        digits = _digits(rng)
        while split_of(digits) != split:
            digits = _digits(rng)
        templates = TEMPLATES[language, phrasing]
        template = rng.randrange(len(templates))
        words = BETWEEN[language].join(WORDS[language][digit] for digit in digits)
        tens, value = divmod(sum(digits), 10)
        meta = {"digits": digits, "value": value, "template": f"{language}-{phrasing}-{template}", "difficulty": tens}
        return Problem(
            f"{self.name}/{split}/{seed}/{index}/{language}", templates[template].format(words=words), language, meta
        )

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem, mix = self.train_problem(index, seed, language), self.mix
        rng = self.rng("document", index, seed)
        value = problem.meta["value"]
        if rng.random() < mix.direct:
            wrong = (value + rng.randint(1, 9)) % 10
            return Written(problem, "direct", f"<answer>{value if rng.random() < mix.direct_right else wrong}</answer>")
        mixed = rng.random() < mix.other_language

        def word(digit: int) -> str:
            return WORDS[rng.choice(self.all_languages) if mixed else problem.language][digit]

        total, *others = problem.meta["digits"]
        steps = []
        for digit in others:
            before, slipped = total, rng.randint(1, 9) if rng.random() < mix.slip else 0
            total = (total + digit + slipped) % 10
            steps.append(f"{word(before)}+{word(digit)}={word(total)}")
        thought = BETWEEN[problem.language].join(steps)
        return Written(problem, "thinking", f"<think>{thought}</think><answer>{total}</answer>")


def _digits(rng: random.Random) -> list[int]:
    return [rng.randrange(10) for _ in range(DIGITS)]
