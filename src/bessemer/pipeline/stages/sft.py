"""Stage "sft": supervised fine-tuning on conversations (R1 2.3.1 and 2.3.3, V3 5.1).

Starts from the model of an earlier stage. Only what the assistant wrote is trained on; samples share rows and do not
see each other. The learning rate falls along a cosine from `lr` to `lr_final`, as in R1.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.config.places import located
from bessemer.config.recipe import Recipe
from bessemer.config.training import SFTConfig
from bessemer.data import sft_rows, sources
from bessemer.data.chat import question_ids
from bessemer.data.documents import HUB, Document, files_under, is_text
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage, find_kind
from bessemer.pipeline.work import TRAINED, StageWork
from bessemer.runs import files
from bessemer.runs.context import StageContext
from bessemer.runs.step_log import StepLog
from bessemer.train import lineage, objective, setup
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.trainer import Trainer

FEW_STEPS = 10
"""Training for fewer optimizer steps than this gives a warning."""


class SFT(Stage[SFTConfig]):
    format = 2
    distributed = True

    def resolve(self, config: SFTConfig, recipe: Recipe) -> dict[str, Any]:
        setup.check_layout(recipe, config.name, [config.batch_examples or config.batch_rows or sft_rows.BATCH_ROWS])
        if not config.data and not config.samples:
            raise UserError(f'stage "{config.name}": nothing to train on; give data = [...] or samples = [...]')
        lineage.check_lora(config, recipe)
        for stage in map(recipe.stage, config.samples):
            if not find_kind(stage.kind)().exports_conversations(stage):
                raise UserError(
                    f'stage "{stage.name}" (kind {stage.kind}) exports no conversations; a stage of kind reject '
                    'does, and one of kind rl with hooks = ["export-samples"]'
                )
        return {}

    def work(self, config: SFTConfig, recipe: Recipe) -> list[StageWork]:
        """From the sizes of the files, at four bytes per token, and from what earlier stages can export."""
        files = [file for spec in config.data if not spec.startswith(HUB) for file in _files(located(spec))]
        exported = sum(find_kind(one.kind)().exported_tokens(one) for one in map(recipe.stage, config.samples))
        tokens = sum(file.stat().st_size for file in files) / 4 + exported
        if not tokens:
            return super().work(config, recipe)
        epochs = config.epochs or sft_rows.EPOCHS[0]
        n_shown = epochs * len(config.prompts) * 100
        return [
            StageWork(
                config.name, trained=epochs * tokens, sampled=n_shown, length=config.row_length,
                bytes=TRAINED,
            )
        ]  # fmt: skip

    def probes(self, config: SFTConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        yield from preflight.length_probes(config, recipe, [config.source], "row_length", config.row_length)

        def conversations(spec: str) -> str | None:
            if spec.startswith(HUB):
                return sources.check(spec)  # not downloaded to be counted
            return f"{spec}: {sft_rows.count(sources.documents(spec, cache, domain=spec)):,} conversations"

        for spec in config.data:
            yield preflight.of_key("data", partial(conversations, spec))

    def training_data(self, config: SFTConfig, recipe: Recipe, folder: Path, cache: Path) -> Iterator[str]:
        """The conversations of `data`; earlier stages report their own."""
        for spec in config.data:
            yield from (document.text for document in sources.documents(spec, cache, domain=spec))

    def run(self, config: SFTConfig, ctx: StageContext) -> dict[str, Any]:
        if ctx.source is None or not (ctx.source / "model").is_dir():
            raise UserError(f'stage "{ctx.name}" needs a model to start from: name its stage with from = "..."')
        setup.keep_memory()
        source = ctx.source / "model"
        model, tokenizer = ctx.runtime.read(source)
        model = setup.adapted(model, config, source, ctx.seed, ctx.recipe.layout, ctx.say)
        if config.style is not None:
            tokenizer.chat_style = config.style
        folder = ctx.state / "rows"
        facts = ctx.agree(lambda: sft_rows.build(_conversations(config, ctx), tokenizer, config.row_length, folder))
        rows = sft_rows.load(ctx.state / "rows", ctx.seed)
        ctx.say(_about(facts))
        epochs, batch = sft_rows.fitted(rows, config)
        ctx.runtime.check(ctx.recipe, ctx.name, [batch])
        ctx.say(_steps(config, rows.n_rows, epochs, batch))
        monitor = _Monitor(config, ctx, tokenizer, rows.n_rows * config.row_length)
        trainer = ctx.runtime.trainer(
            model, objective.next_token, rows.batch, config, _runtime(config, rows, epochs, batch, model, ctx),
            ctx.state, log=monitor.log, stop=lambda: ctx.stop, on_step=[monitor],
            model_config=model.cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        monitor.train(trainer)
        if ctx.leads:
            tokenizer.save(ctx.state / "tokenizer")
        ctx.runtime.save(trainer, ctx.dir / "model", ctx.state / "tokenizer")
        counts = ("samples", "multi_turn", "too_long", "answer_tokens")
        return {"steps": trainer.step, **{key: facts[key] for key in counts}}


def _conversations(config: SFTConfig, ctx: StageContext) -> Iterator[Document]:
    exported = [ctx.inputs[name].absolute() / files.CONVERSATIONS for name in config.samples]
    specs = [*config.data, *map(str, exported)]
    return itertools.chain.from_iterable(sources.documents(spec, ctx.cache, domain=spec) for spec in specs)


def _about(facts: dict[str, Any]) -> str:
    left_out = f", {facts['too_long']} longer than a row left out" if facts["too_long"] else ""
    return (
        f"{facts['samples']} conversations in {facts['rows']} rows ({facts['waste']:.1%} padding){left_out}; "
        f"{facts['answer_tokens']} of {facts['tokens']} tokens are answers"
    )


def _steps(config: SFTConfig, n_rows: int, epochs: int, batch: float) -> str:
    """The length of the training, with a warning if that is very short."""
    n = math.ceil(epochs * n_rows / batch)
    steps = f"{n} optimizer step{'s' if n > 1 else ''}"
    size = f"{config.batch_examples} conversations" if config.batch_examples else f"{batch:g} of {n_rows} rows"
    summary = f"{steps}: {epochs} epoch{'s' if epochs > 1 else ''}, {size} a step"
    if not (config.batch_rows or config.batch_examples) and batch < sft_rows.BATCH_ROWS:
        summary += f" (batch_rows is not set: {sft_rows.BATCH_ROWS} would make fewer than {sft_rows.STEPS} steps)"
    elif config.epochs is None:
        summary += " (epochs are not set and follow from the data)"
    if n >= FEW_STEPS:
        return summary
    return (
        f"warning: only {summary}; the model will hardly change: add conversations, or raise epochs or lower batch_rows"
    )


def _files(path: Path) -> list[Path]:
    """What still exists of them: a finished stage does not need its data any more."""
    return files_under(path, is_text) if path.is_dir() else [path] if path.is_file() else []


def _runtime(
    config: SFTConfig, rows: sft_rows.SFTRows, epochs: int, batch: float, model: LanguageModel,
    ctx: StageContext,
) -> TrainingPlan:  # fmt: skip
    trained = model.cfg.n_mtp > 0 and config.mtp_lambda > 0
    if model.cfg.n_mtp:
        ctx.say(f"MTP modules: {f'trained with weight {config.mtp_lambda:g}' if trained else 'frozen'}")
    return TrainingPlan(
        counts_padding=False,
        idle=() if trained else ("mtp.",),
        tokens=epochs * rows.n_rows * config.row_length,
        batch_rows=sft_rows.batch_rows(rows, epochs, batch, config.batch_examples),
        terms={
            "mtp_lambda": constant(config.mtp_lambda if model.cfg.n_mtp else 0.0),
            "balance_alpha": constant(config.balance_alpha),
        },
        workers=ctx.runtime.workers(),
        compute_dtype=setup.set_precision(model, config, ctx.say_once, ctx.state, ctx.agree),
    )  # fmt: skip


class _Monitor(StepLog):
    """Metrics, and the prompts answered after every epoch."""

    def __init__(self, config: SFTConfig, ctx: StageContext, tokenizer: Tokenizer, epoch: int) -> None:
        super().__init__(ctx)
        self.config, self.tokenizer, self.epoch = config, tokenizer, epoch

    def __call__(self, trainer: Trainer) -> None:
        if self.config.prompts and self.has_passed(self.epoch):
            model = self.ctx.runtime.gather(trainer)
            self.ctx.once(lambda: self._answer(model, trainer))  # ranks wait while rank 0 samples

    def _answer(self, model: LanguageModel | None, trainer: Trainer) -> None:
        assert model is not None, "rank 0 has it"
        encoded = [question_ids(self.tokenizer, text) for text in self.config.prompts]
        prefix = self.tokenizer.opening
        answers = Engine(model, self.tokenizer).generate(
            encoded, max_new_tokens=200, temperature=0.6, seed=self.ctx.seed
        )
        for text, (answer,) in zip(self.config.prompts, answers, strict=True):
            self.ctx.sample(trainer.step, trainer.tokens, f"{text}\n\n{prefix}{answer.text}")
