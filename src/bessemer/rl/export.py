"""Samples of an RL stage as conversations, for the arm that trains on the same tokens without RL.

A file per rollout, written whole before its updates: a rollout that a kill undoes is written again, the same. Samples
that ran into the cap are left out, since what a conversation ends with is taken for its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bessemer.config.rl import Exported
from bessemer.data.chat import exchange
from bessemer.rl.rollout import Sampled
from bessemer.runs import conversations
from bessemer.runs.files import write_atomic


class Leave:
    def __init__(self, what: Exported, state: Path) -> None:
        self.what, self.folder = what, state / "left"

    def add(self, number: int, groups: Sequence[Sequence[Sampled]]) -> None:
        """The samples of rollout `number`."""
        if self.what == "nothing":
            return
        self.folder.mkdir(exist_ok=True)
        rows = [row for group in groups for row in group if row.completion.finish_reason == "stop"]
        taken = [row for row in rows if row.verdict.correct or self.what == "all"]
        lines = (conversations.line(exchange(row.problem.prompt, row.answer)) for row in taken)
        write_atomic(self._file(number), "".join(line + "\n" for line in lines))

    def finish(self, rollouts: int, folder: Path) -> None:
        """All of them, in order, as the file of conversations of the stage's folder."""
        if self.what != "nothing":
            write_atomic(folder / conversations.FILE, b"".join(self._file(n).read_bytes() for n in range(rollouts)))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"
