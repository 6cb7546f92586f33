"""Word problems in the style of GSM8K, parallel in English and Chinese: a story, two or three steps, an integer.

The language does not affect sampling: problem i of a seed is the same story with the same numbers in both. Most
stories are composed of clauses (`composed_stories`), the others are written one by one (stories.toml); all are our own
text. A story has its wording in both languages; `ranges` for the numbers a, b, c, d in the order of the text; and
`steps`, each `left op right` over these numbers, over x and y (the results of the first and the second step) and over
constants that the text implies ("legs of a cow").

Compositions and, by the rule that all tasks share, sets of numbers are held out of training: a test problem is a story
no page contains, with numbers no page about any story combines. `phrasing="held-out"` asks for stories in settings that
no page has a clause about (`HELD_OUT`). Every intermediate value lies in 1..LARGEST and every division comes out even.
A trace has one short line per step: `first:3*4=12`, `then:12-5=7`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from bessemer.addons.tasks.composed_stories import STEPS, Story, composed
from bessemer.tasks.base import Problem, Task, Written, check_shares, read_toml, split_of
from bessemer.tasks.countdown_expressions import LARGEST, apply

Step = tuple[int, str, int, int]
"""left, op, right, result"""

OPS = "+-*/"
ONE_BY_ONE = 0.3
"""Share of the training problems whose story was written individually."""
ORDER = {"en": ("first:", "then:"), "zh": ("先:", "再:")}


_TEXTS = read_toml(__package__, "stories.toml")
NAMES, THINGS = (tuple(map(tuple, _TEXTS[key])) for key in ("names", "things"))
"""(English, Chinese). THINGS are counted with the same measure word in Chinese."""
TRAINED, HELD_OUT = (
    tuple(Story.parse(id, **story) for id, story in _TEXTS[key].items()) for key in ("trained", "held_out")
)


@dataclass(frozen=True)
class WordsMix:
    """Settings of the word-problem documents, shares between 0 and 1."""

    direct: float = 0.25
    """Pages that answer without thinking."""
    direct_right: float = 0.3
    """The share of those that are right; the others are off by up to 20."""
    sloppy: float = 0.75
    """Thinking pages by authors who slip, misread and give up; the others are careful and always right."""
    slip: float = 0.08
    """Chance per step that a sloppy author writes a wrong result."""
    misread: float = 0.25
    """Chance per step that a sloppy author takes another operation or another number of the story."""
    give_up: float = 0.15
    """Chance, before each step but the first, that a sloppy author stops and answers with the last result."""
    other_language: float = 0.10
    """Thinking pages whose `first:` and `then:` are in the other language."""
    truncated: float = 0.05
    """Thinking pages that break off before the answer."""

    def __post_init__(self) -> None:
        check_shares(self, list(self.__dataclass_fields__))


class WordProblems(Task):
    name, domain = "words", "words"
    translated = True
    Mix = WordsMix

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng = self.rng("problem", split, index, seed)
        story = _choose(split, phrasing, rng)
        numbers = _sample_numbers(story, rng)
        while split_of(list(numbers.values())) != split:
            numbers = _sample_numbers(story, rng)
        at = ("en", "zh").index(language)
        people, item = rng.sample(NAMES, 2), rng.choice(THINGS)
        text = story.en if language == "en" else story.zh
        prompt = text.format(name=people[0][at], other=people[1][at], thing=item[at], **numbers)
        meta = {
            "story": story.id,
            "numbers": numbers,
            "steps": story.steps,
            "value": work(story.steps, numbers)[-1][-1],
            "difficulty": len(story.steps),
        }
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", prompt, language, meta)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem, mix = self.train_problem(index, seed, language), self.mix
        rng = self.rng("document", index, seed)
        value = problem.meta["value"]
        if rng.random() < mix.direct:
            wrong = max(1, value + rng.choice((-1, 1)) * rng.randint(1, 20))
            return Written(problem, "direct", f"<answer>{value if rng.random() < mix.direct_right else wrong}</answer>")
        author = "sloppy" if rng.random() < mix.sloppy else "careful"
        steps, numbers = problem.meta["steps"], problem.meta["numbers"]
        done = work(steps, numbers) if author == "careful" else self._sloppy_work(steps, numbers, rng)
        others = [other for other in self.languages if other != problem.language]
        order = ORDER[others[0] if others and rng.random() < mix.other_language else problem.language]
        lines = [f"{order[min(i, 1)]}{left}{op}{right}={result}" for i, (left, op, right, result) in enumerate(done)]
        if rng.random() < mix.truncated:
            return Written(problem, author, "<think>" + "\n".join(lines[: rng.randint(1, len(lines))]))
        return Written(problem, author, "<think>" + "\n".join(lines) + f"</think><answer>{done[-1][-1]}</answer>")

    def _sloppy_work(self, steps: tuple[str, ...], numbers: dict[str, int], rng: random.Random) -> list[Step]:
        """The steps as a sloppy author takes them: some misread, some wrong, the last ones perhaps missing."""
        lines: list[str] = []
        for step in steps:
            if lines and rng.random() < self.mix.give_up:
                break
            if rng.random() < self.mix.misread:
                left, op, right = step[0], step[1], step[2]
                step = left + rng.choice(OPS) + right if rng.random() < 0.5 else left + op + rng.choice(list(numbers))
            lines.append(step)

        def err(value: int) -> int:
            return value if rng.random() >= self.mix.slip else max(1, value + rng.choice((-10, -2, -1, 1, 2, 10)))

        return work(tuple(lines), numbers, err)


def work(
    steps: tuple[str, ...], numbers: dict[str, int], err: Callable[[int], int] = lambda value: value
) -> list[Step]:
    """Every step with its values. `err(value)` is the result that the author writes down.

    A result that is not a natural number becomes the nearest small one; only sloppy authors write such steps.
    """
    values, done = dict(numbers), []
    for name, step in zip("xyz", steps, strict=False):
        left, op, right = tuple(step)
        a, b = (values.get(side) or int(side) for side in (left, right))
        result = max(1, a // b if op == "/" else apply(a, op, b))
        values[name] = err(min(result, LARGEST))
        done.append((a, op, b, values[name]))
    return done


def _choose(split: str, phrasing: str, rng: random.Random) -> Story:
    if phrasing == "held-out":
        return rng.choice(HELD_OUT)
    if split == "train" and rng.random() < ONE_BY_ONE:
        return rng.choice(TRAINED)
    return rng.choice(composed(split, rng.choice(STEPS)))


def _sample_numbers(story: Story, rng: random.Random) -> dict[str, int]:
    """Numbers for which every step comes out even, and within 1..LARGEST."""
    while True:
        numbers = {letter: rng.randint(*bounds) for letter, bounds in story.ranges.items()}
        if all(_even(step) for step in work(story.steps, numbers)):
            return numbers


def _even(step: Step) -> bool:
    a, op, b, result = step
    return a == b * result if op == "/" else apply(a, op, b) == result
