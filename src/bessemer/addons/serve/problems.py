"""Problems from the tasks that a model was trained on, to ask it, and verdicts on its answers.

Problems are held out: they come from a task's test split, which no training reads. A problem is identified by task,
language and number and is generated again to judge an answer, so nothing is stored between the two requests. Only tasks
of the models offered here are built, never any task that a request names; and of those only our own that need no file,
because a run from elsewhere may name any file of this machine, and `evil.py:Task` would run it. Problems whose verdict
would run a program or ask a reward model are not offered.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Query
from pydantic import BaseModel

from bessemer import tasks
from bessemer.addons.serve.models import ModelFacts, Models
from bessemer.addons.serve.protocol import AnswerToJudge, invalid
from bessemer.errors import UserError

PER_GROUP = 4
"""Problems of each task and language."""
DRAWN = 24
"""Problems drawn per group; those offered are spread over the easier half."""
GROUPS = 6
LONGEST_PROMPT = 400
_GYM = re.compile(r"gym:[a-z0-9_]+")
JUDGES = 2
"""Answers judged at a time; the others wait."""


class OfferedProblem(BaseModel):
    """A held-out problem."""

    task: str
    language: str
    number: int
    prompt: str


class ProblemList(BaseModel):
    data: list[OfferedProblem]


class AnswerVerdict(BaseModel):
    correct: bool
    reason: str
    """"correct", or the first fault that the task's verifier found."""
    answer: str | None
    """The answer that the verifier extracted, in canonical form."""


def add_problems(app: FastAPI, models: Models) -> None:
    judges = asyncio.Semaphore(JUDGES)

    @app.get("/v1/problems")
    async def problems(model: str | None = Query(None, max_length=1024)) -> ProblemList:
        """Held-out problems of the tasks that a model was trained on; none if its training is unknown."""
        return ProblemList(data=await asyncio.to_thread(offered, models.find(model)))

    @app.post("/v1/verdict")
    async def verdict(body: AnswerToJudge) -> AnswerVerdict:
        """Whether an answer to such a problem is right, according to the task's own verifier."""
        facts = models.find(body.model)
        if body.task not in {skill.task for skill in facts.practice.skills}:
            raise invalid(f"{facts.name} was not trained on a task {body.task!r}", "task")
        async with judges:
            judged = await asyncio.to_thread(_judge, body)
        return AnswerVerdict(correct=judged.correct, reason=judged.reason, answer=judged.answer)


def offered(facts: ModelFacts) -> list[OfferedProblem]:
    """At most GROUPS groups of PER_GROUP problems, one group per task and language. A model is asked about tasks that
    it has only read about only if it practised none."""
    groups: list[list[OfferedProblem]] = []
    trained_skills = facts.practice.skills
    for skill in [skill for skill in trained_skills if skill.practised] or trained_skills:
        task = _checkable(skill.task)
        groups += [_some(skill.task, language) for language in task.languages] if task else []
        if len(groups) >= GROUPS:
            break
    return [problem for group in groups[:GROUPS] for problem in group]


@lru_cache(maxsize=64)
def _checkable(name: str) -> tasks.Task | None:
    """The task; None if it must not or cannot be built here, or if its answers cannot be judged at once."""
    if not _GYM.fullmatch(name) and (":" in name or name not in tasks.names()):
        return None
    try:
        task = tasks.get(name)
        task.problem("test", 0)
    except (UserError, OSError, ImportError, IndexError):
        return None
    return None if task.domain == "code" or task.judged_by else task


@lru_cache(maxsize=256)
def _some(name: str, language: str) -> list[OfferedProblem]:
    task = _checkable(name)
    assert task is not None
    size = task.size("test")
    drawn = [task.problem("test", number, language=language) for number in range(min(DRAWN, size or DRAWN))]
    hardness: Callable[[int], Any] = lambda number: (drawn[number].meta.get("difficulty", 0), number)  # noqa: E731
    short = [number for number, problem in enumerate(drawn) if len(problem.prompt) <= LONGEST_PROMPT]
    easier = sorted(short, key=hardness)[: max(PER_GROUP, len(short) // 2)]
    step = max(1, len(easier) // PER_GROUP)
    return [
        OfferedProblem(task=name, language=language, number=number, prompt=drawn[number].prompt)
        for number in easier[::step][:PER_GROUP]
    ]


def _judge(body: AnswerToJudge) -> tasks.Verdict:
    task = _checkable(body.task)
    if task is None:
        raise invalid(f"answers to {body.task!r} cannot be judged here", "task")
    if body.language not in task.languages:
        available = ", ".join(task.languages)
        raise invalid(f"{body.task!r} has no language {body.language!r}; it has {available}", "language")
    size = task.size("test")
    if size is not None and body.number >= size:
        raise invalid(f"{body.task!r} has {size} held-out problems", "number")
    return task.verify(task.problem("test", body.number, language=body.language), body.answer)
