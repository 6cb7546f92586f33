"""What a person sees of an RL stage between rollouts: held-out figures, the same problems answered again and again.

Problems are held out, so that the curve of a run is not drawn from those it trains on.
"""

from __future__ import annotations

from typing import Any

from bessemer import tasks
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.rl import rollout
from bessemer.rl.alarms import Watchman
from bessemer.rl.gate import decide
from bessemer.rl.generation import Draw
from bessemer.runs.context import StageContext
from bessemer.train.trainer import Trainer

PROBES = 6
"""Held-out problems whose answers are kept every evaluation."""
SAMPLES = 4
"""Answers per held-out problem."""


class Watch:
    def __init__(self, draw: Draw, trainer: Trainer, ctx: StageContext) -> None:
        self.draw, self.trainer, self.ctx, self.settings = draw, trainer, ctx, draw.settings
        self.watchman = Watchman()

    def begin(self) -> None:
        """After the stage's lines are those of the step it goes on from."""
        self.watchman = Watchman(self.ctx.metrics.history())

    def write(self, values: dict[str, float]) -> None:
        """A table of figures, and in words what in it is going wrong."""
        self.ctx.metrics.write(self.trainer.step, self.trainer.tokens, values)
        for alarm in self.watchman.see(self.trainer.step, values):
            self.ctx.say(f"alarm at step {self.trainer.step}: {alarm}")

    def gate(self, cap: int) -> None:
        """The base must solve something, or every group is dead and only the form can be learnt."""
        mean = self.evaluate(cap)
        decision = decide(self.ctx.agree(lambda: mean), self.settings.minimum_pass, self.settings.format_reward)
        for warning in decision.warnings:
            self.ctx.say(f"warning: {warning}")
        if not decision.go:
            raise UserError(decision.words)

    def evaluate(self, cap: int) -> dict[str, Any]:
        """Means over the tasks, written and said; each task's own pass@1 too where there are several."""
        settings, trainer = self.settings, self.trainer
        families = {task.name: task for task in self.draw.tasks + self.draw.general}
        rows = {name: self._row(task, cap) for name, task in families.items()}
        main = [rows[task.name] for task in self.draw.tasks]
        self._probe(cap)
        keys = ("pass_at_1", "pass_at_k", "maj_at_k", "mean_length", "language_consistency", "formatted", "truncated")
        mean = {key: sum(row[key] for row in main) / len(main) for key in keys} | {"k": SAMPLES}
        values = {f"rl/heldout_{key.replace('_k', '_4')}": mean[key] for key in keys[:3]}
        values["rl/heldout_language"] = mean["language_consistency"]
        each = ""
        if len(rows) > 1:
            values |= {f"rl/heldout/{name}": row["pass_at_1"] for name, row in rows.items()}
            each = " (" + ", ".join(f"{name} {row['pass_at_1']:.3f}" for name, row in rows.items()) + ")"
        self.write(values)
        self.ctx.say(
            f"step {trainer.step}: held-out pass@1 {mean['pass_at_1']:.3f}{each}, pass@4 {mean['pass_at_k']:.3f}, "
            f"maj@4 {mean['maj_at_k']:.3f}, length {mean['mean_length']:.0f}"
            + (f", language {mean['language_consistency']:.3f}" if settings.language_reward else "")
        )
        return mean

    def _row(self, task: tasks.Task, cap: int) -> dict[str, Any]:
        settings = self.settings
        size = task.size("test") or settings.eval_problems
        return scoring.evaluate(
            self.draw.sampler, self.draw.encode, task, problems=min(size, settings.eval_problems), samples=SAMPLES,
            temperature=1.0, max_new_tokens=cap, seed=self.ctx.seed,
        )  # fmt: skip

    def _probe(self, cap: int) -> None:
        """The same few held-out problems again and again: how the answers change is the story of the run."""
        draw, step = self.draw, self.trainer.step
        chosen = rollout.problems_of(draw.tasks + draw.general, "test", 0, PROBES, self.ctx.seed)
        groups = rollout.sample(
            draw.sampler, chosen, draw.encode, samples=2, seed=self.ctx.seed, temperature=self.settings.temperature,
            max_new_tokens=cap,
        )  # fmt: skip
        draw.reward.pay(groups, cap, draw.judges)
        self.ctx.rollouts([_line(row, step) for group in groups for row in group])
        for group in groups[:2]:
            text = f"User: {group[0].problem.prompt}\nAssistant:{group[0].answer}"
            self.ctx.sample(step, self.trainer.tokens, text, title=group[0].verdict.reason)


def _line(row: rollout.Sampled, step: int) -> dict[str, Any]:
    return {
        "step": step, "id": row.problem.id, "prompt": row.problem.prompt, "completion": row.answer,
        "reward": row.reward, "correct": row.verdict.correct, "formatted": row.verdict.formatted,
        "reason": row.verdict.reason, "length": len(row.completion.tokens),
    }  # fmt: skip
