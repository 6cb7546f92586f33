"""Drill pages: single facts and comparisons in the very form the traces use, so that thinking is mostly correct.

Facts come in the two shapes a step has (two small numbers; a running value and a small number), chains are whole tries
without a target, and comparisons lean towards near misses, where a verdict is hard. A chain takes its three numbers
from the train split only; facts and comparisons hold too few numbers to give a problem away.
"""

import random

from bessemer.tasks.base import split_of
from bessemer.tasks.tries import LARGEST, OPS, all_tries, apply

HEADS = {"en": "Drill:\n", "zh": "练习:\n"}


def drill_page(words: dict[str, str], head: str, rng: random.Random) -> str:
    """`words` as in traces.WORDS; 8 to 16 lines."""
    return head + "\n".join(_line(words, rng) for _ in range(rng.randint(8, 16)))


def _line(words: dict[str, str], rng: random.Random) -> str:
    draw = rng.random()
    return _comparison(words, rng) if draw < 0.25 else _chain(rng) if draw < 0.65 else _fact(rng)


def _chain(rng: random.Random) -> str:
    """An expression and its steps: a try before it is compared with a target."""
    while True:
        numbers = tuple(sorted(rng.randint(1, 10) for _ in range(3)))
        if split_of(numbers) == "train":
            return rng.choice(all_tries(numbers)).write()[0]


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
    if draw < 0.15:
        value = target
    elif draw < 0.55:
        value = max(0, target + rng.randint(-8, 8))
    else:
        value = rng.randint(0, LARGEST)
    verdict = "yes" if value == target else "low" if value < target else "high"
    return f"{value}:{target}{words[verdict]}"
