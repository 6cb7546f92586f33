"""A task with the problems of some difficulties alone.

A task with a finite number of problems has fewer then, still all different within a turn through them. In any other,
problem n is the first that fits among TRIES of the task's own, which belong to no other n.
"""

from __future__ import annotations

import copy
from array import array
from typing import cast

from bessemer.errors import UserError
from bessemer.tasks.base import Problem, Task

TRIES = 256
"""Problems of an unlimited task among which one must fit."""


def narrowed(task: Task, low: int, high: int) -> Task:
    """The task with the problems whose difficulty is from `low` to `high`. UserError if it has none."""
    found = cast(_Narrowed, copy.copy(task))
    found.__class__ = type(type(task).__name__, (_Narrowed, type(task)), {"__module__": type(task).__module__})
    found.low, found.high, found.kept = low, high, {}
    size = task.size("train")
    if size and not found.size("train"):
        raise _none(found, {found.difficulty("train", index, 0) for index in range(size)})
    if size is None:
        found.problem("train", 0)
    return found


class _Narrowed(Task):
    low: int
    high: int
    kept: dict[tuple[str, int, int], array[int]]
    """The indices that fit, by split, seed and turn through the problems."""

    def size(self, split: str) -> int | None:
        return None if super().size(split) is None else len(self._fitting(split, 0, 0))

    def problem(self, split: str, index: int, seed: int = 0, language: str | None = None) -> Problem:
        if not super().size(split):
            return super().problem(split, self._first(split, index, seed), seed, language)
        turn, place = divmod(index, max(1, len(self._fitting(split, seed, 0))))
        fitting = self._fitting(split, seed, turn)
        if not fitting:
            raise _none(self, set())
        return super().problem(split, fitting[place % len(fitting)], seed, language)

    def difficulty(self, split: str, index: int, seed: int) -> object:
        return super().problem(split, index, seed).meta.get("difficulty")

    def _fits(self, split: str, index: int, seed: int) -> bool:
        difficulty = self.difficulty(split, index, seed)
        return isinstance(difficulty, int) and self.low <= difficulty <= self.high

    def _fitting(self, split: str, seed: int, turn: int) -> array[int]:
        key = split, seed, turn
        if key not in self.kept:
            size = super().size(split) or 0
            own = range(turn * size, (turn + 1) * size)
            self.kept[key] = array("q", [index for index in own if self._fits(split, index, seed)])
        return self.kept[key]

    def _first(self, split: str, index: int, seed: int) -> int:
        own = range(index * TRIES, (index + 1) * TRIES)
        found = next((place for place in own if self._fits(split, place, seed)), None)
        if found is None:
            raise _none(self, {self.difficulty(split, place, seed) for place in own})
        return found


def _none(task: _Narrowed, known: set[object]) -> UserError:
    has = ", ".join(map(str, sorted(one for one in known if isinstance(one, int)))) or "none"
    return UserError(
        f"{task.name} has no problem of difficulty {task.low} to {task.high}; its problems have the difficulties {has}"
    )
