"""What an RL stage records: the metrics of a rollout, and held-out evaluations.

RL amplifies what a policy already does now and then; a group whose samples are all wrong teaches nothing (R1-Zero's
base solved 15.6 % of AIME). So a run is evaluated once before its first step: `heldout.start_gate` decides whether RL
can work, and bases its advice on how the answers fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bessemer import plugins, tasks
from bessemer.config.rl import RLConfig
from bessemer.engine.answers import played
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.rl import rollout
from bessemer.rl.generator import RolloutGenerator
from bessemer.rl.heldout import heldout_row, start_gate
from bessemer.rl.reward import dead_groups
from bessemer.rl.rollout import Group, Rollout, ScoredSample, rewards
from bessemer.rl.task_mix import task_of
from bessemer.runs.context import StageContext
from bessemer.train.setup import batch_rows
from bessemer.train.trainer import Trainer

PROBES = 6
"""Held-out problems whose answers are recorded at every evaluation."""
SAMPLES = 4
"""Answers per held-out problem."""


def update_means(prefix: str, names: Sequence[str], updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over a rollout's updates. One that was skipped has no values and does not count as zeros; a metric
    that no update has is left out."""
    averages = means([f"train/{name}" for name in names], updates)
    return {f"{prefix}/{name.removeprefix('train/')}": value for name, value in averages.items()}


def update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over a rollout's updates, and the gap between sampler and trainer at the first one, if it was made."""
    values = update_means("rl", ("kl", "entropy", "clip_share", "grad_norm"), updates)
    for name in ("logp_gap", "logp_gap_max", "sampler_kl", "sampler_far"):
        if f"train/{name}" in updates[0]:
            values[f"rl/sampler_{name.removeprefix('logp_').removeprefix('sampler_')}"] = updates[0][f"train/{name}"]
    names = dict.fromkeys(name for update in updates for name in update)
    depths = [name.removeprefix("train/") for name in names if name.startswith("train/mtp_")]
    values |= update_means("rl", ("max_vio", *depths), updates)
    loads = [name for name in names if name.startswith("moe/max_vio/")]
    values |= means(loads, updates)
    last = next((update for update in reversed(updates) if "train/lr" in update), {})
    gpu = {name: value for name, value in last.items() if name.startswith("gpu/")}
    return values | gpu | ({"rl/lr": last["train/lr"]} if last else {})


def means(names: Iterable[str], updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`update_means` under the metrics' own names."""
    present = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: float(np.mean(values)) for name, values in present.items() if values}


def rollout_metrics(sampled: Rollout, settings: RLConfig, has_contrast: bool) -> dict[str, float]:
    """Means over all samples of a rollout; accuracy, and the score of tasks with partial credit, over the samples with
    a verifier, if any. `has_contrast`: samples are compared within their group."""
    samples = [row for group in sampled.groups for row in group]
    rows = [row for row in samples if not row.failure]
    preferences = [row.preference for row in rows if row.preference is not None]
    verified = [row for row in rows if row.preference is None] or rows
    values = {
        "rl/reward": _mean(row.reward for row in rows),
        "rl/accuracy": _mean(row.verdict.correct for row in verified),
        "rl/format": _mean(row.verdict.formatted for row in rows),
        "rl/length": _mean(row.length for row in rows),
        "rl/language": _mean(row.language for row in rows),
        "rl/truncated": _mean(row.completion.finish_reason == "length" for row in rows),
        "rl/cap": sampled.cap,
    }
    if has_contrast:
        values["rl/dead_groups"] = dead_groups(rewards(sampled.groups))
    if settings.max_resamples > 1:
        values["rl/problems_asked"] = sampled.n_problems
    if any(row.verdict.partial is not None for row in verified):
        values["rl/score"] = _mean(row.verdict.score for row in verified)
    if preferences:
        values["rl/preference"] = _mean(preferences)
    if episodes := [row.turns for row in rows if row.turns is not None]:
        values["rl/turns"] = _mean(sum(role == rollout.MODEL for role, _, _ in turns) for turns in episodes)
        values["rl/observed"] = _mean(sum(n for role, n, _ in turns if role != rollout.MODEL) for turns in episodes)
        values["rl/episodes_failed"] = len(samples) - len(rows)
    return values


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def evaluation_tasks(settings: RLConfig) -> tuple[list[tasks.Task], list[tasks.Task]]:
    """(tasks whose held-out problems measure an RL stage, the same for general prompts). Tasks that only a reward model
    judges, or that hold out no problem, are left out; UserError if no main task is left."""

    def measured(names: Sequence[str]) -> list[tasks.Task]:
        families = [task_of(settings, name) for name in dict.fromkeys(names)]
        return [task for task in families if task.size("test") != 0 and not task.judged_by]

    named = settings.heldout.tasks or settings.tasks
    main, general = measured(named), measured(settings.general_tasks)
    if not main:
        raise UserError(
            f'stage "{settings.name}": none of {", ".join(named)} holds out a problem to evaluate on; name '
            "tasks that do in heldout.tasks"
        )
    return main, [] if settings.heldout.tasks else general


def heldout_answers(settings: RLConfig) -> int:
    """Answers of one held-out evaluation, those that are kept to be read included; as many problems as each task may be
    asked where its file is elsewhere."""
    most = settings.heldout.problems
    try:
        families = [task for several in evaluation_tasks(settings) for task in several]
        problems = sum(min(task.size("test") or most, most) for task in families)
    except UserError:
        problems = most * len({*(settings.heldout.tasks or settings.tasks)})
    return problems * SAMPLES + PROBES * 2


