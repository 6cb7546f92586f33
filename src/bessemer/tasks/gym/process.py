"""The referee's half of `gym`: draws problems of reasoning-gym and runs its scorers.

Some scorers evaluate the answer they are given, as Python or through sympy. Both are disarmed when this module is
imported: `eval` inside reasoning-gym reads literals only, except in modules that evaluate their own text, and sympy
parses plain algebra only.
"""

import ast
import random
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from bessemer.errors import UserError
from bessemer.tasks.base import split_of_text, stable_hash
from bessemer.tasks.gym.strict import allows
from bessemer.tasks.maths.algebra import guard_sympy

try:
    import reasoning_gym
    from reasoning_gym.factory import CURRICULA, DATASETS
except ImportError as error:
    raise UserError(f"gym tasks need reasoning-gym ({error}): pip install reasoning-gym") from error

TEST_SHARE = 0.5
TRIES = 64
UNSUPPORTED = ("composite",)  # a mixture of the others, which needs a list of them
TRUSTED = ("basic_arithmetic", "bitwise_arithmetic", "generators_00_49", "generators_50_99")
"""Modules whose `eval` sees the text of their own problem and never an answer."""


def _disarm() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym.") and name.rpartition(".")[2] not in TRUSTED:
            module.eval = ast.literal_eval
    guard_sympy()


_disarm()


def names(request: dict[str, Any]) -> dict[str, Any]:
    """Every dataset that can be a task, and those of them that have levels."""
    known = sorted(set(DATASETS) - set(UNSUPPORTED))
    return {"names": known, "levelled": [name for name in known if name in CURRICULA]}


def problem(request: dict[str, Any]) -> dict[str, Any]:
    """The first item of a row of seeds that belongs to the split and whose own answer scores 1."""
    dataset, level, split, index = (request[key] for key in ("dataset", "level", "split", "index"))
    refused = 0
    for attempt in range(TRIES):
        seed = stable_hash("gym", dataset, level, split, request["seed"], index, attempt) % 2**31
        item, score = _item(dataset, level, seed)
        if split_of_text(item["question"], TEST_SHARE) != split:
            continue
        if not isinstance(item["answer"], str) or score(item["answer"]) < 1:
            refused += 1
            continue
        return {"question": item["question"], "answer": item["answer"], "item": seed, "refused": refused}
    raise UserError(
        f"gym:{dataset} gave no {split} problem in {TRIES} draws; the answer of {refused} of them is missing or does "
        "not score 1 with its own scorer. Choose another dataset or level"
    )


def entry(request: dict[str, Any]) -> Callable[[str], float]:
    return _item(request["dataset"], request["level"], request["item"])[1]


def score(scorer: Callable[[str], float], request: dict[str, Any]) -> dict[str, Any]:
    return {"score": scorer(request["answer"])}


@lru_cache(maxsize=1024)
def _item(dataset: str, level: int, seed: int) -> tuple[dict[str, Any], Callable[[str], float]]:
    """Item 0 of the dataset of that seed, and its scorer."""
    random.seed(seed)
    np.random.seed(seed)  # a few generators draw from the global state
    try:
        if level:
            curriculum = CURRICULA[dataset]()
            for name in curriculum.attributes:
                highest = len(curriculum.attributes[name].levels) - 1
                curriculum.set_attr_level(name, min(level - 1, highest))
            made = DATASETS[dataset][0](curriculum.generate_configuration({"seed": seed, "size": 1}))
        else:
            made = reasoning_gym.create_dataset(dataset, seed=seed, size=1)
        item = made[0]
    except Exception as error:
        raise UserError(f"gym:{dataset} cannot draw a problem at level {level}: {error}") from error

    def scorer(answer: str) -> float:
        return float(made.score_answer(answer, item)) if allows(dataset, answer, item) else 0.0

    return item, scorer
