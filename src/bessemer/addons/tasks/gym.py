"""`gym:NAME` and `gym:NAME@LEVEL`: every dataset of reasoning-gym as a task, with its own scorer.

Without a level, the problems are those of the dataset's default settings, and their difficulty is 0; level n is the
n-th step of the dataset's curriculum. A hash of its text assigns a question to a split, half of all questions to each,
so that questions of either are quick to generate: no question is ever asked in both splits, whatever the seeds.

Only a score of 1 is correct. The scorers give partial scores for much less (0.14 for "banana" where another word should
be spelled backwards, 0.67 for 113 where the sum is 13), and a policy learns to collect partial rewards before it learns
the task. So they are credit (`Verdict.partial`) only if the option `partial_credit` asks for it. A problem whose own
answer does not score 1 is skipped and the next one sampled; a dataset with only such problems raises UserError.

Every field of the dataset's configuration is an option too, such as `min_terms` of chain_sum.

The library lives in the referee process, in which the second half of this file runs. Some scorers evaluate the answer,
as Python or through sympy, so both are disarmed: `eval` inside reasoning-gym reads literals only, except in modules
that evaluate their own text, and sympy parses plain algebra only.

Many scorers ignore a part of the answer: a sign, words before or after it. So what pays without such a part (`parts`)
is not correct: it could say anything there. RULES tighten scorers that give a full score for less in other ways. They
come from giving every dataset the same undeserved answers (the question, 0, another problem's answer, the right one
among others, nan, its negative); the tests repeat some of them.
"""

import ast
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fractions import Fraction
from functools import cache, lru_cache
from math import isfinite
from types import ModuleType
from typing import Any

import numpy as np

from bessemer.addons.tasks.referee import TIMEOUT, RefereeFault, ask, guard_sympy
from bessemer.addons.tasks.tools import calculate
from bessemer.addons.tasks.verifiers import CostlyTask
from bessemer.errors import UserError
from bessemer.tasks.base import (
    CORRECT,
    UNPARSABLE,
    WRONG_VALUE,
    Grade,
    Problem,
    TaskOptions,
    split_of_text,
    stable_hash,
)

MAX_LEVEL = 20
TEST_SHARE = 0.5
TRIES = 64
UNSUPPORTED = ("composite",)  # a mixture of the others, which needs a list of them
TRUSTED = ("basic_arithmetic", "bitwise_arithmetic", "generators_00_49", "generators_50_99")
"""Modules whose `eval` sees the text of their own problem and never an answer."""
_WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)*")
ScoreRule = Callable[[str, dict[str, Any]], bool]


