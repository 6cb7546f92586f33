"""Stage "pretrain": next-token training with MTP and bias balancing on a mixture of packed rows (V3 4.2).

Every schedule is a function of consumed tokens. Output: model/ (a Hugging Face directory) with its tokenizer.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bessemer.config.recipe import Recipe
from bessemer.config.training import PretrainConfig
from bessemer.config.units import show_tokens
from bessemer.data.batch import Batch
from bessemer.data.rows import Rows
from bessemer.data.tokenizer import Tokenizer
from bessemer.dist import distributed
from bessemer.dist.model_shard import ModelShard
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.accounting import flops_per_token
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import RECOMPUTES_ITSELF, Transformer
from bessemer.pipeline import feed
from bessemer.pipeline.stage import Stage, StepLog, register
from bessemer.precision import backends
from bessemer.precision.fp8_linear import FP8_RECIPES
from bessemer.runs.context import StageContext
from bessemer.train import objective, setup
from bessemer.train.trainer import ONE, Runtime, Trainer, constant
from bessemer.workers import Workers

HELDOUT_ROWS = 64
"""Of each part, at every validation."""


class Begins(NamedTuple):
    """What a next-token training starts from."""

    corpus: Path
    """Folder of the documents and their tokenizer."""
    row_length: int | None
    """Of the rows to train on; None: what the corpus was built for."""
    cfg: ModelConfig
    """Of the network that is trained, and left."""
    network: Callable[[], Transformer | ModelShard]
    """Makes it, with its first weights."""


@register
class Pretrain(Stage):
    kind = "pretrain"
    distributed = True

    def resolve(self, config: PretrainConfig, recipe: Recipe) -> dict[str, Any]:
        cfg = setup.model_config(recipe, config.model)
        distributed.check(recipe, config.name, config.batch_rows.values, cfg)
        if config.fp8 != "off" and config.compile == "on":
            raise UserError(f'stage "{config.name}": compile = "on" and fp8 do not go together; set compile = "off"')
        if config.fp8 != "off" and recipe.layout.recompute:
            raise UserError(f'stage "{config.name}": {RECOMPUTES_ITSELF}')
        self.check_feed(config, recipe, cfg)
        return {"model": cfg.model_dump()}

    def check_feed(self, config: PretrainConfig, recipe: Recipe, cfg: ModelConfig) -> None:
        feed.check(config, config.source, recipe, cfg.max_seq_len)

    def estimate(self, config: PretrainConfig, recipe: Recipe) -> float:
        return setup.estimate_seconds(recipe, config.tokens, config.model)

    def begins(self, config: PretrainConfig, ctx: StageContext) -> Begins:
        """Random weights, trained on the corpus before."""
        if ctx.source is None:
            raise UserError(f'stage "{ctx.name}" needs a corpus stage before it')
        cfg = setup.model_config(ctx.recipe, config.model)
        return Begins(
            ctx.source, None, cfg, lambda: distributed.fresh(cfg, ctx.seed, ctx.ranks, ctx.recipe.layout, ctx.say)
        )

    def run(self, config: PretrainConfig, ctx: StageContext) -> dict[str, Any]:
        corpus, row_length, cfg, network_of = self.begins(config, ctx)
        tokenizer = Tokenizer.load(corpus / "tokenizer")
        if tokenizer.vocab_size > cfg.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, the model only {cfg.vocab_size}")
        fed = feed.Feed(config, ctx, corpus, row_length, tokenizer.bos_id)
        choice = setup.choose_precision(config.precision, ctx.agree)
        ctx.say(f"compute in {choice.why}")
        setup.keep_memory()
        network = network_of()
        model = distributed.model_of(network).set_recompute(ctx.recipe.layout.recompute)
        if config.fp8 != "off":
            model.set_fp8(FP8_RECIPES[config.fp8])
            served = backends.summary(backends.table(setup.device()))
            ctx.say(f"matrices of attention, FFN and experts in FP8 ({config.fp8}), {served}")
        flops = config.tokens * flops_per_token(cfg, fed.row_length, mtp=cfg.n_mtp > 0).training
        if ctx.ranks is None and config.fp8 == "off" and setup.want_compile(config.compile, flops):
            ctx.say("compiling the layers (about a minute, once per machine)")
            setup.compile_layers(model)
        watch = _Watch(config, ctx, tokenizer, fed)
        workers = setup.workers() if ctx.ranks is None else Workers(1)
        trainer = distributed.trainer(
            network, objective.next_token, fed.batch,
            config, runtime(config, choice.dtype, workers, fed.scale), ctx.state,
            log=watch.log, stop=lambda: ctx.stop, on_step=[watch], model_config=cfg.model_dump(), warn=ctx.say,
        )  # fmt: skip
        fed.follow(trainer)
        resumed = trainer.start()
        if resumed:
            ctx.say(f"going on from step {trainer.step}, {show_tokens(trainer.tokens)} tokens")
        ctx.rewind(trainer.step if resumed else -1)
        ctx.progress.total(config.tokens, "tokens", done=trainer.tokens)
        watch.begin(trainer)
        if not trainer.run():
            ctx.interrupt()
        last = watch.validate(trainer)
        distributed.save(trainer, ctx.dir / "model", corpus / "tokenizer")
        if config.ema_decay:
            distributed.save(trainer, ctx.dir / "model-ema", corpus / "tokenizer", "ema")
        return {"tokens": trainer.tokens, "steps": trainer.step, **{f"bpb_{k}": round(v, 4) for k, v in last.items()}}


def runtime(
    config: PretrainConfig, dtype: torch.dtype, workers: Workers, row_scale: Callable[[float], float] = ONE
) -> Runtime:
    """What the trainer needs besides the stage's table; `row_scale` as in `feed.scale`."""
    return Runtime(
        tokens=config.tokens, batch_rows=config.batch_rows, row_scale=row_scale, gamma=config.gamma,
        terms={"mtp_lambda": config.mtp_lambda, "balance_alpha": constant(config.balance_alpha)},
        workers=workers, compute_dtype=dtype,
    )  # fmt: skip


