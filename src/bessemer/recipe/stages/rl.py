"""Stage "rl": R1-Zero, that is GRPO on verifiable problems straight from a base model (R1 2.2).

One rollout: `prompts_per_rollout` problems x `samples` completions through the Engine, judged by the task's verifier;
then `updates_per_rollout` optimizer steps on it, one inner epoch. A "step" is one optimizer step, as in the paper.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from bessemer import tasks
from bessemer.data.batch import Batch
from bessemer.data.chat import question_ids
from bessemer.errors import UserError
from bessemer.infer.engine import Engine
from bessemer.model.transformer import Transformer
from bessemer.recipe import modelling, scoring
from bessemer.recipe.settings import StageSettings
from bessemer.recipe.stage import Stage, StageContext, register
from bessemer.recipe.values import Points, Seconds, Tokens
from bessemer.rl import advantage, board, rollout
from bessemer.rl.objective import GRPO, reference_logprobs
from bessemer.train import speed
from bessemer.train.settings import Settings as TrainSettings
from bessemer.train.trainer import Trainer

PROBES = 6
"""Held-out problems whose answers are kept every evaluation."""


@register
class RL(Stage):
    kind = "rl"

    class Settings(StageSettings):
        free = frozenset({"save_seconds", "micro_tokens"})

        tasks: list[str]
        """Task families; problems are taken from them in turn, from their train split."""
        rollouts: int = Field(60, ge=1)
        """How many rollouts; optimizer steps are this times updates_per_rollout."""
        prompts_per_rollout: int = Field(16, ge=1)
        """Problems per rollout (R1: 512)."""
        samples: int = Field(16, ge=2)
        """Completions per problem G (R1: 16)."""
        updates_per_rollout: int = Field(1, ge=1)
        """Optimizer steps per rollout, each sample used once (R1: 16)."""
        max_new_tokens: Tokens = 160
        """Length cap of a completion (R1-Zero: 32,768, 65,536 from step 8.2k)."""
        temperature: float = Field(1.0, gt=0)
        """Sampling temperature (R1-Zero: 1)."""
        lr: Points = Points(3e-4)
        """Learning rate over optimizer steps (R1-Zero: 3e-6)."""
        clip_low: float = Field(0.2, gt=0)
        """Lower clip of the ratio."""
        clip_high: float = Field(0.28, gt=0)
        """Upper clip of the ratio (R1: 10)."""
        kl: float = Field(0.001, ge=0)
        """Coefficient of the k3 divergence from the reference (R1: 0.001)."""
        reference_every: int = Field(400, ge=1)
        """Optimizer steps after which the reference becomes the current policy (R1: 400)."""
        surrogate: Literal["grpo", "gspo", "cispo", "reinforce"] = "grpo"
        """What a token contributes: the paper's clipped ratio; one ratio per output (GSPO, clips of 3e-4); a cut weight
        that spares every gradient (CISPO); no ratio at all."""
        normalise: Literal["sequence", "token", "constant"] = "sequence"
        """sequence: mean over each output, then over outputs (the paper); token: mean over all tokens (DAPO);
        constant: sum over an output divided by max_new_tokens, whatever its length (Dr. GRPO)."""
        scale_by_std: bool = True
        """Divide advantages by the group's standard deviation (the paper)."""
        format_reward: float = Field(0.1, ge=0)
        """Weight of the format reward beside accuracy (R1: 1; at this size a large one teaches form alone)."""
        language_reward: float = Field(0.0, ge=0)
        """Weight of language consistency, the share of the thoughts' words in the problem's language (R1-Zero: none;
        R1's first RL stage: 1)."""
        weight_decay: float = Field(0.0, ge=0)
        """AdamW decay in RL (undocumented)."""
        clip_norm: float = Field(1.0, gt=0)
        """Largest gradient norm."""
        micro_tokens: int = Field(4096, ge=16)
        """Padded tokens per forward; changes memory and speed only."""
        eval_every: int = Field(10, ge=1)
        """Held-out evaluation every so many rollouts."""
        eval_problems: int = Field(64, ge=1)
        """Held-out problems of that evaluation, 4 samples each."""
        minimum_pass: float = Field(0.02, ge=0, le=1)
        """Refuse to start when the base solves fewer: RL cannot amplify what is not there."""
        save_seconds: Seconds = 60.0
        """Checkpoint this often."""

    def resolve(self, settings: Settings, recipe: Any) -> dict[str, Any]:
        if not settings.tasks:
            raise UserError(f'stage "{settings.name}": tasks is empty; known: {", ".join(tasks.names())}')
        for name in settings.tasks:
            tasks.get(name)
        count = settings.prompts_per_rollout * settings.samples
        if count % settings.updates_per_rollout:
            raise UserError(
                f'stage "{settings.name}": {count} samples cannot be split into {settings.updates_per_rollout} equal '
                "updates; change updates_per_rollout or samples"
            )
        return {}

    def estimate(self, settings: Settings, recipe: Any) -> float:
        samples = settings.rollouts * settings.prompts_per_rollout * settings.samples
        return modelling.estimate_seconds(recipe, samples * settings.max_new_tokens)

    def run(self, settings: Settings, ctx: StageContext) -> dict[str, Any]:
        return _Run(settings, ctx).run()


