"""Stage "distill": on-policy logit distillation of a student from an earlier stage's model.

The student answers training problems, and at every token of its own answers its distribution is trained towards the
teacher's (``objectives.py`). Specialists may teach their own tasks (`teachers`), so that one student follows
several. R1's distillation is SFT on the teacher's samples (R1 2.4): a stage of kind reject from the teacher, then one
of kind sft from the student. This stage is an extra for models that share a tokenizer.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from bessemer import tasks
from bessemer.addons.r1.objectives import OnPolicyDistillation
from bessemer.addons.r1.tables import DistillConfig
from bessemer.config.recipe import Recipe
from bessemer.config.table import is_changed
from bessemer.data.chat import question_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.hf.families import load_tokenizer
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.work import PROMPT, TRAINED, StageWork, answers
from bessemer.rl import rollout
from bessemer.rl.rollout import Packing, ScoredSample
from bessemer.rl.sampler import LocalSampler, Sampler, sampler_of
from bessemer.runs.context import StageContext
from bessemer.train import lineage, setup
from bessemer.train.plan import TrainingPlan

HELDOUT = "distill/heldout_pass_at_1"


class Distill(Stage[DistillConfig]):
    distributed = True

    def resolve(self, config: DistillConfig, recipe: Recipe) -> dict[str, Any]:
        if not config.tasks:
            raise UserError(f'stage "{config.name}": tasks is empty; known: {", ".join(tasks.names())}')
        for name in config.tasks:
            if tasks.get(name).size("test") == 0:
                raise UserError(f'stage "{config.name}": {name} holds out no problem to evaluate on')
        preflight.refuse_environments(config.name, config.tasks, "a teacher scores single answers; choose other tasks")
        if unknown := [name for name in config.teachers if name not in config.tasks]:
            raise UserError(f'stage "{config.name}": teachers names "{unknown[0]}", which is not one of its tasks')
        if missing := [name for name in config.tasks if config.teachers.get(name, config.teacher) is None]:
            raise UserError(
                f'stage "{config.name}": {missing[0]} has no teacher; name one in teachers, or a teacher for all'
            )
        lineage.check_lora(config, recipe)
        setup.check_recompute(recipe, config.name)
        if is_changed(config.rollout, "precision"):
            raise UserError(f'stage "{config.name}": rollout.precision is for RL alone; leave it out')
        return sampler_of(cast(Any, config)).facts(cast(Any, config))

    def probes(self, config: DistillConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        yield from preflight.task_probes(config.tasks, config.steps * config.prompts_per_step)
        models = [config.source, *{config.teachers.get(task, config.teacher) for task in config.tasks} - {None}]
        yield from preflight.length_probes(config, recipe, models, "max_new_tokens", config.max_new_tokens)

    def work(self, config: DistillConfig, recipe: Recipe) -> list[StageWork]:
        """Samples, updates, the teachers' forward passes, and the held-out evaluations."""
        samples = config.steps * config.prompts_per_step * config.samples
        trained = answers(samples, config.max_new_tokens) + samples * PROMPT
        heldout_answers = len(config.tasks) * config.eval_problems * 4
        times = 1 + -(-config.steps // config.eval_every)
        written = answers(samples + times * heldout_answers, config.max_new_tokens)
        taught = [StageWork(name, read=trained / len(_teachers(config))) for name in _teachers(config)]
        return [StageWork(config.name, trained=trained, sampled=written, bytes=TRAINED), *taught]

    def training_data(
        self, config: DistillConfig, recipe: Recipe, folder: Path, cache: Path
    ) -> Iterator[tasks.Problem]:
        """The problems its steps ask."""
        families, seed = [tasks.get(name) for name in config.tasks], recipe.seed_of(config)
        problems = rollout.problems_of(families, "train", 0, config.steps * config.prompts_per_step, seed)
        yield from (problem for _, problem in problems)

    def run(self, config: DistillConfig, ctx: StageContext) -> dict[str, Any]:
        run = _Run(config, ctx)
        try:
            run.engine.open()
            return run.run()
        finally:
            run.engine.close()
            run.trainer.close()


class _Run:
    """One distillation; the trainer's checkpoint holds everything that must survive a kill."""

    def __init__(self, config: DistillConfig, ctx: StageContext) -> None:
        self.config, self.settings, self.ctx, self.carrier = config, config, ctx, None
        if ctx.source is None:
            raise UserError(f'stage "{ctx.name}" needs a student to start from: name its stage with from = "..."')
        setup.keep_memory()
        source, runtime = ctx.source / "model", ctx.runtime
        student, self.tokenizer = runtime.read(source, split_rows=False)
        student = setup.adapted(student, config, source, ctx.seed, ctx.recipe.layout, ctx.say)
        self.names = _teachers(config)
        for name in self.names:
            self._follow(name)
        self.teachers = runtime.frozen({name: ctx.inputs[name] / "model" for name in self.names}, student)
        self.tasks = [tasks.get(name) for name in config.tasks]
        workers = runtime.workers()
        dtype = setup.set_precision(student, config, ctx.say_once, ctx.state, ctx.agree)
        if student.cfg.n_mtp:
            ctx.say("MTP modules: frozen")
        self.trainer = runtime.trainer(
            student, OnPolicyDistillation(self.teachers.networks, config.temperature), None,
            config, TrainingPlan(workers=workers, compute_dtype=dtype, counts_padding=False), ctx.state,
            stop=lambda: ctx.stop, model_config=student.cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        among, networks = self.trainer.collective, (self.trainer.model, *self.teachers.networks)
        keep = ctx.share.merge({ctx.share.me: all([network.keeps_segments() for network in networks])})
        self.packing = Packing(
            config.micro_tokens, self.tokenizer.pad_id, "token", among.n_pipelines, among.row_multiple,
            all(keep.values()),
        )  # fmt: skip
        self.policy = self.sampler_model = runtime.whole(self.trainer)
        self.engine = self._sampler(Engine(self.policy.model, self.tokenizer, workers), source)

    def _sampler(self, engine: Engine, source: Path) -> Sampler:
        """What [rollout] names; it gets this object as a `LoopParts`."""
        kind, runtime = sampler_of(cast(Any, self.config)), self.ctx.runtime
        if kind is not LocalSampler:
            return kind.of_loop(cast(Any, self), engine)
        if self.config.lora is None:  # processes that wait would need the adapters too
            engine = runtime.dealt(engine, source, version=lambda: self.trainer.rows)
        return LocalSampler(engine, self.policy.refresh, runtime)

    def _follow(self, name: str) -> None:
        """Gives the student the chat style that its teachers share; UserError for a teacher that it cannot follow."""
        tokenizer = load_tokenizer(self.ctx.inputs[name] / "model")
        if self.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f'stage "{self.ctx.name}": student and teacher "{name}" have different tokenizers, so their '
                "distributions cannot be compared; distil from text instead (a stage of kind reject from the teacher, "
                "then one of kind sft)"
            )
        if tokenizer.chat_style is None:
            raise UserError(
                f'stage "{self.ctx.name}": teacher "{name}" has a chat template that is not ours; import it with '
                'style = "zero"'
            )
        if name != self.names[0] and self.tokenizer.chat_style != tokenizer.chat_style:
            raise UserError(
                f'stage "{self.ctx.name}": teacher "{name}" answers in the form {tokenizer.chat_style}, '
                f'"{self.names[0]}" in {self.tokenizer.chat_style}; use one form for all'
            )
        self.tokenizer.chat_style = tokenizer.chat_style

    def run(self) -> dict[str, Any]:
        config, ctx, trainer = self.config, self.ctx, self.trainer
        trainer.start()
        first = -(-trainer.rows // (config.prompts_per_step * config.samples))
        ctx.rewind(trainer.step or -1)
        ctx.progress.total(config.steps, "steps", done=first)
        if trainer.step == 0:
            self._evaluate()
        for number in range(first, config.steps):
            values = self._step(number)
            ctx.metrics.write(trainer.step, trainer.tokens, values)
            note = f"divergence {values.get('train/loss', 0.0):.3f}, accuracy {values['distill/accuracy']:.3f}"
            ctx.progress.advance(1, note)
            if (number + 1) % config.eval_every == 0 or number + 1 == config.steps:
                self._evaluate()
            if trainer.stop():
                trainer.save()
                trainer.finish()
                ctx.interrupt()
            trainer.save_if_due()
        trainer.save()
        if ctx.leads:
            self.tokenizer.save(ctx.state / "tokenizer")
        ctx.runtime.save(trainer, ctx.dir / "model", ctx.state / "tokenizer")
        # from the metrics, since this attempt may have resumed after the last evaluation
        return {"steps": config.steps} | ({"pass_at_1": round(ctx.metrics.last(HELDOUT), 4)} if ctx.leads else {})

    def _step(self, number: int) -> dict[str, float]:
        """Samples from the current student, then makes one update on the samples."""
        config, count = self.config, self.config.prompts_per_step
        chosen = rollout.problems_of(self.tasks, "train", number * count, count, self.ctx.seed)
        prompts = [self._encode(problem) for _, problem in chosen]
        seed = tasks.stable_hash(self.ctx.seed, self.ctx.name, number)
        completions = self.engine.generate(
            prompts, samples=config.samples, seeds=rollout.prompt_seeds(seed, count), temperature=config.temperature,
            max_new_tokens=config.max_new_tokens, batch_rows=setup.batch_rows(count * config.samples),
        )  # fmt: skip
        groups = rollout.verify(chosen, prompts, completions, self.tokenizer.opening, share=self.ctx.share)
        rows: dict[int, list[ScoredSample]] = {}
        for (task, _), group in zip(chosen, groups, strict=True):
            rows.setdefault(self.names.index(teacher_of(config, task.name)), []).extend(group)
        batches = [
            replace(self.packing.batch(part, part), teacher=teacher)
            for teacher, own in sorted(rows.items())
            for part in self.packing.parts(own)
        ]
        self.policy.release()  # nobody samples during the update
        right = [row.verdict.correct for group in groups for row in group]
        return self.trainer.update(self.teachers.read(self.trainer, batches)) | {
            "distill/accuracy": sum(right) / len(right)
        }

    def _evaluate(self) -> None:
        """Writes the mean held-out pass@1 over the tasks."""
        rows = [
            scoring.evaluate(
                self.engine, self._encode, task, problems=min(task.size("test") or 10**9, self.config.eval_problems),
                samples=4, max_new_tokens=self.config.max_new_tokens, seed=self.ctx.seed, share=self.ctx.share,
            )
            for task in self.tasks
        ]  # fmt: skip
        score = sum(row["pass_at_1"] for row in rows) / len(rows)
        accuracies = {row["task"]: row["pass_at_1"] for row in rows} if len(rows) > 1 else {}
        values = {HELDOUT: score} | {f"distill/heldout/{name}": value for name, value in accuracies.items()}
        self.ctx.metrics.write(self.trainer.step, self.trainer.tokens, values)
        details = f" ({', '.join(f'{name} {value:.3f}' for name, value in accuracies.items())})" if accuracies else ""
        self.ctx.say(f"step {self.trainer.step}: held-out pass@1 {score:.3f}{details}")

    def _encode(self, problem: tasks.Problem) -> list[int]:
        return question_ids(self.tokenizer, problem.prompt)


def teacher_of(config: DistillConfig, task: str) -> str:
    """The stage that teaches a task."""
    name = config.teachers.get(task, config.teacher)
    assert name is not None, "resolve has checked it"
    return name


def _teachers(config: DistillConfig) -> list[str]:
    """The stages that teach, in the order of the tasks, each once."""
    return list(dict.fromkeys(teacher_of(config, task) for task in config.tasks))
