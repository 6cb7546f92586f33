"""Countdown's questions in other words around them, and without the target, which nobody can solve."""

from dataclasses import replace
from typing import ClassVar

from bessemer.tasks import Problem
from bessemer.tasks.countdown import Countdown


class Polite(Countdown):
    around: ClassVar = {"en": "Please help me with this puzzle. {}", "zh": "请帮我解这道题。{}"}

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        problem = super().make(split, index, seed, language, phrasing)
        return replace(problem, prompt=self.worded(problem))

    def worded(self, problem: Problem) -> str:
        return self.around[problem.language].format(problem.prompt)


class Numbered(Polite):
    around: ClassVar = {"en": "Question 1: {}", "zh": "第1题: {}"}


class Checked(Polite):
    around: ClassVar = {"en": "{} Check your answer.", "zh": "{}请检查答案。"}


class Untold(Polite):
    """The target is missing: a control that must fail."""

    def worded(self, problem: Problem) -> str:
        target = str(problem.meta["target"])
        before, _, after = problem.prompt.rpartition(target)
        return f"{before}?{after}"