class _Run:
    """The state of one RL run; everything that must survive a kill lies in the trainer's checkpoint."""

    def __init__(self, settings: RL.Settings, ctx: StageContext) -> None:
        self.settings, self.ctx = settings, ctx
        if ctx.source is None:
            raise UserError(f'stage "{ctx.name}" needs a stage with a model before it')
        speed.keep_memory()
        self.model, self.tokenizer = modelling.load_model(ctx.source / "model")
        self.workers = modelling.workers()
        self.tasks = [tasks.get(name) for name in settings.tasks]
        self.objective = GRPO(
            settings.clip_low, settings.clip_high, settings.kl, settings.temperature, settings.surrogate,
            settings.max_new_tokens if settings.normalise == "constant" else 0,
        )  # fmt: skip
        self.trainer = Trainer(
            self.model, self.objective, None, self._train_settings(), ctx.state, stop=lambda: ctx.stop,
            config=self.model.cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        self.engine = Engine(self.model, self.tokenizer, self.workers)
        self.reward = rollout.Reward(settings.format_reward, settings.language_reward)
        self.reference: Transformer | None = None

    def _train_settings(self) -> TrainSettings:
        zero = lambda tokens, step: 0.0  # noqa: E731 (three schedules that are zero)
        return TrainSettings(
            tokens=0, lr=lambda tokens, step: self.settings.lr(step), gamma=zero, batch_rows=zero, micro_rows=1,
            terms={}, clip=self.settings.clip_norm, weight_decay=self.settings.weight_decay,
            workers=self.workers, save_seconds=self.settings.save_seconds,
        )  # fmt: skip

    def encode(self, problem: tasks.Problem) -> list[int]:
        return question_ids(self.tokenizer, problem.prompt)

    def run(self) -> dict[str, Any]:
        settings, ctx, trainer = self.settings, self.ctx, self.trainer
        trainer.start()
        # The cursor is rows, as in pre-training: it stays where it is when the guard goes back to older weights.
        first = -(-trainer.rows // (settings.prompts_per_rollout * settings.samples))
        ctx.rewind(trainer.step or -1)  # at step 0 the gate writes its lines anew
        ctx.progress.total(settings.rollouts, "rollouts", done=first)
        if settings.kl > 0:
            self._make_reference()
        if trainer.step == 0:
            self._gate()
        for number in range(first, settings.rollouts):
            values = self._rollout(number)
            ctx.metrics.write(trainer.step, trainer.tokens, values)
            accuracy, length, tries = (values[f"rl/{name}"] for name in ("accuracy", "length", "tries"))
            ctx.progress.advance(1, f"accuracy {accuracy:.3f}, length {length:.0f}, tries {tries:.1f}")
            if (number + 1) % settings.eval_every == 0 or number + 1 == settings.rollouts:
                self._evaluate()
            if ctx.stop:
                trainer.save()
                ctx.interrupt()
            trainer.save_if_due()
        trainer.save()
        self.model.save(ctx.dir / "model", tokenizer_dir=ctx.source / "model")
        done = {"steps": trainer.step}
        return done | {"accuracy": round(values["rl/accuracy"], 4)} if first < settings.rollouts else done

    def _gate(self) -> None:
        """The base must solve something, or every group is dead and only the format can be learnt."""
        row = self._evaluate()
        if row["pass_at_1"] < self.settings.minimum_pass:
            raise UserError(
                f"the base solves {row['pass_at_1']:.1%} of held-out problems (pass@4 {row['pass_at_k']:.1%}), below "
                f"minimum_pass {self.settings.minimum_pass:.1%}: RL has nothing to amplify. Pre-train longer, raise "
                "the share of the task's documents, or choose an easier task"
            )

    def _evaluate(self) -> dict[str, Any]:
        """Held-out pass@1, so that the curve of a run is not drawn from training problems."""
        settings, trainer = self.settings, self.trainer
        rows = [
            scoring.evaluate(
                self.engine, self.encode, task, problems=settings.eval_problems, samples=4, temperature=1.0,
                max_new_tokens=settings.max_new_tokens, seed=self.ctx.seed,
            )
            for task in self.tasks
        ]  # fmt: skip
        self._probe()
        keys = ("pass_at_1", "pass_at_k", "maj_at_k", "mean_length")
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in keys}
        values = {f"rl/heldout_{key.replace('_k', '_4')}": mean[key] for key in keys[:3]}
        self.ctx.metrics.write(trainer.step, trainer.tokens, values)
        self.ctx.say(
            f"step {trainer.step}: held-out pass@1 {mean['pass_at_1']:.3f}, pass@4 {mean['pass_at_k']:.3f}, "
            f"maj@4 {mean['maj_at_k']:.3f}, length {mean['mean_length']:.0f}"
        )
        return mean

    def _rollout(self, number: int) -> dict[str, float]:
        settings = self.settings
        first = number * settings.prompts_per_rollout
        chosen = rollout.problems_of(self.tasks, "train", first, settings.prompts_per_rollout, self.ctx.seed)
        groups = rollout.sample(
            self.engine, chosen, self.encode, self.reward, samples=settings.samples,
            seed=tasks.stable_hash(self.ctx.seed, self.ctx.name, number), temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            batch_rows=modelling.batch_rows(len(chosen) * settings.samples),
        )  # fmt: skip
        reward = rollout.rewards(groups)
        for group, row in zip(groups, advantage.group_advantages(reward, settings.scale_by_std).tolist(), strict=True):
            for sampled, value in zip(group, row, strict=True):
                sampled.advantage = value
        rows = [sampled for group in groups for sampled in group]
        updates = self._updates(rows, number)
        values = {**board.of_rollout(groups), "rl/dead_groups": advantage.dead_groups(reward)}
        gap = updates[0].get("train/logp_gap", 0.0)
        for name in ("kl", "entropy", "clip_share", "grad_norm"):
            values[f"rl/{name}"] = float(np.mean([update.get(f"train/{name}", 0.0) for update in updates]))
        values["rl/sampler_gap"] = gap
        values["rl/lr"] = updates[-1].get("train/lr", 0.0)
        return values

    def _updates(self, rows: list[rollout.Sampled], number: int) -> list[dict[str, float]]:
        """One inner epoch: random mini-batches of equal size (R1: 8,192 outputs in 16 mini-batches)."""
        settings, trainer = self.settings, self.trainer
        order = np.random.default_rng([self.ctx.seed, number]).permutation(len(rows))
        size = len(rows) // settings.updates_per_rollout
        found = []
        for start in range(0, len(rows), size):
            mine = [rows[i] for i in order[start : start + size]]
            batches = rollout.batches(mine, self.tokenizer.pad_id, settings.micro_tokens, settings.normalise)
            if self.reference is not None:
                for batch, logp_BT in zip(batches, self.workers.map(self._reference_logprobs, batches), strict=True):
                    batch.extras["ref_logp_BT"] = logp_BT
            before = trainer.step
            found.append(trainer.update(batches))
            if self.reference is None:
                continue
            if trainer.step <= before:  # the guard went back to a checkpoint
                self._load_reference()
            elif trainer.step % settings.reference_every == 0:
                self._refresh_reference()
        return found

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        return reference_logprobs(self.reference, batch, self.settings.temperature)

    def _make_reference(self) -> None:
        self.reference = Transformer(self.model.cfg).to(modelling.device())
        self.reference.eval().requires_grad_(False)
        self.workers.share([*self.reference.parameters(), *self.reference.buffers()])
        self._load_reference()

    def _load_reference(self) -> None:
        """As it was at the checkpoint the trainer came from; at the very beginning it is the base itself."""
        stored = {name.removeprefix("reference/"): value for name, value in self.trainer.extra_tensors.items()}
        self.reference.load_state_dict(stored or self.model.state_dict())
        self._store_reference()

    def _refresh_reference(self) -> None:
        """The hard copy of the paper: from now on the divergence is measured from here."""
        self.reference.load_state_dict(self.model.state_dict())
        self._store_reference()

    def _store_reference(self) -> None:
        kept = self.reference.state_dict()
        self.trainer.extra_tensors = {f"reference/{name}": value.clone() for name, value in kept.items()}

    def _probe(self) -> None:
        """The same few held-out problems again and again: how the answers change is the story of the run."""
        chosen = rollout.problems_of(self.tasks, "test", 0, PROBES, self.ctx.seed)
        groups = rollout.sample(
            self.engine, chosen, self.encode, self.reward, samples=2,
            seed=self.ctx.seed, temperature=self.settings.temperature, max_new_tokens=self.settings.max_new_tokens,
        )  # fmt: skip
        step = self.trainer.step
        self.ctx.rollouts(
            [
                {
                    "step": step, "id": row.problem.id, "prompt": row.problem.prompt, "completion": row.answer,
                    "reward": row.reward, "correct": row.verdict.correct, "formatted": row.verdict.formatted,
                    "reason": row.verdict.reason, "length": len(row.completion.tokens),
                }
                for group in groups
                for row in group
            ]
        )  # fmt: skip
        for group in groups[:2]:
            text = f"User: {group[0].problem.prompt}\nAssistant:{group[0].answer}"
            self.ctx.sample(step, self.trainer.tokens, text, title=group[0].verdict.reason)
