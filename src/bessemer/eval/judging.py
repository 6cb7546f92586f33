"""Verdicts on many answers, on many ranks by all of them.

Each rank judges the answers that it has begun to judge, which are those it generated; of the rest, every n-th. Your own
tasks are judged on rank 0, in order, since only your code knows what it keeps. What is exchanged is the verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence

from bessemer import heartbeat
from bessemer.tasks.base import Judged, Problem, Task
from bessemer.train.runtime import ALONE, Share

OURS = __name__.partition(".")[0] + "."


def judge_all(
    answers: Sequence[tuple[Task, Problem, str]], share: Share = ALONE, holders: Sequence[int] | None = None
) -> list[Judged]:
    """What is found about each (task, problem, answer), in order. Collective: all ranks pass the same, or `holders`,
    the ranks that have the answers."""
    if holders is None:
        numbers = _own_numbers(answers, share)
    else:
        numbers = [number for number, rank in enumerate(holders) if rank == share.me]
    for task, problem, answer in (answers[number] for number in numbers):
        task.begin(problem, answer)
    verdicts = share.merge({number: _judged(*answers[number]) for number in numbers})
    return [verdicts[number] for number in range(len(answers))]


def _judged(task: Task, problem: Problem, completion: str) -> Judged:
    heartbeat.beat()
    return task.judged(problem, completion)


def _begun(task: Task, problem: Problem, completion: str) -> bool:
    return task.begun(problem, completion)


def ours(task: Task) -> bool:
    """Whether the package defines a task, so that it keeps nothing from one verdict to the next."""
    return type(task).__module__.startswith(OURS)


def _own_numbers(answers: Sequence[tuple[Task, Problem, str]], share: Share) -> list[int]:
    """The numbers of the answers that this rank judges."""
    if share.n == 1:
        return list(range(len(answers)))
    owner = share.merge({number: share.me for number, answer in enumerate(answers) if _begun(*answer)})
    for number, (task, *_) in enumerate(answers):
        owner.setdefault(number, number % share.n if ours(task) else 0)
    return [number for number in range(len(answers)) if owner[number] == share.me]