@dataclass(frozen=True)
class GymOptions(TaskOptions):
    partial_credit: bool = False
    """Whether an answer that the dataset's scorer rates between 0 and 1 earns that credit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.partial_credit, bool):
            raise UserError(f"partial_credit is {self.partial_credit!r}; set true or false")


class Gym(CostlyTask):
    domain = "gym"
    all_languages = ("en",)
    phrasings = ("seen",)
    Options = GymOptions
    options: GymOptions

    def __init__(self, dataset: str, **settings: Any):
        self.name = f"gym:{dataset}"
        self.dataset, at, level = dataset.partition("@")
        if at and not (level.isascii() and level.isdigit() and 1 <= int(level) <= MAX_LEVEL):
            raise UserError(f"{self.name}: the level is a number from 1 to {MAX_LEVEL}, as in gym:word_sorting@2")
        self.level = int(level or 0)
        names, levelled = _datasets()
        if self.dataset not in names:
            near = " or ".join(get_close_matches(self.dataset, names, n=2, cutoff=0.0))
            raise UserError(f"reasoning-gym has no dataset {self.dataset!r}; did you mean {near}?")
        if at and self.dataset not in levelled:
            raise UserError(f"gym:{self.dataset} has no levels; leave out @{level}")
        of_dataset = {key: settings.pop(key) for key in [*settings] if key in _configuration(self.dataset)}
        if at and of_dataset:
            raise UserError(f"{self.name}: the level decides {', '.join(of_dataset)}; leave out @{level}, or these")
        super().__init__(**settings)
        self.configured = json.dumps(of_dataset, sort_keys=True)
        """The options that the dataset itself takes."""
        if of_dataset:
            _sample(self.dataset, 0, self.configured, "train", 0, 0)  # UserError for a value that it refuses

    def option_names(self) -> list[str]:
        return [*super().option_names(), *(() if self.level else _configuration(self.dataset))]

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        sampled = _sample(self.dataset, self.level, self.configured, split, seed, index)
        meta = {key: sampled[key] for key in ("answer", "item", "refused")} | {"difficulty": self.level}
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", sampled["question"], language, meta)

    def grade(self, problem: Problem, answer: str) -> Grade:
        """The canonical form is the text with each run of white space as one space."""
        answer, gold = answer.strip(" \r\n\t"), problem.meta["answer"]
        if not answer or len(answer) > 200 + 4 * len(gold):
            return UNPARSABLE, None
        if not answer.isascii() and not set(gold + problem.prompt).issuperset(c for c in answer if not c.isascii()):
            return UNPARSABLE, None  # a scorer may read other alphabets' digits and look-alikes
        canonical = " ".join(answer.split())[:500]
        if answer == gold.strip(" \r\n\t"):
            return CORRECT, canonical
        try:
            score = self._score(problem, answer)
        except RefereeFault as fault:
            return TIMEOUT if str(fault) == TIMEOUT else UNPARSABLE, None
        for part in parts(answer, gold) if score >= 1 else ():
            with suppress(RefereeFault):
                score = 0.0 if self._score(problem, part) >= 1 else score
        reason = CORRECT if score >= 1 else WRONG_VALUE
        if self.options.partial_credit:
            return reason, canonical, min(1.0, max(0.0, score))
        return reason, canonical

    def _score(self, problem: Problem, answer: str) -> float:
        return _score(self.dataset, self.level, self.configured, problem.meta["item"], answer)


def parts(answer: str, gold: str) -> Iterator[str]:
    """An answer without what a scorer may ignore: a minus sign in front, a word that the right one lacks (plurals are
    the same), the first word or the last if it has more of them."""
    words, gold_words = list(_WORD.finditer(answer)), [word.lower().rstrip("s") for word in _WORD.findall(gold)]
    if answer.startswith("-") and re.search("[^-0., ]", answer):  # -0 is 0
        yield answer[1:]
    for other in {word[0] for word in words if word[0].isalpha() and word[0].lower().rstrip("s") not in gold_words}:
        yield _WORD.sub(lambda word, other=other: "" if word[0] == other else word[0], answer)  # type: ignore[misc]
    if len(words) > max(1, len(gold_words)):
        yield answer[words[0].end() :]
        yield answer[: words[-1].start()]


@cache
def _datasets() -> tuple[frozenset[str], frozenset[str]]:
    reply = ask("gym-names")
    return frozenset(reply["names"]), frozenset(reply["levelled"])


@cache
def _configuration(dataset: str) -> tuple[str, ...]:
    return tuple(ask("gym-options", dataset=dataset)["names"])


@lru_cache(maxsize=4096)
def _sample(dataset: str, level: int, configured: str, split: str, seed: int, index: int) -> dict[str, Any]:
    return ask("gym-problem", dataset=dataset, level=level, configured=configured, split=split, seed=seed, index=index)


@lru_cache(maxsize=4096)
def _score(dataset: str, level: int, configured: str, item: int, answer: str) -> float:
    """The scorer's number; 0 where it gives none."""
    score = ask("gym-score", dataset=dataset, level=level, configured=configured, item=item, answer=answer)["score"]
    return score if isfinite(score) else 0.0


# In the referee process.


@cache
def _reasoning_gym() -> ModuleType:
    """The library, made unable to evaluate an answer as code."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"gym tasks need reasoning-gym ({error}): pip install reasoning-gym") from error
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym.") and name.rpartition(".")[2] not in TRUSTED:
            module.eval = ast.literal_eval  # type: ignore[attr-defined]  # hides the builtin in this module
    guard_sympy()
    return reasoning_gym


def library_names(request: dict[str, Any]) -> dict[str, Any]:
    """Every dataset that can be a task, and which of them have levels."""
    factory = _reasoning_gym().factory
    names = sorted(set(factory.DATASETS) - set(UNSUPPORTED))
    return {"names": names, "levelled": [name for name in names if name in factory.CURRICULA]}


def library_options(request: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataset's configuration that a user may set."""
    configuration = _reasoning_gym().factory.DATASETS[request["dataset"]][1]
    return {"names": [field.name for field in fields(configuration) if field.name not in ("seed", "size")]}


def library_problem(request: dict[str, Any]) -> dict[str, Any]:
    """The first item, over a sequence of seeds, that belongs to the split and whose own answer scores 1."""
    keys = ("dataset", "level", "configured", "split", "index")
    dataset, level, configured, split, index = (request[key] for key in keys)
    refused = 0
    for attempt in range(TRIES):
        seed = stable_hash("gym", dataset, level, split, request["seed"], index, attempt) % 2**31
        item, score = _item(dataset, level, configured, seed)
        if split_of_text(item["question"], TEST_SHARE) != split:
            continue
        if not isinstance(item["answer"], str) or score(item["answer"]) < 1:
            refused += 1
            continue
        return {"question": item["question"], "answer": item["answer"], "item": seed, "refused": refused}
    raise UserError(
        f"gym:{dataset} gave no {split} problem in {TRIES} samples; the answer of {refused} of them is missing or does "
        "not score 1 with its own scorer. Choose another dataset or level"
    )


