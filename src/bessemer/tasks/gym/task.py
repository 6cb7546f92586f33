"""`gym:NAME` and `gym:NAME@LEVEL`: every dataset of reasoning-gym as a task, with its own scorer.

Where no level is named, the problems are those of the dataset's default settings, and their difficulty is 0; level n
is the n-th step of the dataset's curriculum. A question belongs to the test split when a hash of its text says so, one
half of all questions each, because a generator of ours must be able to find some of either: so no question of one
split is ever asked in the other, whatever the seeds.

Only a score of 1 pays. The scorers give part of it for much less (0.14 for "banana" to whoever should spell some other
word backwards), and a reward of parts is learnt before the task is. A problem whose own answer does not score 1 is
skipped and the next one drawn; a dataset that has none other is refused. The library lives in the referee process.
"""

from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks.base import CORRECT, TIMEOUT, UNPARSABLE, WRONG_VALUE, Problem, Task
from bessemer.tasks.referee import RefereeFault, ask

MAX_LEVEL = 20


class Gym(Task):
    domain = "gym"
    all_languages = ("en",)
    phrasings = ("seen",)

    def __init__(self, dataset: str, **settings: Any):
        self.name = f"gym:{dataset}"
        self.dataset, at, level = dataset.partition("@")
        if at and not (level.isascii() and level.isdigit() and 1 <= int(level) <= MAX_LEVEL):
            raise UserError(f"{self.name}: the level is a number from 1 to {MAX_LEVEL}, as in gym:word_sorting@2")
        self.level = int(level or 0)
        known, levelled = _datasets()
        if self.dataset not in known:
            near = " or ".join(get_close_matches(self.dataset, known, n=2, cutoff=0.0))
            raise UserError(f"reasoning-gym has no dataset {self.dataset!r}; did you mean {near}?")
        if at and self.dataset not in levelled:
            raise UserError(f"gym:{self.dataset} has no levels; leave out @{level}")
        super().__init__(**settings)

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        drawn = _draw(self.dataset, self.level, split, seed, index)
        meta = {"answer": drawn["answer"], "item": drawn["item"], "refused": drawn["refused"], "difficulty": self.level}
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", drawn["question"], language, meta)

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        """The canonical form is the text with its white space made single blanks."""
        answer, gold = answer.strip(" \n\t"), problem.meta["answer"]
        if not answer or len(answer) > 200 + 4 * len(gold):
            return UNPARSABLE, None
        canonical = " ".join(answer.split())[:500]
        if answer == gold.strip(" \n\t"):
            return CORRECT, canonical
        try:
            score = _score(self.dataset, self.level, problem.meta["item"], answer)
        except RefereeFault as fault:
            return TIMEOUT if str(fault) == TIMEOUT else UNPARSABLE, None
        return CORRECT if score >= 1 else WRONG_VALUE, canonical


@cache
def _datasets() -> tuple[frozenset[str], frozenset[str]]:
    reply = ask("gym-names")
    return frozenset(reply["names"]), frozenset(reply["levelled"])


@lru_cache(maxsize=4096)
def _draw(dataset: str, level: int, split: str, seed: int, index: int) -> dict[str, Any]:
    return ask("gym-problem", dataset=dataset, level=level, split=split, seed=seed, index=index)


@lru_cache(maxsize=4096)
def _score(dataset: str, level: int, item: int, answer: str) -> float:
    return ask("gym-score", dataset=dataset, level=level, item=item, answer=answer)["score"]
