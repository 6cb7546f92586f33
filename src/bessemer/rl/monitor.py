"""What an RL stage records: the metrics of a rollout, held-out evaluations, the start gate, and exported samples.

RL amplifies what a policy already does now and then; a group whose samples are all wrong teaches nothing (R1-Zero's
base solved 15.6 % of AIME). So a run is evaluated once before its first step: `start_gate` decides whether RL can work,
and bases its advice on how the answers fail.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bessemer import tasks
from bessemer.config.rl import Exported, RLConfig
from bessemer.data.chat import exchange
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.rl import rollout
from bessemer.rl.alarms import AlarmTracker
from bessemer.rl.rollout import Group, ScoredSample
from bessemer.rl.rollout_queue import RolloutGenerator
from bessemer.rl.task_mix import task_of
from bessemer.runs.context import StageContext
from bessemer.runs.files import CONVERSATIONS, conversation_line, write_atomic
from bessemer.tasks.answer import thought
from bessemer.tasks.countdown_traces import diagnose, rates
from bessemer.train.trainer import Trainer

REFLECTIVE = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check", "等等")
"""The paper's ten words (R1, Nature Methods), and the Chinese "wait"."""
# ASCII, so that an adjacent Chinese character does not count as a letter of the word.
_REFLECTIVE = re.compile(
    "|".join(f"\\b{word}\\b" if word.isascii() else word for word in REFLECTIVE), re.ASCII | re.IGNORECASE
)
_TRACE = ("step_right", "right_numbers", "yes_given_hit", "yes_given_miss", "repeated", "gave_up")
"""Rates inside a countdown trace that say what RL changed: arithmetic, copying, verdicts, persistence."""

PROBES = 6
"""Held-out problems whose answers are recorded at every evaluation."""
SAMPLES = 4
"""Answers per held-out problem."""

FEW_ALIVE = 0.1
"""pass@k below which nearly every group will be dead: worth a warning."""
SOLVED = 0.95
"""pass@1 from which nearly every group will be all right."""
UNFORMED, CUT = 0.2, 0.5
"""Shares of answers that count as a fault: well-formed below this, truncated above this."""
FORM_ONLY = 10.0
"""Well-formed answers per right one from which the format is far easier to learn than the task."""


