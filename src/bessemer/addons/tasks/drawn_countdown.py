"""Countdown with other numbers: `countdown:4` asks for four. Its problems are drawn, not enumerated. As in
`tasks/countdown.py`, each number is used once and the multiset of numbers decides the split. Its documents are those of
`countdown_search.py`."""

import random
from dataclasses import dataclass
from typing import Any

from bessemer.addons.tasks.countdown_search import SearchMix, drill, respond
from bessemer.errors import UserError
from bessemer.tasks.base import Problem, TaskOptions, Written, split_of
from bessemer.tasks.countdown import COMMA, DRILL_HEADS, MAX_TARGET, NUMBERS, Countdown
from bessemer.tasks.countdown_expressions import OPS, apply

MOST_DRAWS = 10_000
"""Draws after which the options allow no problem; one in ten is of the test split."""


@dataclass(frozen=True)
class DrawnOptions(TaskOptions):
    largest: int = NUMBERS[-1]
    """Largest number, 5 to 1,000."""
    highest_target: int = MAX_TARGET
    """Largest target, up to 100,000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("largest", 5, 1_000), ("highest_target", 10, 100_000)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"countdown: {name} is {value!r}; set a whole number from {low} to {high}")


class DrawnCountdown(Countdown):
    Options = DrawnOptions
    options: DrawnOptions
    Mix = SearchMix
    mix: SearchMix

    def __init__(self, numbers: str, **settings: Any) -> None:
        if numbers not in map(str, range(2, 9)):
            raise UserError(f"countdown:{numbers} is no task; write countdown:2 to countdown:8")
        self.name, self.numbers = f"countdown:{numbers}", int(numbers)
        super().__init__(**settings)

    def size(self, split: str) -> None:
        return None

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng = self.rng("problem", split, index, seed)
        numbers, target = _drawn(self.numbers, self.options, split, rng)
        name = f"{self.name}/{split}/{seed}/{index}/{language}"
        return self.asked(name, numbers, target, self.numbers, language, phrasing, rng)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem = self.train_problem(index, seed, language)
        numbers, target = problem.meta["numbers"], problem.meta["target"]
        rng = self.rng("document", index, seed)
        return Written(problem, *respond(numbers, target, self.mix, problem.language, rng))

    def drill(self, index: int, seed: int = 0, language: str | None = None) -> str:
        """A drill page of 8 to 12 lines, with numbers of the train split."""
        language = self._language(language, "drill", index, seed)
        rng, lines = self.rng("drill", index, seed), []
        for _ in range(rng.randint(4, 6)):
            numbers, _ = _drawn(self.numbers, self.options, "train", rng)
            lines += drill(numbers, COMMA[language].join(map(str, numbers)), language, rng)
        return DRILL_HEADS[language] + "\n".join(lines)


def _drawn(n: int, options: DrawnOptions, split: str, rng: random.Random) -> tuple[tuple[int, ...], int]:
    """Numbers of the split, and what a random way to combine them makes."""
    for _ in range(MOST_DRAWS):
        numbers = tuple(rng.randint(1, options.largest) for _ in range(n))
        if split_of(numbers) != split:
            continue
        values = list(numbers)
        while len(values) > 1:
            rng.shuffle(values)
            x, y = sorted((values.pop(), values.pop()), reverse=True)
            values.append(apply(x, rng.choice(OPS), y))
        if 1 <= values[0] <= options.highest_target:
            return numbers, values[0]
    raise UserError(f"countdown:{n} has no {split} problem with {options}; ask for more or larger numbers")
