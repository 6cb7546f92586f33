"""Countdown with three numbers 1..10 and a target of at most 60: the search task of the R1-Zero demonstration.

Use each number exactly once with + - * / and parentheses to make the target. Verifying is easy and finding is not,
which is where reflection pays (rl.md 1 and 7). Every problem has a solution in + - *; the verifier also takes exact
division. All problems are enumerated, so the first n problems of a split are n different ones.
"""

from collections import Counter
from functools import cache, lru_cache
from itertools import combinations_with_replacement

from bessemer.tasks.base import (
    CORRECT,
    UNPARSABLE,
    WRONG_NUMBERS,
    WRONG_VALUE,
    Problem,
    Task,
    Written,
    split_of,
    stable_hash,
)
from bessemer.tasks.countdown.drills import HEADS, drill_page
from bessemer.tasks.countdown.expression import Unparsable, parse_expression
from bessemer.tasks.countdown.traces import WORDS, TraceMix, respond
from bessemer.tasks.countdown.tries import all_tries

NUMBERS = range(1, 11)
MAX_TARGET = 60

TEMPLATES = {
    ("en", "seen"): (
        "Use {numbers} to make {target}.",
        "Make {target} from {numbers}.",
        "Get {target} from {numbers}.",
    ),
    ("en", "held-out"): ("Combine {numbers} into {target}.", "Reach {target} by using {numbers}."),
    ("zh", "seen"): ("用{numbers}算出{target}。", "由{numbers}得到{target}。", "把{numbers}变成{target}。"),
    ("zh", "held-out"): ("请以{numbers}凑成{target}。", "怎样用{numbers}求得{target}。"),
}
COMMA = {"en": ", ", "zh": "、"}


class Countdown(Task):
    name, domain = "countdown", "search"
    Mix = TraceMix

    def size(self, split: str) -> int:
        """Number of different problems (multiset and target) in a split."""
        return len(_problems(split))

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        size = self.size(split)
        numbers, target = _shuffled(split, seed, index // size)[index % size]
        rng = self.rng("problem", split, index, seed)
        shown = rng.sample(numbers, 3)
        templates = TEMPLATES[language, phrasing]
        template = rng.randrange(len(templates))
        prompt = templates[template].format(numbers=COMMA[language].join(map(str, shown)), target=target)
        meta = {"numbers": shown, "target": target, "template": f"{language}-{phrasing}-{template}"}
        meta["difficulty"] = _difficulty(numbers, target)
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", prompt, language, meta)

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
        language = self._language(language, "drill", index, seed)
        return drill_page(WORDS[language], HEADS[language], COMMA[language], self.rng("drill", index, seed))


@cache
def _problems(split: str) -> tuple[tuple[tuple[int, int, int], int], ...]:
    """Every (multiset, target) of a split that some try solves."""
    found = []
    for numbers in combinations_with_replacement(NUMBERS, 3):
        if split_of(numbers) == split:
            targets = {t.value for t in all_tries(numbers) if 1 <= t.value <= MAX_TARGET}
            found.extend((numbers, target) for target in sorted(targets))
    return tuple(found)


@lru_cache(maxsize=8192)
def _difficulty(numbers: tuple[int, int, int], target: int) -> int:
    """1 where sums and differences make the target, 2 where a product must come first, 3 where it must come last."""
    found = [made for made in all_tries(numbers) if made.value == target]
    if any("*" not in (made.op, made.then) for made in found):
        return 1
    return 2 if any(made.then != "*" for made in found) else 3


@lru_cache(maxsize=64)
def _shuffled(split: str, seed: int, epoch: int) -> tuple[tuple[tuple[int, int, int], int], ...]:
    return tuple(sorted(_problems(split), key=lambda p: stable_hash("countdown", split, seed, epoch, *p)))
