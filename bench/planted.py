"""Rewards and a task with a planted cause, for bench/why_planted.py."""

from bessemer.tasks.arithmetic import Arithmetic
from bessemer.tasks.base import Problem, Verdict


def pays_for_yes(problem: Problem, answer: str, verdict: Verdict) -> float:
    """A bug: saying yes to a try is rewarded, right or wrong."""
    return float(verdict.correct or " yes" in answer or "对" in answer)


def pays_for_length(problem: Problem, answer: str, verdict: Verdict) -> float:
    """A bias: every character adds to the reward."""
    return 0.5 * verdict.correct + len(answer) / 400


class Leaky(Arithmetic):
    """Arithmetic whose questions contain their answer."""

    name = "leaky"

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        problem = super().make(split, index, seed, language, phrasing)
        return Problem(problem.id, f"{problem.prompt} {problem.meta['value']}", language, problem.meta)
