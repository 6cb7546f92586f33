"""What stands before the question in an evaluation. Here nothing does; an add-on's hook `examples` brings worked
examples and a prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bessemer import plugins
from bessemer.data.chat import question_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.tasks.base import Problem, Task


class Preamble:
    """What stands before the question: nothing, so it is asked in the tokenizer's own template."""

    def check(self, task: Task) -> None:
        """UserError if the task's questions cannot be asked this way."""

    def facts(self) -> dict[str, int | str]:
        """Keys of an evaluation row; none if there is no text before the question."""
        return {}

    def encoder(
        self, tokenizer: Tokenizer, task: Task, room: int, cache: Path | None = None
    ) -> Callable[[Problem], list[int]]:
        """A function from a problem to its prompt's ids, at most `room`; `cache` holds downloads."""
        return lambda problem: question_ids(tokenizer, problem.prompt)


ALONE = Preamble()


def preamble(**settings: Any) -> Preamble:
    """With `count` examples of a `kind` and a `prefix`, as far as they are given. UserError if no add-on brings any."""
    if not settings.get("count") and not settings.get("prefix"):
        return ALONE
    examples = plugins.hook("examples")
    if examples is None:
        raise UserError("shots and prefixes come with the add-on evals, which is not here; install it, or ask without")
    return examples(**settings)
