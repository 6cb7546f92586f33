"""Drill pages: single skills in the very form the traces use, so that thinking is mostly correct.

Facts come in the two shapes a step has (two small numbers; a running value and a small number). A try begins with the
numbers as a prompt shows them, so that a line practises what small models learn last: to use each of the given numbers
once. The order is the systematic author's opening. Comparisons lean towards equality and near misses, where a verdict
is hard. Whatever puts three numbers together takes them from the train split; facts and comparisons hold too few to
give a problem away.
"""

import random

from bessemer.tasks.base import split_of
from bessemer.tasks.countdown.tries import LARGEST, OPS, all_tries, apply

HEADS = {"en": "Drill:\n", "zh": "练习:\n"}


def drill_page(words: dict[str, str], head: str, comma: str, rng: random.Random) -> str:
    """`words` as in traces.WORDS, `comma` as between the numbers of a prompt; 8 to 16 lines."""
    return head + "\n".join(_line(words, comma, rng) for _ in range(rng.randint(8, 16)))


def _line(words: dict[str, str], comma: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.35:
        return _comparison(words, rng)
    if draw < 0.53:
        return _fact(rng)
    numbers = _train_numbers(rng)
    shown = comma.join(map(str, rng.sample(numbers, 3)))
    if draw < 0.67:
        return f"{shown} {words['order']}" + ",".join(map(str, sorted(numbers, reverse=True)))
    attempt = rng.choice(all_tries(numbers))
    return f"{shown}:{(attempt.turned() if rng.random() < 0.5 else attempt).write()[0]}"


def _train_numbers(rng: random.Random) -> tuple[int, int, int]:
    """Three numbers that no test problem has, ascending."""
    while True:
        numbers = tuple(sorted(rng.randint(1, 10) for _ in range(3)))
        if split_of(numbers) == "train":
            return numbers


def _fact(rng: random.Random) -> str:
    op, small = rng.choice(OPS), rng.randint(1, 10)
    if rng.random() < 0.5:
        other = rng.randint(1, min(10, LARGEST // small))
    else:
        other = rng.randint(0, LARGEST // small if op == "*" else LARGEST - small)
    left, right = (other, small) if op != "-" or other >= small else (small, other)
    return f"{left}{op}{right}={apply(left, op, right)}"


def _comparison(words: dict[str, str], rng: random.Random) -> str:
    target = rng.randint(1, 60)
    draw = rng.random()
    if draw < 0.30:
        value = target
    elif draw < 0.70:
        value = max(0, target + rng.randint(-5, 5))
    else:
        value = rng.randint(0, LARGEST)
    verdict = "yes" if value == target else "low" if value < target else "high"
    return f"{value}:{target}{words[verdict]}"
