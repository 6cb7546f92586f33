"""Stage "pretrain": next-token training with MTP and bias balancing on a mixture of packed rows (V3 4.2).

Every schedule is a function of consumed tokens. Output: model/ (a Hugging Face directory) with its tokenizer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points, show_tokens
from bessemer.data.batch import Batch
from bessemer.data.mixture import Curriculum, by_size, sections
from bessemer.data.rows import Rows, open_rows
from bessemer.data.tokenizer import Tokenizer
from bessemer.dist import distributed
from bessemer.dist.model_shard import ModelShard
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.accounting import flops_per_token
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer
from bessemer.pipeline.stage import Stage, StepLog, register
from bessemer.runs.context import StageContext
from bessemer.train import objective, setup
from bessemer.train.trainer import ONE, Runtime, Schedule, Trainer, constant
from bessemer.workers import Workers

HELDOUT_ROWS = 64
"""Rows of each source in a validation."""


class Start(NamedTuple):
    """The start of a next-token training."""

    corpus: Path
    """Folder of the documents and their tokenizer."""
    row_length: int | None
    """Of the rows to train on; None: that of the corpus."""
    cfg: ModelConfig
    """Config of the network."""
    network: Callable[[], Transformer | ModelShard]
    """Makes the network with its initial weights."""


_Config = TypeVar("_Config", bound=PretrainConfig)


@register
class Pretrain(Stage[_Config]):
    kind = "pretrain"
    distributed = True

    def resolve(self, config: _Config, recipe: Recipe) -> dict[str, Any]:
        cfg = setup.model_config(recipe, config.model)
        distributed.check(recipe, config.name, config.batch_rows.values, cfg)
        if config.fp8 != "off" and config.compile == "on":
            raise UserError(f'stage "{config.name}": compile = "on" and fp8 do not go together; set compile = "off"')
        self.check_data(config, recipe, cfg)
        return {"model": cfg.model_dump()}

    def check_data(self, config: _Config, recipe: Recipe, cfg: ModelConfig) -> None:
        check_mixture(config, config.source, recipe, cfg.max_seq_len)

    def estimate(self, config: _Config, recipe: Recipe) -> float:
        return setup.estimate_seconds(recipe, config.tokens, config.model)

    def start(self, config: _Config, ctx: StageContext) -> Start:
        """Random weights, trained on the corpus before."""
        if ctx.source is None:
            raise UserError(f'stage "{ctx.name}" needs a corpus stage before it')
        cfg = setup.model_config(ctx.recipe, config.model)
        return Start(
            ctx.source, None, cfg, lambda: distributed.fresh(cfg, ctx.seed, ctx.ranks, ctx.recipe.layout, ctx.say)
        )

    def run(self, config: _Config, ctx: StageContext) -> dict[str, Any]:
        corpus, row_length, cfg, network_of = self.start(config, ctx)
        tokenizer = Tokenizer.load(corpus / "tokenizer")
        if tokenizer.vocab_size > cfg.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, the model only {cfg.vocab_size}")
        feed = Feed(config, ctx, corpus, row_length, tokenizer.bos_id)
        setup.keep_memory()
        network = network_of()
        model = distributed.model_of(network).set_recompute(ctx.recipe.layout.recompute)
        dtype = setup.set_precision(model, config, ctx.say, ctx.agree)
        flops = config.tokens * flops_per_token(cfg, feed.row_length, mtp=cfg.n_mtp > 0).training
        if ctx.ranks is None and config.fp8 == "off" and setup.want_compile(config.compile, flops):
            ctx.say("compiling the layers (about a minute, once per machine)")
            setup.compile_layers(model)
        monitor = _Monitor(config, ctx, tokenizer, feed)
        workers = setup.workers() if ctx.ranks is None else Workers(1)
        trainer = distributed.trainer(
            network, objective.next_token, feed.batch,
            config, runtime(config, dtype, workers, feed.scale), ctx.state,
            log=monitor.log, stop=lambda: ctx.stop, on_step=[monitor], model_config=cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        feed.follow(trainer)
        monitor.train(trainer)
        last = monitor.validate(trainer)
        distributed.save(trainer, ctx.dir / "model", corpus / "tokenizer")
        if config.ema_decay:
            distributed.save(trainer, ctx.dir / "model-ema", corpus / "tokenizer", "ema")
        return {"tokens": trainer.tokens, "steps": trainer.step, **{f"bpb_{k}": round(v, 4) for k, v in last.items()}}


def runtime(config: PretrainConfig, dtype: torch.dtype, workers: Workers, row_scale: Schedule = ONE) -> Runtime:
    """The trainer's inputs besides the stage's table; `row_scale` as in `Feed`."""
    return Runtime(
        tokens=config.tokens, batch_rows=config.batch_rows, row_scale=row_scale, gamma=config.gamma,
        terms={"mtp_lambda": config.mtp_lambda, "balance_alpha": constant(config.balance_alpha)},
        workers=workers, compute_dtype=dtype,
    )  # fmt: skip


class Feed:
    """Rows for the trainer: the mixture of the recipe over the parts of a corpus."""

    def __init__(
        self, config: PretrainConfig, ctx: StageContext, corpus: Path, row_length: int | None, bos_id: int | None
    ) -> None:
        """`row_length`: of the rows that batch_rows counts and validation reads; None: that of the corpus."""
        self.config, self._bos_id = config, bos_id
        names = _parts(config, corpus)

        def opened(length: int | None, split: str = "train") -> dict[str, Rows]:
            return {name: open_rows(corpus / name, split, length, ctx.state / "rows" / name) for name in names}

        self.heldout = opened(row_length, "heldout")
        self.row_length = next(iter(self.heldout.values())).row_length
        self.scale = row_scale(config, self.row_length)

        def rows_of_step(tokens: int) -> int:
            return int(config.batch_rows(tokens) * self.scale(tokens))

        plan = sections(config.tokens, lambda tokens: self.row_length / self.scale(tokens), rows_of_step)
        weights: Mapping[str, float | Points] = config.mixture
        if config.temperature is not None:
            weights = by_size(opened(self.row_length), config.temperature)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("once")
            self._curriculum = Curriculum(plan, opened, weights, ctx.seed, config.epoch_caps)
        for one in caught[:1]:
            ctx.say(str(one.message))
        self._say(ctx, weights)
        self._tokens: Callable[[], int] = lambda: 0

    def _say(self, ctx: StageContext, weights: Mapping[str, float | Points]) -> None:
        if not self.config.mixture:
            ctx.say("mixture: " + ", ".join(f"{name} {share:.3f}" for name, share in weights.items()))
        for stretch in self._curriculum.plan if self.config.lengths else ():
            ctx.say(f"rows of {stretch.length} tokens from {show_tokens(stretch.first_token)} tokens on")
        for name, tokens in self._curriculum.ended.items():
            cap = self.config.epoch_caps[name]
            what = f"{name} has been read {cap:g} times at {show_tokens(tokens)} tokens, its cap"
            if self.config.on_cap == "refuse":
                raise UserError(
                    f'stage "{self.config.name}": {what}, before the end at {show_tokens(self.config.tokens)}; '
                    'raise its cap, lower its weight, add text, or set on_cap = "redistribute"'
                )
            ctx.say(f"{what}; the other parts take its share from there on")

    def follow(self, trainer: Trainer) -> None:
        """Take the position in the run from `trainer`."""
        self._tokens = lambda: trainer.tokens

    def batch(self, first_row: int, n_rows: int) -> Batch:
        """The trainer's `batches`."""
        batch = self._curriculum.batch(self._tokens(), first_row, n_rows)
        if not self.config.document_mask:
            return batch
        if self._bos_id is None:
            raise UserError("document_mask = true separates documents at their BOS, but this tokenizer writes none")
        return replace(batch, segments_BT=(batch.tokens_BT == self._bos_id).cumsum(1))

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Realised shares and epochs of every source so far."""
        shares = self._curriculum.realised(trainer.tokens, trainer.rows)
        epochs = self._curriculum.epochs(trainer.tokens, trainer.rows)
        return {f"data/share/{name}": share for name, share in shares.items()} | {
            f"data/epochs/{name}": times for name, times in epochs.items()
        }


def check_mixture(config: PretrainConfig, corpus_name: str | None, recipe: Recipe, longest: int) -> None:
    """UserError for an impossible mixture or impossible lengths, before anything runs. `longest` is the model's
    max_seq_len."""
    where = f'stage "{config.name}"'
    corpora = (stage for stage in recipe.stages if isinstance(stage, CorpusConfig))
    corpus = next((stage for stage in corpora if stage.name == corpus_name), None)
    if not config.mixture and config.temperature is None:
        raise UserError(f"{where}: mixture is empty; give every part of the corpus a share, or set temperature = 0.7")
    for name, weight in config.mixture.items():
        values = weight.values if isinstance(weight, Points) else [weight]
        if not (min(values) >= 0 and 0 < max(values) < math.inf):
            given = " to ".join(f"{value:g}" for value in dict.fromkeys(values))
            raise UserError(
                f"{where}: the weight of {name} is {given}; it must never be negative, and must be positive somewhere "
                "(leave the part out to use none of it)"
            )
    if config.mixture and config.temperature is not None:
        raise UserError(
            f"{where}: temperature makes the shares from the parts' sizes; leave mixture out, or temperature"
        )
    if unknown := [name for name in config.epoch_caps if config.mixture and name not in config.mixture]:
        raise UserError(f'{where}: epoch_caps names "{unknown[0]}", the mixture has {", ".join(config.mixture)}')
    if corpus is not None and (unknown := [part for part in config.mixture if part not in corpus.parts]):
        raise UserError(f'{where}: mixture names "{unknown[0]}", the corpus has {", ".join(corpus.parts)}')
    if not config.lengths:
        return
    if min(config.lengths.values) < 8 or max(config.lengths.values) > longest:
        raise UserError(f"{where}: lengths must lie between 8 and the model's max_seq_len {longest}")
    if corpus is not None:
        few = min(config.batch_rows.values) * corpus.row_length / max(config.lengths.values)
        if few < 1:
            raise UserError(
                f"{where}: a step of {min(config.batch_rows.values):g} rows of {corpus.row_length} tokens is less "
                f"than one row of {max(config.lengths.values):g}; raise batch_rows"
            )


def row_scale(config: PretrainConfig, row_length: int) -> Callable[[float], float]:
    """Factor on batch_rows over consumed tokens: above 1 where rows are shorter than `row_length`."""
    lengths = config.lengths
    return (lambda tokens: row_length / lengths(tokens)) if lengths else (lambda tokens: 1.0)


def _parts(config: PretrainConfig, corpus: Path) -> Sequence[str]:
    if config.mixture:
        return list(config.mixture)
    return sorted(folder.name for folder in corpus.iterdir() if (folder / "meta.json").is_file())


class _Monitor(StepLog):
    """Output of the training for people: metrics, held-out bits per byte, samples."""

    def __init__(
        self, config: PretrainConfig, ctx: StageContext, tokenizer: Tokenizer, feed: Feed,
    ) -> None:  # fmt: skip
        super().__init__(ctx)
        self.config, self.tokenizer, self.feed = config, tokenizer, feed
        self.heldout = {name: rows for name, rows in feed.heldout.items() if rows.n_rows}

    def begin(self, trainer: Trainer) -> None:
        super().begin(trainer)
        self.trainer = trainer

    def __call__(self, trainer: Trainer) -> None:
        if self.passed(self.config.validate_every):
            self.validate(trainer)
        first = self.before < self.config.first_sample <= self.tokens
        if first or self.passed(self.config.sample_every):
            self.samples(trainer)

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """Held-out bits per byte of every source (at most HELDOUT_ROWS rows each)."""
        bits = self._bits_per_byte(trainer)
        values: dict[str, Any] = {f"val/bpb/{name}": value for name, value in bits.items()}
        if self.config.ema_decay:
            with trainer.optimizer.averaged():
                values |= {f"val/bpb_ema/{name}": value for name, value in self._bits_per_byte(trainer).items()}
        values |= self.feed.metrics(trainer)
        values.update({f"moe/load/{name}": load / load.sum() for name, load in trainer.loads.items() if load.any()})
        self.ctx.metrics.write(trainer.step, trainer.tokens, values)
        return bits

    def _bits_per_byte(self, trainer: Trainer) -> dict[str, float]:
        if self.ctx.ranks is None:
            sums = trainer.runtime.workers.map(self._nats, self.heldout)
        else:
            sums = (distributed.nats(trainer, _heldout_batches(rows)) for rows in self.heldout.values())
        return {
            name: nats / tokens / math.log(2) / rows.bytes_per_token
            for (name, rows), (nats, tokens) in zip(self.heldout.items(), sums, strict=True)
        }

    def _nats(self, name: str) -> tuple[float, float]:
        return distributed.nats(self.trainer, _heldout_batches(self.heldout[name]))

    def samples(self, trainer: Trainer) -> None:
        if not self.config.prompts:
            return
        model = distributed.gather(trainer)
        if model is None:
            return
        engine = Engine(model, self.tokenizer)
        answers = engine.generate(
            self.config.prompts, max_new_tokens=80, temperature=0.8, top_p=0.95, seed=self.ctx.seed
        )
        for text, (answer,) in zip(self.config.prompts, answers, strict=True):
            self.ctx.sample(trainer.step, trainer.tokens, text + answer.text)
            line = (text + answer.text).replace("\n", " / ")
            self.ctx.say(f"sample at {show_tokens(trainer.tokens)} tokens: {line[:160]}")


def _heldout_batches(rows: Rows) -> list[Batch]:
    n_rows = min(HELDOUT_ROWS, rows.n_rows)
    return [rows.batch(range(start, min(start + 16, n_rows))) for start in range(0, n_rows, 16)]
