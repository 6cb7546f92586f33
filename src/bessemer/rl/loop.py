"""The loop of an RL stage: sample, pay, compare, update (R1 2.2, R1-Nature B.1).

    draw      problems of this rollout, G samples each, paid                       policy/draw.py, policy/ahead.py
              of candidates those worth asking, where a filter is on               policy/pick.py, rl/difficulty.py
              by this process or by workers apart                                  policy/samplers.py, rl/sampler
    compare   advantages within each group, or against a critic                    policy/estimate.py
    gap       what sampler and trainer disagree on, measured and corrected         policy/gap.py
    update    mini-batches, one inner epoch, divergence from the reference         rl/objective.py, policy/reference.py
    watch     held-out problems every so many rollouts                             policy/watch.py
    leave     samples as conversations for another stage, where one asks           policy/leave.py

All that must survive a kill lies in the trainer's checkpoint.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bessemer import tasks
from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.data.chat import question_ids
from bessemer.dist import distributed
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.rl import advantage, make_sampler, rollout, rollout_metrics
from bessemer.rl.estimators import CriticEstimator, Estimator, GroupEstimator
from bessemer.rl.evaluator import Watch
from bessemer.rl.export import Leave
from bessemer.rl.generation import Draw
from bessemer.rl.importance import Gap
from bessemer.rl.objective import GRPO
from bessemer.rl.problem_picker import Pick
from bessemer.rl.queue import Ahead
from bessemer.rl.reference import Reference
from bessemer.rl.reward import Judge
from bessemer.runs.context import StageContext
from bessemer.train import speed
from bessemer.train.trainer import Runtime
from bessemer.workers import Workers


class Loop:
    """One RL run."""

    def __init__(self, settings: RLConfig, ctx: StageContext, judges: dict[str, Judge]) -> None:
        self.settings, self.ctx = settings, ctx
        if ctx.source is None:
            raise UserError(f'stage "{ctx.name}" needs a stage with a model before it')
        speed.keep_memory()
        network, self.tokenizer = distributed.read(
            ctx.source / "model", ctx.ranks, ctx.recipe.layout, ctx.say, split_rows=False
        )
        self.workers = make_sampler.workers_beside(settings.rollout) if ctx.ranks is None else Workers(1)
        longest = round(max(settings.max_new_tokens.values))
        self.objective = GRPO(
            settings.clip_low, settings.clip_high, settings.kl, settings.temperature, settings.surrogate,
            longest if settings.normalise == "constant" else 0,
        )  # fmt: skip
        self.trainer = distributed.trainer(
            network, self.objective, None, settings, Runtime(workers=self.workers), ctx.state,
            stop=lambda: ctx.stop, model_config=distributed.model_of(network).cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        self.policy = distributed.GatheredModel(self.trainer)
        engine = Engine(self.policy.model, self.tokenizer, self.workers)
        self.sampler = make_sampler.make(settings, ctx, engine, self.trainer, self.policy.refresh)
        self.pick = Pick(settings, self.trainer)
        self.draw = Draw(self.sampler, self._encode, self.pick, ctx.seed, judges, ctx.once)
        self.ahead = Ahead(self.draw, self.trainer, self._cap, settings.max_off_policy_rollouts, settings.rollouts)
        self.gap = Gap(self.policy.model, self.workers, settings)
        self.watch = Watch(self.draw, self.trainer, ctx)
        self.leave = Leave(settings.export_samples if ctx.leads else "nothing", ctx.state)
        self.reference: Reference | None = None
        self.estimator: Estimator = GroupEstimator(settings.scale_by_std)

    def _encode(self, problem: tasks.Problem) -> list[int]:
        return question_ids(self.tokenizer, problem.prompt)

    def _cap(self) -> int:
        """Longest completion at this step."""
        return round(self.settings.max_new_tokens(self.trainer.step))

    def run(self) -> dict[str, Any]:
        try:
            self.sampler.open()
            return self._run()
        finally:
            self.sampler.close()

    def _run(self) -> dict[str, Any]:
        settings, ctx, trainer = self.settings, self.ctx, self.trainer
        trainer.start()
        self.pick.load()
        self.ahead.load()
        # The cursor is rows, as in pre-training: it stays where it is when the guard goes back to older weights.
        first = -(-trainer.rows // (settings.prompts_per_rollout * settings.samples))
        ctx.rewind(trainer.step or -1)  # at step 0 the gate writes its lines anew
        self.watch.begin()
        ctx.progress.total(settings.rollouts, "rollouts", done=first)
        if settings.kl > 0:
            self.reference = Reference(
                trainer, self.policy, self.workers, settings.reference_every, settings.temperature
            )
        if settings.advantage == "critic":
            self.estimator = CriticEstimator(trainer, settings, self.tokenizer.pad_id)
        if trainer.step == 0:
            self.watch.gate(self._cap())
        for number in range(first, settings.rollouts):
            values = self._rollout(number)
            self.watch.write(values)
            accuracy, length, tries = (values[f"rl/{name}"] for name in ("accuracy", "length", "tries"))
            ctx.progress.advance(1, f"accuracy {accuracy:.3f}, length {length:.0f}, tries {tries:.1f}")
            if (number + 1) % settings.eval_every == 0 or number + 1 == settings.rollouts:
                self.watch.evaluate(self._cap())
            self.ahead.settle(number + 1)
            if trainer.stop():
                trainer.save()
                trainer.finish()
                ctx.interrupt()
            trainer.save_if_due()
        trainer.save()
        distributed.save(trainer, ctx.dir / "model", ctx.source / "model")
        self.leave.finish(settings.rollouts, ctx.dir)
        done = {"steps": trainer.step}
        return done | {"accuracy": round(values["rl/accuracy"], 4)} if first < settings.rollouts else done

    def _rollout(self, number: int) -> dict[str, float]:
        drawn = self.ahead.take(number)
        groups, staleness = drawn.paid.groups, self.trainer.step - drawn.step
        filtered = self.pick.see(drawn.paid.choice)
        self.leave.add(number, groups)
        self.estimator.fill(groups)
        lots = self._lots([sampled for group in groups for sampled in group], number)
        self.policy.refresh()
        gap = self.trainer.average(self.gap.close([batch for batches in lots for batch in batches]))
        updates = self._updates(lots)
        values = {
            **rollout_metrics.of_rollout(groups),
            "rl/cap": drawn.cap,
            **self.estimator.figures(),
            **gap,
            **filtered,
        }
        values |= {"rl/dead_groups": advantage.dead_groups(rollout.rewards(groups)), "rl/staleness": staleness}
        if self.settings.max_resamples > 1:
            values["rl/problems_asked"] = drawn.paid.asked
        for name in ("kl", "entropy", "clip_share", "grad_norm"):
            values[f"rl/{name}"] = float(np.mean([update.get(f"train/{name}", 0.0) for update in updates]))
        for name, measured in (("gap", "logp_gap"), ("gap_max", "logp_gap_max"), ("kl", "sampler_kl")):
            values[f"rl/sampler_{name}"] = updates[0].get(f"train/{measured}", 0.0)
        values["rl/lr"] = updates[-1].get("train/lr", 0.0)
        return values | self.sampler.figures()

    def _lots(self, rows: list[rollout.Sampled], number: int) -> list[list[Batch]]:
        """Random mini-batches of equal size, each as the trainer takes it (R1: 16 of 512)."""
        settings = self.settings
        order = np.random.default_rng([self.ctx.seed, number]).permutation(len(rows))
        size = len(rows) // settings.updates_per_rollout
        lots = [[rows[i] for i in order[start : start + size]] for start in range(0, len(rows), size)]
        pad = self.tokenizer.pad_id
        cut = [rollout.batches(lot, pad, settings.micro_tokens, settings.normalise) for lot in lots]
        return [list(self.trainer.mine(batches)) for batches in cut]

    def _updates(self, lots: list[list[Batch]]) -> list[dict[str, float]]:
        """One inner epoch, an optimizer step for every lot."""
        trainer, found = self.trainer, []
        for batches in lots:
            if self.reference is not None:
                self.reference.fill(batches)
            before = trainer.step
            self.estimator.learn(batches)
            found.append(trainer.update(batches))
            self.estimator.follow(before)
            self.pick.follow(before)
            self.ahead.follow(before)
            if self.reference is not None:
                self.reference.follow(before)
        return found
