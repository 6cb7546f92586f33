"""The loop of an RL stage (R1 2.2, R1-Nature B.1). For every rollout:

    sample and score    P problems, G samples each, verified and rewarded        generator, rollout, sampler, reward
    advantages          how each sample compares with others                     algorithms
    updates             mini-batches, one inner epoch                            losses, algorithms
    evaluation          held-out problems every so many rollouts, alarms         monitor, alarms
    checkpoint          everything that must survive a kill is in the trainer's

A "step" is one optimizer step, as in the paper. Everything else that a stage may do is a `Component`: the reference of
the divergence, and hooks of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bessemer import plugins, tasks
from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.data.chat import question_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.rl import drafting
from bessemer.rl.algorithms import advantage_of, loss_of
from bessemer.rl.component import Component, hooks_of
from bessemer.rl.generator import RolloutGenerator
from bessemer.rl.losses import GRPO
from bessemer.rl.monitor import Evaluator, rollout_metrics, update_metrics
from bessemer.rl.reference import Reference
from bessemer.rl.reward import PreferenceScorer
from bessemer.rl.rollout import Group, Packing, Rollout
from bessemer.rl.sampler import sampler_of
from bessemer.rl.task_mix import task_of
from bessemer.runs.context import StageContext
from bessemer.train import checkpoint, setup
from bessemer.train.plan import TrainingPlan


class Loop:
    """One RL run."""

    def __init__(self, settings: RLConfig, ctx: StageContext, reward_models: Mapping[str, PreferenceScorer]) -> None:
        self.settings, self.ctx = settings, ctx
        if ctx.source is None:
            raise UserError(f'stage "{ctx.name}" needs a stage with a model before it')
        self.base = ctx.source / "model"
        setup.keep_memory()
        runtime = ctx.runtime
        model, self.tokenizer = runtime.read(self.base, mtp=settings.mtp != "dropped")
        model = setup.adapted(model, settings, self.base, ctx.seed, ctx.recipe.layout, ctx.say)
        self.tokenizer.use_template(settings.prompt_template)
        sampler = sampler_of(settings)
        self.workers = sampler.trainer_workers(settings) if runtime.n == 1 else runtime.workers()
        dtype = setup.set_precision(model, settings, ctx.say_once, ctx.state, ctx.agree)
        longest = round(max(settings.max_new_tokens.values))
        self.objective = GRPO(
            loss_of(settings),
            settings.kl.weight,
            settings.temperature,
            longest if settings.normalise == "constant" else 0,
            settings.kl.unbiased,
            drafting.prepare(model, settings, ctx.say),
        )
        self.trainer = runtime.trainer(
            model,
            self.objective,
            None,
            settings,
            TrainingPlan(
                workers=self.workers,
                compute_dtype=dtype,
                counts_padding=False,
                idle=() if self.objective.with_mtp() else (drafting.PREFIX,),
            ),
            ctx.state,
            stop=lambda: ctx.stop,
            model_config=model.cfg.model_dump(),
            warn=ctx.say,
        )
        self.policy = self.sampler_model = runtime.whole(self.trainer)
        if settings.rollout.precision == "bfloat16" and dtype != torch.bfloat16:
            self.sampler_model = self.policy.rounded(self.trainer, torch.bfloat16, self.workers)
        engine = Engine(self.sampler_model.model, self.tokenizer, self.workers)
        families = [task_of(settings, name) for name in (*settings.tasks, *settings.general_tasks)]
        self.carrier = runtime.carrier(self.trainer, settings, families)
        self.packing = Packing.of(settings, self.trainer, self.tokenizer.pad_id)
        if not self.packing.packs:
            ctx.say("every sample has a row of its own: packed into one, this model would mix them")
        self.sampler = sampler.of_loop(self, engine)
        self.components = self._components()
        self.generator = RolloutGenerator(
            settings, self.sampler, self._encode, ctx.seed, reward_models, self.components, ctx.once,
            self.trainer.model.cfg.max_seq_len, ctx.share, self.carrier,
        )  # fmt: skip
        self.evaluator = Evaluator(self.generator, self.trainer, ctx)
        self.advantage = advantage_of(settings)(self)
        self.components.append(self.advantage)

    def _components(self) -> list[Component]:
        """What measures, and the stage's hooks; the advantage and the reference follow."""
        components: list[Component] = []
        if (text_metrics := plugins.hook("text-metrics")) is not None:
            components.append(text_metrics(self))
        if not self.objective.with_mtp():
            components.append(drafting.Drafts(self))
        return components + [kind(self, **own) for kind, own in hooks_of(self.settings)]

    def _encode(self, problem: tasks.Problem) -> list[int]:
        return question_ids(self.tokenizer, problem.prompt)

    def cap(self) -> int:
        """Longest completion at this step, in tokens."""
        return round(self.settings.max_new_tokens(self.trainer.step))

    def _tokenizer_dir(self) -> Path:
        """The folder of the tokenizer's files, with the chat template that prompts were rendered in."""
        if self.settings.prompt_template == "model":
            return self.base
        directory = self.ctx.state / "tokenizer"
        if self.ctx.leads:
            self.tokenizer.save(directory)
        return directory

    def run(self) -> dict[str, Any]:
        try:
            self.sampler.open()
            return self._run()
        finally:
            self.sampler.close()
            self.trainer.close()

    def _run(self) -> dict[str, Any]:
        settings, ctx, trainer = self.settings, self.ctx, self.trainer
        first = self._start()
        if trainer.step == 0:
            self.evaluator.gate(self.cap())
        self._keep_if_due(first)  # the run may have been killed between writing the checkpoint and keeping it
        for number in range(first, settings.rollouts):
            _, values = self._rollout(number)
            self.evaluator.write(values)
            reward, accuracy, length = (values[f"rl/{name}"] for name in ("reward", "accuracy", "length"))
            score = f", score {values['rl/score']:.3f}" if "rl/score" in values else ""
            note = f"reward {reward:.3f}, accuracy {accuracy:.3f}{score}, length {length:.0f}"
            if (number + 1) % settings.heldout.every == 0 or number + 1 == settings.rollouts:
                self.evaluator.evaluate(self.cap())
            ctx.progress.advance(1, note, cost=length)
            self._keep_if_due(number + 1)
            if trainer.stop():
                trainer.save()
                trainer.finish()
                ctx.interrupt()
            trainer.save_if_due()
        trainer.save()
        ctx.runtime.save(trainer, ctx.dir / "model", self._tokenizer_dir())
        for component in self.components:
            component.finish(ctx.dir)
        # maybe of an attempt that was killed after its last checkpoint
        last = {"last_rollout_accuracy": "rl/accuracy", "heldout_accuracy": "rl/heldout_accuracy"}
        facts = {name: round(ctx.metrics.last(metric), 4) for name, metric in last.items()} if ctx.leads else {}
        return {"steps": trainer.step, **facts}

    def _keep_if_due(self, done: int) -> None:
        """Keeps the checkpoint after every `keep_every` rollouts for good."""
        every = self.settings.keep_every
        if not every or not done or done % every or self.trainer.guard.streak:
            return
        self.trainer.save()
        self.trainer.finish()
        if self.ctx.leads:
            checkpoint.keep(self.ctx.state / f"step-{self.trainer.step:08d}")

    def _start(self) -> int:
        """Resumes from the last checkpoint, or starts fresh; returns the number of the next rollout."""
        settings, ctx, trainer = self.settings, self.ctx, self.trainer
        trainer.start()
        self._restore()
        first = self._next()
        trainer.before_write = self._before_write
        ctx.rewind(trainer.step or -1)  # at step 0 the gate writes its lines again
        self.evaluator.begin()
        ctx.progress.total(settings.rollouts, "rollouts", done=first)
        if settings.kl.weight > 0:
            every = settings.kl.reference_every
            self.components.append(Reference(trainer, ctx.runtime, self.base, every, settings.temperature))
        return first

    def replay(self, first: int, number: int, count: int = 1) -> Iterator[tuple[Rollout, dict[str, float]]]:
        """Resumes from the stage's checkpoint, which rollout `first` follows (the settings may not be those that it was
        made with), and yields `count` rollouts from `number` on with their metrics, without evaluation or export. When
        the first is yielded, the checkpoint before it is in the stage's folder."""
        try:
            self.sampler.open()
            self._start()
            self.ctx.progress.total(number + count - first, "rollouts")
            for n in range(first, number + count):
                if n == number:
                    self.trainer.save()
                    self.trainer.finish()
                result = self._rollout(n)
                self.ctx.progress.advance(1)
                if n >= number:
                    yield result
                if self.ctx.stop:
                    self.ctx.interrupt()
        finally:
            self.sampler.close()
            self.trainer.close()

    def _rollout(self, number: int) -> tuple[Rollout, dict[str, float]]:
        """One rollout and its updates, with its metrics."""
        rollout = self._sample(number)
        if failures := [row.failure for group in rollout.groups for row in group if row.failure]:
            total = sum(map(len, rollout.groups))
            self.ctx.say(f"rollout {number}: {len(failures)} of {total} samples failed, left out: {failures[0]}")
        staleness = self.trainer.step - rollout.step
        sampled = _merged(component.sampled(number, rollout) for component in self.components)
        compared = self.advantage.assign(rollout.groups)
        mini_batches = self._mini_batches(rollout.groups, number)
        prepared = self._prepare([batch for batches in mini_batches for batch in batches])
        for network in (self.policy, self.sampler_model):
            network.release()  # nobody samples during the updates
        updates = [self._update(batches) for batches in mini_batches]
        has_contrast = self.settings.samples > 1 and self.advantage.within_groups
        values = {
            **rollout_metrics(rollout, self.settings, has_contrast),
            **compared,
            **prepared,
            **sampled,
            "rl/staleness": staleness,
            **update_metrics(updates),
            **_merged(component.metrics() for component in self.components),
            **self.sampler.metrics(),
        }
        return rollout, values

    def _sample(self, number: int) -> Rollout:
        """Rollout `number`: of the current policy, unless a component brings it."""
        for component in self.components:
            if (rollout := component.take(number)) is not None:
                return rollout
        return self.generator.rollout(number, self.cap(), self.trainer.step)

    def _mini_batches(self, groups: Sequence[Group], number: int) -> list[list[Batch]]:
        """Random mini-batches of equal size (R1: 16 of 512), each as this rank's micro-batches."""
        settings, rows = self.settings, [row for group in groups for row in group]
        order = np.random.default_rng([self.ctx.seed, number]).permutation(len(rows))
        size = len(rows) // settings.updates_per_rollout
        mini_batches = []
        for start in range(0, len(rows), size):
            part = [rows[i] for i in order[start : start + size]]
            parts = self.packing.parts(part)
            if self.carrier is not None:
                mini_batches.append(self.carrier.batches(part, parts, self.packing.batch))
            else:
                batches = [self.packing.batch(rows, rows) for rows in parts]
                mini_batches.append(list(self.trainer.collective.mine(batches)))
        return mini_batches

    def _prepare(self, batches: list[Batch]) -> dict[str, float]:
        """Lets the components see all batches before the first update; returns the means of their metrics."""
        values = _merged(component.before_updates(batches) for component in self.components)
        if not values:
            return values
        tokens = float(sum(batch.n_loss_tokens for batch in batches))  # fillers have none
        share = tokens / self.trainer.collective.average({"tokens": tokens})["tokens"]
        return self.trainer.collective.average({name: share * value for name, value in values.items()})

    def _update(self, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step on one mini-batch."""
        trainer, before = self.trainer, self.trainer.step
        for component in self.components:
            component.before_step(batches)
        values = trainer.update(batches)
        if trainer.step <= before:  # the guard went back to a checkpoint
            self._restore()
        else:
            for component in self.components:
                component.after_step()
        return values

    def _before_write(self) -> None:
        for component in self.components:
            component.before_save(self._next())

    def _next(self) -> int:
        """The number of the next rollout. The cursor counts rows, as in pre-training: it does not move when the guard
        goes back to older weights."""
        return -(-self.trainer.rows // (self.settings.prompts_per_rollout * self.settings.samples))

    def _restore(self) -> None:
        """Restores all components to the checkpoint that the trainer resumed from."""
        for component in self.components:
            component.restore()


def _merged(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    return {name: value for metrics in several for name, value in metrics.items()}
