"""The hook "export-samples": a stage's samples as conversations, which an SFT stage may train on.

[[stage.hooks]]
name = "export-samples"
which = "all"             # default: "correct"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from bessemer.config.rl import RLConfig
from bessemer.data.chat import exchange
from bessemer.pipeline import preflight
from bessemer.rl.component import Component, Metrics
from bessemer.rl.parts import LoopParts
from bessemer.rl.rollout import Rollout
from bessemer.runs.files import CONVERSATIONS, conversation_line, pieces, write_atomic


class SampleExport(Component):
    """Exports samples as conversations, for a control that trains on the same tokens without RL.

    One file per rollout, written atomically before its updates: a rollout that a kill undoes is written again,
    identically. Truncated samples are left out, since training would teach the model to stop where they stop.
    """

    exports = True

    def __init__(self, loop: LoopParts, *, which: Literal["correct", "all"] = "correct") -> None:
        self.which, self.rollouts, self.leads = which, loop.settings.rollouts, loop.ctx.leads
        self.folder = loop.ctx.state / "left"

    @staticmethod
    def check(config: RLConfig, **settings: Any) -> None:
        what = "export-samples writes questions with one answer; leave it out"
        preflight.refuse_environments(config.name, config.tasks + config.general_tasks, what)

    def sampled(self, number: int, rollout: Rollout) -> Metrics:
        if not self.leads:
            return {}
        self.folder.mkdir(exist_ok=True)
        rows = [row for group in rollout.groups for row in group if row.completion.finish_reason == "stop"]
        rows = [row for row in rows if row.verdict.correct or self.which == "all"]
        lines = (conversation_line(exchange(row.problem.prompt, row.answer)) for row in rows)
        write_atomic(self._file(number), (f"{line}\n" for line in lines))
        return {}

    def finish(self, folder: Path) -> None:
        """Writes all samples, in order, to the conversations file in the stage's folder, a piece at a time."""
        if self.leads:
            lines = (piece for n in range(self.rollouts) for piece in pieces(self._file(n)))
            write_atomic(folder / CONVERSATIONS, lines)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"