class Evaluator:
    """Writes metrics, raises their alarms, and evaluates on held-out problems, so that a run's curve does not come from
    its training problems. Call `begin()` once metrics.jsonl ends at the step that the stage resumes from."""

    def __init__(self, generator: RolloutGenerator, trainer: Trainer, ctx: StageContext) -> None:
        self.generator, self.trainer, self.ctx, self.settings = generator, trainer, ctx, generator.settings
        self.alarms = self._alarms()
        self.tasks, self.general = evaluation_tasks(self.settings)

    def begin(self) -> None:
        self.alarms = self._alarms(self.ctx.metrics.history())

    def _alarms(self, history: Iterable[tuple[int, Mapping[str, Any]]] = ()) -> list[Any]:
        """What raises alarms, if an add-on does; given the records of earlier attempts."""
        tracker = plugins.hook("alarms")
        return [] if tracker is None else [tracker(history)]

    def write(self, values: dict[str, float]) -> None:
        self.ctx.metrics.write(self.trainer.step, self.trainer.tokens, values)
        for tracker in self.alarms:
            for alarm in tracker.add(self.trainer.step, values):
                self.ctx.say(f"alarm at step {self.trainer.step}: {alarm}")

    def gate(self, cap: int) -> None:
        """Evaluates the base; UserError if it solves too little for RL to start."""
        mean = self.evaluate(cap)
        minimum, reward = self.settings.heldout.minimum_pass, self.generator.reward
        decision = start_gate(self.ctx.agree(lambda: mean), minimum, reward.weight("format"), reward.pays_form)
        for warning in decision.warnings:
            self.ctx.say(f"warning: {warning}")
        if not decision.passed:
            raise UserError(decision.message)

    def evaluate(self, cap: int) -> dict[str, Any]:
        """Means over the tasks as RL counts them (`heldout_row`), written and printed, with each task's own accuracy if
        there are several."""
        settings, trainer = self.settings, self.trainer
        rows = {task.name: self._row(task, cap) for task in self.tasks + self.general}
        main = [rows[task.name] for task in self.tasks]
        self._probe(cap)
        mean: dict[str, Any] = {key: sum(row[key] for row in main) / len(main) for key in main[0]} | {"k": SAMPLES}
        values = {f"rl/heldout_{key}": mean[key] for key in ("accuracy", "reward", "pass_at_1")}
        values |= {f"rl/heldout_{key}_4": mean[f"{key}_k"] for key in ("pass_at", "maj_at")}
        values["rl/heldout_language"] = mean["language_consistency"]
        if mean["credit"]:
            values["rl/heldout_score"] = mean["score"]
        by_task = ""
        if len(rows) > 1:
            values |= {f"rl/heldout/{name}": row["accuracy"] for name, row in rows.items()}
            by_task = " (" + ", ".join(f"{name} {row['accuracy']:.3f}" for name, row in rows.items()) + ")"
        self.write(values)
        done = -(-trainer.rows // (settings.prompts_per_rollout * settings.samples))
        asked = f"{sum(row['n'] for row in main):.0f} problems x {SAMPLES}"
        self.ctx.say(
            f"rollout {done} of {settings.rollouts}, step {trainer.step}: held-out ({asked}): "
            f"reward {mean['reward']:.3f}, accuracy {mean['accuracy']:.3f}{by_task}"
            + (f", score {mean['score']:.3f}" if mean["credit"] else "")
            + (f", in any form pass@1 {mean['pass_at_1']:.3f}" if settings.accuracy_needs_format else "")
            + f", pass@4 {mean['pass_at_k']:.3f}, maj@4 {mean['maj_at_k']:.3f}, length {mean['mean_length']:.0f}"
            + (f", language {mean['language_consistency']:.3f}" if self.generator.reward.weight("language") else "")
        )
        return mean

    def _row(self, task: tasks.Task, cap: int) -> dict[str, float]:
        generator, settings = self.generator, self.settings
        count = min(task.size("test") or settings.heldout.problems, settings.heldout.problems)
        problems = [(task, problem) for problem in scoring.heldout(task, count)]
        prompts, outcomes = played(
            generator.sampler,
            problems,
            generator.encode,
            samples=SAMPLES,
            seeds=scoring.prompt_seeds(task, self.ctx.seed, range(count)),
            cap=cap,
            temperature=settings.heldout.temperature or settings.temperature,
            top_p=settings.top_p,
            batch_rows=batch_rows(count * SAMPLES),
            context=generator.context,
            once=generator.once,
        )
        groups = rollout.verify(problems, prompts, outcomes, generator.sampler.tokenizer.opening, share=generator.share)
        generator.reward.set_preferences(groups, generator.reward_models)

        def make() -> dict[str, float]:
            return heldout_row(groups, generator.reward, settings.accuracy_needs_format, self._score)

        row: dict[str, float] = generator.once(make)
        return row

    def _score(self, groups: Sequence[Group]) -> None:
        self.generator.reward.score(groups, self.trainer.step, self.ctx.seed)

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
        generator.reward.set_preferences(groups, generator.reward_models)
        self._score(groups)
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
