"""Preference data: which of two answers is better, and which answers are safe (R1-Nature Methods, reference G.4).

    pairs    a judge votes four times on two answers, their order drawn anew, the scores are averaged, and a pair is
             kept when they differ by more than 1; chosen and rejected are as long as each other on the whole
    labels   every answer safe or unsafe, as many of one as of the other

The judge gives 1 to 10 points: the written judge's helpfulness, noise, and a weakness for what it reads first.
Averaging votes in random order takes out the weakness and most of the noise, which is what the procedure is for.

Lines as in the files one may bring: {"prompt", "chosen", "rejected"} and {"prompt", "response", "safe"}.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from bessemer.tasks.answer import summary
from bessemer.tasks.base import Problem, stable_hash, stable_random
from bessemer.tasks.general import manners
from bessemer.tasks.general.quality import harmless, judge
from bessemer.tasks.general.requests import Request

VOTES = 4
POINTS = 9.0
"""Points between the worst answer and the best."""
NOISE = 1.0
"""Standard deviation of one score, in points."""
FIRST = 0.5
"""Points that the answer read first is given too much."""
MARGIN = 1.0
"""Pairs whose averaged scores differ by no more are dropped."""

SLACK = 100
"""How far the lengths of all chosen and all rejected answers may be apart at any moment, in units of length."""

Answers = Iterable[tuple[Problem, Sequence[str]]]


def candidates(problem: Problem, aim: str, number: int, seed: int = 0) -> list[str]:
    """Different answers in R1's form, written in different manners, the first one well. For the helpful aim none is
    unsafe, which is the other model's matter."""
    request, rng = Request.of(problem), stable_random("candidates", problem.id, seed)
    bad = [m for m in manners.of(request)[1:] if aim == "harmless" or m in manners.HARMLESS]
    chosen = [manners.GOOD, *rng.sample(bad, min(number - 1, len(bad)))]
    return list(dict.fromkeys(manners.r1(*manners.answer(request, manner, rng)) for manner in chosen))


def vote(problem: Problem, one: str, two: str, rng: random.Random) -> tuple[float, float]:
    """Points of both answers, averaged over the votes."""
    truth = [1.0 + POINTS * judge(Request.of(problem), answer).helpful for answer in (one, two)]
    scores: list[list[float]] = [[], []]
    for _ in range(VOTES):
        first = rng.randrange(2)
        for which in (0, 1):
            seen = truth[which] + (FIRST if which == first else 0.0) + rng.gauss(0.0, NOISE)
            scores[which].append(min(10.0, max(1.0, seen)))
    return fmean(scores[0]), fmean(scores[1])


def pairs(answers: Answers, seed: int = 0, length: Callable[[str], int] = len) -> tuple[list[dict[str, Any]], dict]:
    """Lines for a pairwise model, one per problem at most, and facts about them.

    `length` measures a summary. A pair that would tip the sum of length differences beyond SLACK is dropped, so that
    being long does not pay.
    """
    kept: list[dict[str, Any]] = []
    facts = {"asked": 0, "close": 0, "unbalanced": 0, "chosen_length": 0.0, "rejected_length": 0.0}
    tip = 0
    for problem, texts in answers:
        rng = stable_random("pairs", problem.id, seed)
        if len(set(texts)) < 2:
            continue
        facts["asked"] += 1
        one, two = rng.sample(list(dict.fromkeys(texts)), 2)
        scores = vote(problem, one, two, rng)
        if abs(scores[0] - scores[1]) <= MARGIN:
            facts["close"] += 1
            continue
        chosen, rejected = (one, two) if scores[0] > scores[1] else (two, one)
        lengths = length(summary(chosen)), length(summary(rejected))
        difference = lengths[0] - lengths[1]
        if abs(tip + difference) > max(abs(tip), SLACK):
            facts["unbalanced"] += 1
            continue
        tip += difference
        facts["chosen_length"] += lengths[0]
        facts["rejected_length"] += lengths[1]
        kept.append({"prompt": problem.prompt, "chosen": chosen, "rejected": rejected})
    for key in ("chosen_length", "rejected_length"):
        facts[key] /= max(1, len(kept))
    return kept, facts | {"kept": len(kept)}


def labels(answers: Answers, seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Lines for a pointwise model, safe and unsafe ones in equal numbers, and facts about them."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for problem, texts in answers:
        for text in dict.fromkeys(texts):
            safe = harmless(Request.of(problem), text)
            found[safe].append({"prompt": problem.prompt, "response": text, "safe": safe})
    fewer = min(map(len, found.values()))
    kept = [line for lines in found.values() for line in sorted(lines, key=lambda line: _order(line, seed))[:fewer]]
    facts = {"safe": len(found[True]), "unsafe": len(found[False]), "kept": len(kept)}
    return sorted(kept, key=lambda line: _order(line, seed)), facts


def _order(line: dict[str, Any], seed: int) -> int:
    return stable_hash("labels", seed, line["prompt"], line["response"])