class _Watch(StepLog):
    """What a person sees of the training: metrics, held-out bits per byte, samples."""

    def __init__(
        self, config: PretrainConfig, ctx: StageContext, tokenizer: Tokenizer, fed: feed.Feed,
    ) -> None:  # fmt: skip
        super().__init__(ctx)
        self.config, self.tokenizer, self.fed = config, tokenizer, fed
        self.heldout = {name: rows for name, rows in fed.heldout.items() if rows.n_rows}

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
        """Held-out bits per byte of every part (at most HELDOUT_ROWS rows each)."""
        found = self._bits_per_byte(trainer)
        values: dict[str, Any] = {f"val/bpb/{name}": value for name, value in found.items()}
        if self.config.ema_decay:
            with trainer.optimizer.averaged():
                values |= {f"val/bpb_ema/{name}": value for name, value in self._bits_per_byte(trainer).items()}
        values |= self.fed.figures(trainer)
        values.update({f"moe/load/{name}": load / load.sum() for name, load in trainer.loads.items() if load.any()})
        self.ctx.metrics.write(trainer.step, trainer.tokens, values)
        return found

    def _bits_per_byte(self, trainer: Trainer) -> dict[str, float]:
        if self.ctx.ranks is None:
            sums = trainer.runtime.workers.map(self._nats, self.heldout)
        else:
            sums = (distributed.nats(trainer, _lots(rows)) for rows in self.heldout.values())
        return {
            name: nats / tokens / math.log(2) / rows.bytes_per_token
            for (name, rows), (nats, tokens) in zip(self.heldout.items(), sums, strict=True)
        }

    def _nats(self, name: str) -> tuple[float, float]:
        return distributed.nats(self.trainer, _lots(self.heldout[name]))

    def samples(self, trainer: Trainer) -> None:
        if not self.config.prompts:
            return
        model = distributed.gather(trainer)
        if model is None:
            return
        engine = Engine(model, self.tokenizer)
        prompts = [[self.tokenizer.bos_id, *self.tokenizer.encode(text)] for text in self.config.prompts]
        answers = engine.generate(prompts, max_new_tokens=80, temperature=0.8, top_p=0.95, seed=self.ctx.seed)
        for text, (answer,) in zip(self.config.prompts, answers, strict=True):
            self.ctx.sample(trainer.step, trainer.tokens, text + answer.text)
            shown = (text + answer.text).replace("\n", " / ")
            self.ctx.say(f"sample at {show_tokens(trainer.tokens)} tokens: {shown[:160]}")


def _lots(rows: Rows) -> list[Batch]:
    n_rows = min(HELDOUT_ROWS, rows.n_rows)
    return [rows.batch(range(start, min(start + 16, n_rows))) for start in range(0, n_rows, 16)]
