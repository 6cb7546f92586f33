"""Stage "pretrain": next-token training with MTP and bias balancing on a mixture of packed rows (V3 4.2).

Every schedule is a function of consumed tokens. Output: model/ (a Hugging Face directory) with its tokenizer.

With a `corpus` it trains the model of `from` further: one of ours, with its MTP modules and routing biases, or one of
another family. The optimizer and its schedules restart at 0 tokens. The held-out loss is also measured before the first
step, to show what the new data costs on the old.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bessemer import plugins
from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig, is_changed
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points, show_tokens
from bessemer.data.batch import Batch
from bessemer.data.mixture import Curriculum, by_size, sections
from bessemer.data.rows import Rows, open_rows
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import own_config
from bessemer.model.config import ModelConfig
from bessemer.model.protocol import LanguageModel
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.training_inputs import check_mixture, check_stages, model_and_corpus
from bessemer.pipeline.work import TRAINED, StageWork
from bessemer.runs.context import StageContext
from bessemer.runs.step_log import StepLog
from bessemer.train import lineage, objective, setup
from bessemer.train.plan import ONE, ZERO, Schedule, TrainingPlan, constant
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

HELDOUT_ROWS = 64
"""Rows of each source in a validation."""
SAMPLED = 100
"""Tokens of a continuation, about."""


class Start(NamedTuple):
    """The start of a next-token training."""

    corpus: Path
    """Folder of the documents and their tokenizer."""
    row_length: int | None
    """Length of the rows to train on; None: that of the corpus."""
    cfg: ModelConfig | None
    """Config of the network; None for another family, whose network holds it."""
    network: Callable[[], LanguageModel]
    """Makes the network with its initial weights."""
    model: Path | None = None
    """The model directory to train further, whose tokenizer files the result gets; None: random weights."""


_Config = TypeVar("_Config", bound=PretrainConfig)


class Pretrain(Stage[_Config]):
    distributed = True

    def resolve(self, config: _Config, recipe: Recipe) -> dict[str, Any]:
        check_stages(config, recipe)
        cfg = lineage.config_of(recipe, config.name)
        if cfg is not None and config.prompts:
            cfg.require_latent(f'stage "{config.name}": the engine that samples its prompts')
        if cfg is not None and config.fp8 != "off":
            cfg.require_latent(f'stage "{config.name}": training in FP8')
        setup.check_layout(recipe, config.name, config.batch_rows.values, cfg)
        if config.fp8 != "off" and config.compile == "on":
            raise UserError(f'stage "{config.name}": compile = "on" and fp8 cannot be combined; set compile = "off"')
        self.check_data(config, recipe, preflight.context_of(recipe, config.name))
        return {} if cfg is None or config.corpus else {"model": cfg.model_dump()}

    def check_data(self, config: _Config, recipe: Recipe, longest: int | None) -> None:
        check_mixture(config, config.corpus or config.source, recipe, longest)

    def probes(self, config: _Config, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        corpus = recipe.stage(config.corpus or config.source or config.name)
        if isinstance(corpus, CorpusConfig) and config.kind == "pretrain":
            what = f'row_length of "{corpus.name}"'
            model = config.source if config.corpus else config.name
            yield from preflight.length_probes(config, recipe, [model], what, corpus.row_length)
            yield partial(beyond_budget, config.tokens, corpus.row_length, config.batch_rows)

    def work(self, config: _Config, recipe: Recipe) -> list[StageWork]:
        """Training, the held-out rows of every part at every validation, continuations, loading and saving."""
        corpus = recipe.stage(config.corpus or config.source or config.name)
        length = self.row_length(config, corpus)
        parts = len(config.mixture) or len(getattr(corpus, "parts", ()))
        between = config.tokens // config.validate_every if config.validate_every else 0
        heldout = (
            (1 + (config.corpus is not None) + between) * parts * HELDOUT_ROWS * length * (2 if config.ema_decay else 1)
        )
        n_shown = 1 + (config.tokens // config.sample_every if config.sample_every else 0)
        return [
            StageWork(
                config.name, trained=config.tokens, read=heldout, sampled=n_shown * len(config.prompts) * SAMPLED,
                length=length, bytes=TRAINED,
            )
        ]  # fmt: skip

    def row_length(self, config: _Config, corpus: StageConfig) -> int:
        """Tokens of its rows; `corpus`: the stage they come from."""
        return getattr(corpus, "row_length", 256)

    def start(self, config: _Config, ctx: StageContext) -> Start:
        """Random weights to train on the preceding corpus, or an earlier model to train further."""
        if config.corpus is not None:
            return self._go_on(config, ctx, config.corpus)
        assert ctx.source is not None, "check_stages has checked it"
        cfg = setup.model_config(ctx.recipe, config.model)
        corpus = ctx.recipe.stage(config.source or "")
        owner = corpus.tokenizer if isinstance(corpus, CorpusConfig) else None
        hint = f'; to train the model of "{owner}" further: from = "{owner}", corpus = "{corpus.name}"'
        is_model = owner is not None and ctx.recipe.stage(owner).makes_model
        ctx.say("the weights are random" + (hint if is_model else ""))
        seed = ctx.seed if config.weights_seed is None else config.weights_seed
        return Start(ctx.source, None, cfg, lambda: ctx.runtime.fresh(cfg, seed))

    def _go_on(self, config: _Config, ctx: StageContext, corpus: str) -> Start:
        folder, at = model_and_corpus(ctx, corpus)
        cfg = own_config(folder)
        has_mtp = f", MTP depth {cfg.n_mtp}" if cfg is not None and cfg.n_mtp else ""
        warm = config.warmup_steps or config.lr.values[0] < max(config.lr.values)
        ctx.say(
            f'the weights of "{config.source}"{has_mtp}; the optimizer starts fresh, the learning rate '
            + (f"rises again to {max(config.lr.values):g}" if warm else f"at {config.lr(0):g} without a warm-up")
        )
        return Start(at, None, cfg, lambda: ctx.runtime.read(folder)[0], folder)

    def feed(self, config: _Config, ctx: StageContext, start: Start, tokenizer: Tokenizer) -> Feed:
        """The rows of the training."""
        return Feed(config, ctx, start.corpus, start.row_length, tokenizer)

    def run(self, config: _Config, ctx: StageContext) -> dict[str, Any]:
        start = self.start(config, ctx)
        tokenizer = load_tokenizer(start.corpus / "tokenizer")
        feed = self.feed(config, ctx, start, tokenizer)
        setup.keep_memory()
        model = start.network()
        cfg = start.cfg or model.cfg
        if tokenizer.vocab_size > cfg.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, but the model only {cfg.vocab_size}")
        if feed.row_length > cfg.max_seq_len:
            raise UserError(f"the rows have {feed.row_length} tokens, the model reads {cfg.max_seq_len}; shorten them")
        setup.recompute(model, ctx.recipe.layout, ctx.say)
        compiler, compiled, layers = plugins.hook("compile"), False, ctx.runtime.layers(model)
        if config.compile == "on" and (compiler is None or not model.layers):
            reason = "is for models of the DeepSeek V3 family" if compiler else "needs the add-on accelerate"
            raise UserError(f'stage "{ctx.name}": compile = "on" {reason}; leave it out')
        if compiler and layers and config.fp8 == "off":
            flops = model.training_flops(feed.row_length, model.cfg.n_mtp > 0) or 0.0
            compiled = compiler(config.compile, layers, config.tokens * flops, ctx.say)
        dtype = setup.set_precision(model, config, ctx.say_once, ctx.state, ctx.agree, compiled)
        monitor = _Monitor(config, ctx, tokenizer, feed, goes_on=start.model is not None)
        workers = ctx.runtime.workers()
        trainer = ctx.runtime.trainer(
            model, objective.next_token, feed.batch,
            config, training_plan(config, dtype, workers, feed.scale, model), ctx.state,
            log=monitor.log, stop=lambda: ctx.stop, on_step=[monitor], model_config=cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        feed.follow(trainer)
        monitor.train(trainer)
        last = monitor.validate(trainer, at_end=True)
        files = start.model or start.corpus / "tokenizer"
        ctx.runtime.save(trainer, ctx.dir / "model", files)
        if config.ema_decay:
            ctx.runtime.save(trainer, ctx.dir / "model-ema", files, "ema")
        return {"tokens": trainer.tokens, "steps": trainer.step, **{f"bpb_{k}": round(v, 4) for k, v in last.items()}}


def training_plan(
    config: PretrainConfig, dtype: torch.dtype, workers: Workers, row_scale: Schedule = ONE,
    model: LanguageModel | None = None,
) -> TrainingPlan:  # fmt: skip
    """The trainer's inputs other than the stage's table; `row_scale` as in `Feed`. A `model` without MTP modules or
    routing biases is trained without their terms."""
    foreign = model is not None and not model.layers
    return TrainingPlan(
        tokens=config.tokens, batch_rows=config.batch_rows, row_scale=row_scale,
        gamma=ZERO if foreign and not is_changed(config, "gamma") else config.gamma,
        terms={
            "mtp_lambda": config.mtp_lambda if model is None or model.cfg.n_mtp else ZERO,
            "balance_alpha": constant(config.balance_alpha),
        },
        workers=workers, compute_dtype=dtype, idle=() if max(config.mtp_lambda.values) else ("mtp.",),
    )  # fmt: skip


def beyond_budget(tokens: int, row_length: int, batch_rows: Callable[[float], float]) -> str | None:
    """A line if the last whole step goes more than 1 % beyond a budget of `tokens`; `batch_rows` as in the recipe."""
    done, steps = 0, 0
    while done < tokens and steps < 10_000:  # with more steps than that the last one is no hundredth of them
        done, steps = done + int(batch_rows(done)) * row_length, steps + 1
    if done <= 1.01 * tokens:
        return None
    return (
        f"steps are whole: {steps} of them train on {show_tokens(done)} tokens where the budget is "
        f"{show_tokens(tokens)}; lower batch_rows to come closer"
    )


class Feed:
    """Rows for the trainer: the mixture of the recipe over the parts of a corpus."""

    def __init__(
        self, config: PretrainConfig, ctx: StageContext, corpus: Path, row_length: int | None, tokenizer: Tokenizer
    ) -> None:
        """`row_length`: length of the rows that batch_rows counts and validation reads; None: that of the corpus."""
        self.config, self.tokenizer, self.seed = config, tokenizer, ctx.seed
        names = _parts(config, corpus)

        def opened(length: int | None, split: str = "train") -> dict[str, Rows]:
            return {name: open_rows(corpus / name, split, length, ctx.state / "rows" / name) for name in names}

        self.heldout = opened(row_length, "heldout")
        self.row_length = next(iter(self.heldout.values())).row_length
        if bare := [name for name, rows in self.heldout.items() if not rows.n_rows]:
            ctx.say(
                f"no document of {', '.join(bare)} is held out, so its loss is not measured; for few, long documents "
                "raise heldout in the corpus stage"
            )
        self.scale = row_scale(config, self.row_length)

        def rows_of_step(tokens: int) -> int:
            return int(config.batch_rows(tokens) * self.scale(tokens))

        if line := beyond_budget(config.tokens, self.row_length, config.batch_rows):
            ctx.say(line)
        plan = sections(config.tokens, config.lengths or (lambda tokens: self.row_length), rows_of_step)
        weights: Mapping[str, float | Points] = config.mixture or dict.fromkeys(names, 1.0)
        if config.temperature is not None:
            weights = by_size(opened(self.row_length), config.temperature)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("once")
            self._curriculum = Curriculum(plan, opened, weights, ctx.seed, config.epoch_caps)
        for warning in caught[:1]:
            ctx.say(str(warning.message))
        self._say(ctx, weights)
        self._tokens: Callable[[], int] = lambda: 0

    def _say(self, ctx: StageContext, weights: Mapping[str, float | Points]) -> None:
        if not self.config.mixture and len(weights) > 1:
            ctx.say("mixture: " + ", ".join(f"{name} {share:.3f}" for name, share in weights.items()))
        for stretch in self._curriculum.plan if self.config.lengths else ():
            ctx.say(f"rows of {stretch.length} tokens from {show_tokens(stretch.first_token)} tokens on")
        for name, tokens in self._curriculum.ended.items():
            cap = self.config.epoch_caps[name]
            limit = f"{name} has been read {cap:g} times at {show_tokens(tokens)} tokens, its cap"
            ctx.say(f"{limit}; the other parts take its share from there on")

    def follow(self, trainer: Trainer) -> None:
        """Takes the position in the run from `trainer`."""
        self._tokens = lambda: trainer.reading

    def batch(self, first_row: int, n_rows: int) -> Batch:
        """The trainer's `batches`."""
        return self.as_read(self.rows(first_row, n_rows))

    def validation(self, name: str) -> list[Batch]:
        """The held-out rows of a source that a validation reads, in the form that training gives its rows."""
        rows = self.heldout[name]
        n_rows = min(HELDOUT_ROWS, rows.n_rows)
        masked = self.config.document_mask
        return [self.as_read(rows.batch(range(i, min(i + 16, n_rows)), masked)) for i in range(0, n_rows, 16)]

    def rows(self, first_row: int, n_rows: int) -> Batch:
        """Rows of the run, as the curriculum orders them."""
        return self._curriculum.batch(self._tokens(), first_row, n_rows, self.config.document_mask)

    def as_read(self, batch: Batch) -> Batch:
        """The batch as the network reads it. If the stage masks documents, the first token of a piece without a BOS is
        not predicted: what precedes it in its row is another document's."""
        if batch.segments_BT is not None:
            begins_BT = batch.segments_BT.diff(dim=1, prepend=batch.segments_BT[:, :1]) != 0
            foreign_BT = begins_BT & (batch.tokens_BT != self.tokenizer.bos_id)
            return replace(batch, loss_BT=batch.loss_BT.masked_fill(foreign_BT, 0.0))
        return batch

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Realised shares and epochs of every source so far."""
        shares = self._curriculum.realised(trainer.tokens, trainer.rows)
        epochs = self._curriculum.epochs(trainer.tokens, trainer.rows)
        return {f"data/share/{name}": share for name, share in shares.items()} | {
            f"data/epochs/{name}": times for name, times in epochs.items()
        }


def row_scale(config: PretrainConfig, row_length: int) -> Callable[[float], float]:
    """Factor on batch_rows over consumed tokens: above 1 while rows are shorter than `row_length`."""
    lengths = config.lengths
    return (lambda tokens: row_length / lengths(tokens)) if lengths else (lambda tokens: 1.0)


def _parts(config: PretrainConfig, corpus: Path) -> Sequence[str]:
    if config.mixture:
        return list(config.mixture)
    return sorted(folder.name for folder in corpus.iterdir() if (folder / "meta.json").is_file())


class _Monitor(StepLog):
    """Output of the training for people: metrics, held-out bits per byte, samples."""

    def __init__(
        self, config: PretrainConfig, ctx: StageContext, tokenizer: Tokenizer, feed: Feed, goes_on: bool = False,
    ) -> None:  # fmt: skip
        """`goes_on`: the weights are an earlier model's, worth measuring before the first step."""
        super().__init__(ctx)
        self.goes_on = goes_on
        self.config, self.tokenizer, self.feed = config, tokenizer, feed
        self.heldout = {name: rows for name, rows in feed.heldout.items() if rows.n_rows}

    def begin(self, trainer: Trainer) -> None:
        super().begin(trainer)
        self.trainer = trainer
        if self.goes_on and trainer.step == 0:
            bits = self.validate(trainer)
            self.ctx.say("held-out bits per byte at the start: " + ", ".join(f"{k} {v:.4f}" for k, v in bits.items()))

    def __call__(self, trainer: Trainer) -> None:
        if self.has_passed(self.config.validate_every):
            self.validate(trainer)
        first = self.before < self.config.first_sample <= self.tokens
        if first or self.has_passed(self.config.sample_every):
            self.samples(trainer)

    def validate(self, trainer: Trainer, at_end: bool = False) -> dict[str, float]:
        """Held-out bits per byte of every source (at most HELDOUT_ROWS rows each). `at_end`: written unless the last
        step has a line already, from its hook or an attempt that was killed after it."""
        bits = self._bits_per_byte(trainer)
        values: dict[str, Any] = {f"val/bpb/{name}": value for name, value in bits.items()}
        if self.config.ema_decay:
            with trainer.optimizer.averaged():
                values |= {f"val/bpb_ema/{name}": value for name, value in self._bits_per_byte(trainer).items()}
        values |= self.feed.metrics(trainer)
        values.update({f"moe/load/{name}": load / load.sum() for name, load in trainer.loads.items() if load.any()})
        first = f"val/bpb/{next(iter(bits), None)}"
        if not (at_end and any(step == trainer.step and first in line for step, line in self.ctx.metrics.history())):
            self.ctx.metrics.write(trainer.step, trainer.tokens, values)
        return bits

    def _bits_per_byte(self, trainer: Trainer) -> dict[str, float]:
        sums = trainer.plan.workers.map(self._nats, self.heldout)
        return {
            name: nats / tokens / math.log(2) / rows.bytes_per_token
            for (name, rows), (nats, tokens) in zip(self.heldout.items(), sums, strict=True)
        }

    def _nats(self, name: str) -> tuple[float, float]:
        return self.trainer.collective.nats(self.feed.validation(name))

    def samples(self, trainer: Trainer) -> None:
        if not self.config.prompts:
            return
        model = self.ctx.runtime.gather(trainer)
        self.ctx.once(lambda: self._continue(model, trainer))  # ranks wait while rank 0 samples

    def _continue(self, model: LanguageModel | None, trainer: Trainer) -> None:
        assert model is not None, "rank 0 has it"
        engine = Engine(model, self.tokenizer)
        answers = engine.generate(
            self.config.prompts, max_new_tokens=80, temperature=0.8, top_p=0.95, seed=self.ctx.seed
        )
        for text, (answer,) in zip(self.config.prompts, answers, strict=True):
            self.ctx.sample(trainer.step, trainer.tokens, text + answer.text)
            line = (text + answer.text).replace("\n", " / ")
            self.ctx.say(f"sample at {show_tokens(trainer.tokens)} tokens: {line[:160]}")
