"""Stage "sft": supervised fine-tuning on conversations (R1 2.3.1 and 2.3.3, V3 5.1).

Starts from the model of an earlier stage. Only what the assistant wrote is trained on; samples share rows and do not
see each other. The learning rate falls along a cosine from `lr` to `lr_final`, as in R1.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.config.recipe import Recipe
from bessemer.config.training import SFTConfig
from bessemer.data import sft_rows, sources
from bessemer.data.chat import question_ids
from bessemer.data.documents import Document
from bessemer.data.tokenizer import Tokenizer
from bessemer.dist import distributed
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.hf.causal_lm import CausalLM
from bessemer.model.transformer import Transformer
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage, StepLog, find_kind, register
from bessemer.runs import files
from bessemer.runs.context import StageContext
from bessemer.train import objective, setup
from bessemer.train.trainer import Runtime, Trainer, constant
from bessemer.workers import Workers


@register
class SFT(Stage[SFTConfig]):
    kind = "sft"
    makes_model = True
    distributed = True

    def resolve(self, config: SFTConfig, recipe: Recipe) -> dict[str, Any]:
        distributed.check(recipe, config.name, [config.batch_examples or config.batch_rows])
        if not config.data and not config.samples:
            raise UserError(f'stage "{config.name}": nothing to train on; give data = [...] or samples = [...]')
        for stage in map(recipe.stage, config.samples):
            if not find_kind(stage.kind)().exports_conversations(stage):
                raise UserError(
                    f'stage "{stage.name}" (kind {stage.kind}) exports no conversations; a stage of kind reject '
                    'does, and one of kind rl with export_samples = "correct"'
                )
        return {}

    def probes(self, config: SFTConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        yield from preflight.length_probes(config, recipe, [config.source], "row_length", config.row_length)

        def conversations(spec: str) -> str:
            return f"{spec}: {sft_rows.count(sources.documents(spec, cache, domain=spec)):,} conversations"

        for spec in config.data:
            yield partial(conversations, spec)

    def training_data(self, config: SFTConfig, recipe: Recipe, folder: Path, cache: Path) -> Iterator[str]:
        """The conversations of `data`; earlier stages report their own."""
        for spec in config.data:
            yield from (document.text for document in sources.documents(spec, cache, domain=spec))

    def run(self, config: SFTConfig, ctx: StageContext) -> dict[str, Any]:
        if ctx.source is None or not (ctx.source / "model").is_dir():
            raise UserError(f'stage "{ctx.name}" needs a model to start from: name its stage with from = "..."')
        setup.keep_memory()
        network, tokenizer = distributed.read(ctx.source / "model", ctx.ranks, ctx.recipe.layout, ctx.say)
        model = distributed.model_of(network)
        if ctx.recipe.layout.recompute:
            model.set_recompute(ctx.recipe.layout.recompute)
        if config.style is not None:
            tokenizer.chat_style = config.style
        folder = ctx.state / "rows"
        facts = ctx.agree(lambda: sft_rows.build(_conversations(config, ctx), tokenizer, config.row_length, folder))
        rows = sft_rows.load(ctx.state / "rows", ctx.seed)
        ctx.say(_about(facts))
        monitor = _Monitor(config, ctx, tokenizer, rows.n_rows * config.row_length)
        trainer = distributed.trainer(
            network, objective.next_token, rows.batch, config, _runtime(config, rows, model, ctx), ctx.state,
            log=monitor.log, stop=lambda: ctx.stop, on_step=[monitor],
            model_config=model.cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        monitor.train(trainer)
        if ctx.leads:
            tokenizer.save(ctx.state / "tokenizer")
        distributed.save(trainer, ctx.dir / "model", ctx.state / "tokenizer")
        return {"steps": trainer.step, **{key: facts[key] for key in ("samples", "too_long", "answer_tokens")}}


def _conversations(config: SFTConfig, ctx: StageContext) -> Iterator[Document]:
    made = [ctx.inputs[name].absolute() / files.CONVERSATIONS for name in config.samples]
    specs = [*config.data, *map(str, made)]
    return itertools.chain.from_iterable(sources.documents(spec, ctx.cache, domain=spec) for spec in specs)


def _about(facts: dict[str, Any]) -> str:
    left_out = f", {facts['too_long']} longer than a row left out" if facts["too_long"] else ""
    return (
        f"{facts['samples']} conversations in {facts['rows']} rows ({facts['waste']:.1%} padding){left_out}; "
        f"{facts['answer_tokens']} of {facts['tokens']} tokens are answers"
    )


def _runtime(config: SFTConfig, rows: sft_rows.SFTRows, model: Transformer | CausalLM, ctx: StageContext) -> Runtime:
    return Runtime(
        tokens=config.epochs * rows.n_rows * config.row_length, batch_rows=sft_rows.batch_rows(rows, config),
        terms={
            "mtp_lambda": constant(config.mtp_lambda if model.cfg.n_mtp else 0.0),
            "balance_alpha": constant(config.balance_alpha),
        },
        workers=setup.workers() if ctx.ranks is None else Workers(1),
        compute_dtype=setup.set_precision(model, config, ctx.say, ctx.agree),
    )  # fmt: skip


class _Monitor(StepLog):
    """Metrics, and the prompts answered after every epoch."""

    def __init__(self, config: SFTConfig, ctx: StageContext, tokenizer: Tokenizer, epoch: int) -> None:
        super().__init__(ctx)
        self.config, self.tokenizer, self.epoch = config, tokenizer, epoch

    def __call__(self, trainer: Trainer) -> None:
        prompts = self.config.prompts if self.passed(self.epoch) else []
        if not prompts:
            return
        model = distributed.gather(trainer)
        if model is None:
            return
        encoded = [question_ids(self.tokenizer, text) for text in prompts]
        prefix = self.tokenizer.opening
        answers = Engine(model, self.tokenizer).generate(
            encoded, max_new_tokens=200, temperature=0.6, seed=self.ctx.seed
        )
        for text, (answer,) in zip(prompts, answers, strict=True):
            self.ctx.sample(trainer.step, trainer.tokens, f"{text}\n\n{prefix}{answer.text}")
