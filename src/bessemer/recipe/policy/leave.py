"""Samples of an RL stage as conversations, for the arm that trains on the same tokens without RL.

A file per rollout, written whole before its updates: a rollout that a kill undoes is written again, the same. Samples
that ran into the cap are left out, since what a conversation ends with is taken for its end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bessemer.recipe.disk import write_atomic
from bessemer.rl.rollout import Sampled

What = Literal["nothing", "correct", "all"]


class Leave:
    def __init__(self, what: What, state: Path) -> None:
        self.what, self.folder = what, state / "left"

    def add(self, number: int, groups: Sequence[Sequence[Sampled]]) -> None:
        """The samples of rollout `number`."""
        if self.what == "nothing":
            return
        self.folder.mkdir(exist_ok=True)
        rows = [row for group in groups for row in group if row.completion.finish_reason == "stop"]
        taken = [row for row in rows if row.verdict.correct or self.what == "all"]
        write_atomic(self._file(number), "".join(_line(row) + "\n" for row in taken))

    def finish(self, rollouts: int, path: Path) -> None:
        """All of them, in order, as one file."""
        if self.what != "nothing":
            write_atomic(path, b"".join(self._file(number).read_bytes() for number in range(rollouts)))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"


def _line(row: Sampled) -> str:
    question = {"role": "user", "content": row.problem.prompt}
    return json.dumps({"messages": [question, {"role": "assistant", "content": row.answer}]}, ensure_ascii=False)