def prepare_scorer(request: dict[str, Any]) -> Callable[[str], float]:
    return _item(request["dataset"], request["level"], request["configured"], request["item"])[1]


def judge_score(scorer: Callable[[str], float], request: dict[str, Any]) -> dict[str, Any]:
    return {"score": scorer(request["answer"])}


@lru_cache(maxsize=1024)
def _item(dataset: str, level: int, configured: str, seed: int) -> tuple[dict[str, Any], Callable[[str], float]]:
    """Item 0 of the dataset with that seed, and its scorer."""
    library = _reasoning_gym()
    curricula, datasets = library.factory.CURRICULA, library.factory.DATASETS
    random.seed(seed)
    np.random.seed(seed)  # a few generators use the global state
    try:
        if level:
            curriculum = curricula[dataset]()
            for name in curriculum.attributes:
                highest = len(curriculum.attributes[name].levels) - 1
                curriculum.set_attr_level(name, min(level - 1, highest))
            generated = datasets[dataset][0](curriculum.generate_configuration({"seed": seed, "size": 1}))
        else:
            generated = library.create_dataset(dataset, seed=seed, size=1, **json.loads(configured))
        item = generated[0]
    except Exception as error:
        how = f"with {configured}" if configured != "{}" else f"at level {level}"
        raise UserError(f"gym:{dataset} cannot generate a problem {how}: {error}") from error

    def scorer(answer: str) -> float:
        return float(generated.score_answer(answer, item)) if allows(dataset, answer, item) else 0.0

    return item, scorer


def _own_numbers(answer: str, item: dict[str, Any]) -> bool:
    """puzzle24 takes any four numbers, and what they make is cut down to 24."""
    if Counter(map(int, re.findall("[0-9]{1,6}", answer))) != Counter(item["metadata"]["numbers"]):
        return False
    try:
        return calculate(answer) == "24"
    except ValueError:
        return False


def _same_grid(answer: str, item: dict[str, Any]) -> bool:
    """game_of_life compares the cells that both grids have."""
    try:
        return bool(json.loads(answer) == json.loads(item["answer"]))
    except (ValueError, RecursionError):
        return False


def _near(answer: str, item: dict[str, Any]) -> bool:
    """coin_flip gives partial scores for a matching prefix, and 0 is a prefix of 0.0349."""
    try:
        exact = len(answer) < 40 and "e" not in answer.lower()  # 1e999999999 is a bomb
        return exact and abs(Fraction(answer) - Fraction(item["answer"])) < 1e-4
    except (ValueError, ZeroDivisionError):
        return False


def _same_numbers(answer: str, item: dict[str, Any]) -> bool:
    """number_sorting takes numbers that are off by 1."""
    answered, gold = (re.findall(r"[-+]?[0-9]+(?:\.[0-9]+)?", text) for text in (answer, item["answer"]))
    return list(map(float, answered)) == list(map(float, gold))


def _only(pattern: str) -> ScoreRule:
    """gsm_symbolic, kakurasu, sokoban and survo read a number, moves or digits out of any text."""
    return lambda answer, item: re.fullmatch(pattern, answer) is not None


RULES: dict[str, ScoreRule] = {
    "coin_flip": _near,
    "game_of_life": _same_grid,
    "game_of_life_halting": lambda answer, item: answer.lower() == item["answer"].lower(),  # it takes any answer
    "gsm_symbolic": _only(r"-?\$?[0-9][0-9,]{0,15}(?:\.[0-9]{1,15})?"),
    "kakurasu": _only("[01 \n]{1,500}"),
    "number_sorting": _same_numbers,
    "puzzle24": _own_numbers,
    "spell_backward": lambda answer, item: answer.strip().lower() == item["answer"].lower(),  # it takes a longer word
    "sokoban": _only("[UDLRudlr \n]{1,500}"),
    "survo": _only("[0-9 \n]{1,500}"),
}
_NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf(?:inity)?)[ij]?(?![a-z])", re.IGNORECASE)
"""What Python reads as a number although it is none: its distance from the right one compares as small."""


def allows(dataset: str, answer: str, item: dict[str, Any]) -> bool:
    number = re.search("[0-9]", item["answer"]) and not _NO_NUMBER.search(item["answer"])  # not a word such as NAN
    odd = number and _NO_NUMBER.search(answer)
    return not odd and RULES.get(dataset, lambda *_: True)(answer, item)
