"""Evaluation: pass@k, answers in boxes, majority votes."""

from __future__ import annotations

from fractions import Fraction
from math import comb
from typing import Any

import numpy as np

from bessemer_vectors.exact import mean

Outputs = dict[str, Any]


def pass_at_k(n: Any, c: Any, k: int) -> Outputs:
    estimates = np.zeros(len(n))
    for p in range(len(n)):
        samples, correct = int(n[p]), int(c[p])
        estimates[p] = float(1 - Fraction(comb(samples - correct, k), comb(samples, k)))
    return {"estimates": estimates, "mean": mean(estimates.tolist())}


def boxed(text: str) -> str | None:
    """The content of the last box that closes."""
    answer, opening = None, "\\boxed{"
    for start in range(len(text)):
        if not text.startswith(opening, start):
            continue
        depth, at = 1, start + len(opening)
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if depth == 0:
            answer = text[start + len(opening) : at - 1].strip()
    return answer


def boxed_answer(texts: list[str]) -> Outputs:
    return {"answers": [boxed(text) for text in texts]}


def pass_at_1(texts: list[list[str]], gold: list[str]) -> Outputs:
    shares = [mean(float(boxed(text) == answer) for text in of) for of, answer in zip(texts, gold, strict=True)]
    return {"per_problem": np.array(shares), "mean": mean(shares)}


def cons_at_k(answers: list[list[str | None]], gold: list[str], ties: str) -> Outputs:
    correct = []
    for of_problem, right in zip(answers, gold, strict=True):
        votes = [answer for answer in of_problem if answer is not None]
        most = max((votes.count(answer) for answer in votes), default=0)
        winners = [answer for answer in dict.fromkeys(votes) if votes.count(answer) == most]
        elected = winners[:1] if ties == "first" else winners
        correct.append(mean(float(answer == right) for answer in elected) if elected else 0.0)
    return {"correct": np.array(correct), "mean": mean(correct)}