def update_means(prefix: str, names: Sequence[str], updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over a rollout's updates. One that was skipped has no values and does not count as zeros; a metric
    that no update has is left out."""
    found = {name: [update[f"train/{name}"] for update in updates if f"train/{name}" in update] for name in names}
    return {f"{prefix}/{name}": float(np.mean(values)) for name, values in found.items() if values}


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all samples of a rollout; accuracy, and the score of tasks with partial credit, over the samples with
    a verifier, if any."""
    asked = [row for group in groups for row in group]
    rows = [row for row in asked if not row.failure]
    preferences = [row.preference for row in rows if row.preference is not None]
    verified = [row for row in rows if row.preference is None] or rows
    thoughts = [thought(row.answer).strip() for row in rows]
    words = Counter(word.lower() for row in rows for word in _REFLECTIVE.findall(row.answer))
    values = {
        "rl/reward": _mean(row.reward for row in rows),
        "rl/accuracy": _mean(row.verdict.correct for row in verified),
        "rl/format": _mean(row.verdict.formatted for row in rows),
        "rl/length": _mean(row.length for row in rows),
        "rl/think_share": _mean(bool(text) for text in thoughts),
        "rl/language": _mean(row.language for row in rows),
        "rl/truncated": _mean(row.completion.finish_reason == "length" for row in rows),
        # Counted by structure, not by words: each line of the thoughts is a try or a step.
        "rl/tries": _mean(text.count("\n") + 1 if text else 0 for text in thoughts),
        "rl/reflective_words": words.total() / len(rows),
        **{f"rl/words/{word}": words[word] / len(rows) for word in REFLECTIVE},
    }
    if any(row.verdict.partial is not None for row in verified):
        values["rl/score"] = _mean(row.verdict.score for row in verified)
    if kept := [row.completion.kept.count_T[row.trained_N] for row in rows if row.completion.kept is not None]:
        values["rl/kept_tokens"] = float(torch.cat(kept).float().mean())
    if preferences:
        values["rl/preference"] = _mean(preferences)
    if episodes := [row.turns for row in rows if row.turns is not None]:
        values["rl/turns"] = _mean(sum(role == rollout.MODEL for role, _, _ in turns) for turns in episodes)
        values["rl/observed"] = _mean(sum(n for role, n, _ in turns if role != rollout.MODEL) for turns in episodes)
        values["rl/episodes_failed"] = len(asked) - len(rows)
    return values | _trace_metrics(rows)


def _trace_metrics(rows: Sequence[ScoredSample]) -> dict[str, float]:
    """Conditional rates over the countdown traces among the samples, without those that have nothing to count."""
    traces = [row for row in rows if "target" in row.problem.meta and len(row.problem.meta.get("numbers", ())) == 3]
    trace_rates = rates(diagnose(row.problem, row.answer) for row in traces)
    return {f"rl/trace/{name}": value for name in _TRACE if (value := trace_rates[name]) is not None}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def evaluation_tasks(settings: RLConfig) -> tuple[list[tasks.Task], list[tasks.Task]]:
    """(tasks whose held-out problems measure an RL stage, the same for general prompts). Tasks that only a reward model
    judges, or that hold out no problem, are left out; UserError if no main task is left."""

    def measured(names: Sequence[str]) -> list[tasks.Task]:
        families = [task_of(settings, name) for name in dict.fromkeys(names)]
        return [task for task in families if task.size("test") != 0 and not task.judged_by]

    main, general = measured(settings.eval_tasks or settings.tasks), measured(settings.general_tasks)
    if not main:
        raise UserError(
            f'stage "{settings.name}": none of {", ".join(settings.eval_tasks or settings.tasks)} holds out a problem '
            "to evaluate on; name tasks that do in eval_tasks"
        )
    return main, [] if settings.eval_tasks else general


class Evaluator:
    """Writes metrics, raises their alarms, and evaluates on held-out problems, so that a run's curve does not come from
    its training problems. Call `begin()` once metrics.jsonl ends at the step that the stage resumes from."""

    def __init__(self, generator: RolloutGenerator, trainer: Trainer, ctx: StageContext) -> None:
        self.generator, self.trainer, self.ctx, self.settings = generator, trainer, ctx, generator.settings
        self.alarms = AlarmTracker()
        self.tasks, self.general = evaluation_tasks(self.settings)

    def begin(self) -> None:
        self.alarms = AlarmTracker(self.ctx.metrics.history())

    def write(self, values: dict[str, float]) -> None:
        self.ctx.metrics.write(self.trainer.step, self.trainer.tokens, values)
        for alarm in self.alarms.add(self.trainer.step, values):
            self.ctx.say(f"alarm at step {self.trainer.step}: {alarm}")

    def gate(self, cap: int) -> None:
        """Evaluates the base; UserError if it solves too little for RL to start."""
        mean = self.evaluate(cap)
        decision = start_gate(self.ctx.agree(lambda: mean), self.settings.minimum_pass, self.settings.format_reward)
        for warning in decision.warnings:
            self.ctx.say(f"warning: {warning}")
        if not decision.passed:
            raise UserError(decision.message)

    def evaluate(self, cap: int) -> dict[str, Any]:
        """Means over the tasks, written and printed, with each task's own pass@1 if there are several."""
        settings, trainer = self.settings, self.trainer
        rows = {task.name: self._row(task, cap) for task in self.tasks + self.general}
        main = [rows[task.name] for task in self.tasks]
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
        generator, settings = self.generator, self.settings
        size = task.size("test") or settings.eval_problems
        return scoring.evaluate(
            generator.sampler,
            generator.encode,
            task,
            problems=min(size, settings.eval_problems),
            samples=SAMPLES,
            temperature=1.0,
            top_p=settings.top_p,
            max_new_tokens=cap,
            seed=self.ctx.seed,
            context=generator.context,
            once=generator.once,
            share=generator.share,
        )

    def _probe(self, cap: int) -> None:
        """Records answers to the same few held-out problems every time, to show how they change over the run."""
        generator, step = self.generator, self.trainer.step
        problems = rollout.problems_of(self.tasks + self.general, "test", 0, PROBES, self.ctx.seed)
        groups = rollout.sample(
            generator.sampler,
            problems,
            generator.encode,
            samples=2,
            seed=self.ctx.seed,
            needs_format=self.settings.accuracy_needs_format,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            max_new_tokens=cap,
            context=generator.context,
            once=generator.once,
            share=generator.share,
        )
        generator.reward.score(groups, cap, generator.reward_models)
        self.ctx.rollouts([_line(row, step) for group in groups for row in group])
        for group in groups[:2]:
            text = f"User: {group[0].problem.prompt}\nAssistant:{_transcript(group[0])}"
            self.ctx.sample(step, self.trainer.tokens, text, title=group[0].verdict.reason)


def _transcript(row: ScoredSample) -> str:
    """The answer; for an episode, every turn after the question."""
    if row.turns is None:
        return row.answer
    names = {rollout.MODEL: "Assistant:", "tool": "Tool: ", "user": "User: ", "system": "System: "}
    return "\n".join(names[turn.role] + turn.text for turn in row.turns).removeprefix(names[rollout.MODEL])


def _line(row: ScoredSample, step: int) -> dict[str, Any]:
    turns = {} if row.turns is None else {"turns": [{"role": turn.role, "content": turn.text} for turn in row.turns]}
    return {
        "step": step,
        "id": row.problem.id,
        "prompt": row.problem.prompt,
        "completion": _transcript(row),
        "reward": row.reward,
        "correct": row.verdict.correct,
        "score": row.verdict.score,
        "formatted": row.verdict.formatted,
        "reason": row.verdict.reason,
        "length": row.length,
        **turns,
    }


@dataclass(frozen=True)
class GateDecision:
    """`message` says what was measured and, if it did not pass, why; `warnings` apply to a run that starts anyway."""

    passed: bool
    message: str
    warnings: tuple[str, ...] = ()


def start_gate(row: Mapping[str, object], minimum_pass: float, format_reward: float = 0.0) -> GateDecision:
    """`row` is from `scoring.evaluate`: pass_at_1, pass_at_k and, if present, k, formatted, truncated.

    With a `minimum_pass` of 0 every model passes, with warnings.
    """
    one, some, k = _share(row, "pass_at_1") or 0.0, _share(row, "pass_at_k") or 0.0, row.get("k", "k")
    measured = f"the model solves {one:.1%} of held-out problems (pass@{k} {some:.1%})"
    faults = _faults(row)
    if one < minimum_pass:
        parts = [*faults, "pre-train longer, raise the share of the task's documents, or choose an easier task"]
        advice = ". ".join(part[0].upper() + part[1:] for part in parts)
        message = f"{measured}, below minimum_pass {minimum_pass:.1%}: RL has nothing to amplify. {advice}"
        return GateDecision(False, message)
    warnings = list(faults)
    if some < FEW_ALIVE:
        warnings.append(
            f"only {some:.0%} of the problems are solved in any of {k} tries, so nearly all groups will be all wrong: "
            "take more samples per problem, or mix in easier problems"
        )
    if one > SOLVED:
        warnings.append(f"{one:.0%} are solved already, so nearly all groups will be all right: choose harder problems")
    form = _share(row, "formatted")
    if format_reward > 0 and form is not None and form < SOLVED and form > FORM_ONLY * one:
        warnings.append(
            f"{form:.0%} of the answers are well-formed and {one:.1%} right: with a format_reward of {format_reward:g} "
            "the form alone may be learnt; lower it"
        )
    return GateDecision(True, measured, tuple(warnings))


def _faults(row: Mapping[str, object]) -> list[str]:
    """How the answers fail, each with its remedy."""
    faults = []
    cut, form = _share(row, "truncated"), _share(row, "formatted")
    if cut is not None and cut > CUT:
        faults.append(
            f"{cut:.0%} of the answers are cut off at the cap: raise max_new_tokens, or teach the model to end its "
            "answers"
        )
    if form is not None and form < UNFORMED:
        faults.append(
            f"{form:.0%} of the answers have the form the verifier reads: begin with SFT on answers in that form (a "
            "cold start), or check that the chat template is the one the model was trained in"
        )
    return faults


def _share(row: Mapping[str, object], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None


class SampleExport:
    """Exports samples as conversations, for a control that trains on the same tokens without RL.

    One file per rollout, written atomically before its updates: a rollout that a kill undoes is written again,
    identically. Truncated samples are left out, since training would teach the model to stop where they stop.
    """

    def __init__(self, which: Exported, state: Path) -> None:
        self.which, self.folder = which, state / "left"

    def add(self, number: int, groups: Sequence[Group]) -> None:
        """Writes the samples of rollout `number`."""
        self.folder.mkdir(exist_ok=True)
        rows = [row for group in groups for row in group if row.completion.finish_reason == "stop"]
        rows = [row for row in rows if row.verdict.correct or self.which == "all"]
        lines = (conversation_line(exchange(row.problem.prompt, row.answer)) for row in rows)
        write_atomic(self._file(number), "".join(line + "\n" for line in lines))

    def finish(self, rollouts: int, folder: Path) -> None:
        """Writes all samples, in order, to the conversations file in the stage's folder."""
        write_atomic(folder / CONVERSATIONS, b"".join(self._file(n).read_bytes() for n in range(rollouts)))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"
