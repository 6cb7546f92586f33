"""Pre-training with controls: what an arm is compared with, because it should learn nothing from a part of V3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bessemer.config.recipe import Recipe
from bessemer.config.training import PretrainConfig
from bessemer.data.batch import Batch
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig
from bessemer.model.protocol import LanguageModel
from bessemer.pipeline.stages.pretrain import Feed, Pretrain, Start
from bessemer.runs.context import StageContext
from bessemer.train import lineage


class ControlledConfig(PretrainConfig):
    mtp_targets: Literal["own", "other-row"] = "own"
    """Where the MTP modules' targets come from; other-row: the next row of the run, a control that teaches nothing."""
    mtp_heads: Literal["sequential", "parallel"] = "sequential"
    """parallel: the MTP module does not see the token before the one that it predicts, as the heads
    of Gloeckle et al. (2404.19737)."""
    routing: Literal["gate", "token"] = "gate"
    """What chooses a token's experts. token: a fixed random choice for every entry of the vocabulary (Roller et al.
    2021, hash layers), a control. Gates still weight the experts."""
    token_noise: float = Field(0.0, ge=0, lt=1)
    """Share of tokens in training rows that are replaced, as inputs and as targets, by tokens drawn uniformly from the
    vocabulary; a control. Held-out rows stay unchanged."""


class Controlled(Pretrain[ControlledConfig]):
    def resolve(self, config: ControlledConfig, recipe: Recipe) -> dict[str, Any]:
        facts = super().resolve(config, recipe)
        cfg = lineage.config_of(recipe, config.name)
        if config.routing == "token" and (cfg is None or config.corpus or cfg.n_dense_layers == cfg.n_layers):
            raise UserError(f'stage "{config.name}": routing = "token" is for new networks with experts')
        if config.mtp_heads == "parallel" and (cfg is None or cfg.n_mtp != 1):  # a second would see the first's state
            raise UserError(f'stage "{config.name}": mtp_heads = "parallel" is for a network with one MTP module')
        return facts

    def start(self, config: ControlledConfig, ctx: StageContext) -> Start:
        start = super().start(config, ctx)
        if config.mtp_heads == "sequential":
            return start
        if ctx.runtime.n > 1:
            raise UserError(f'stage "{ctx.name}": mtp_heads = "parallel" is for one process')
        return start._replace(network=lambda: with_parallel_head(start.network()))

    def feed(self, config: ControlledConfig, ctx: StageContext, start: Start, tokenizer: Tokenizer) -> Feed:
        if config.routing == "token" and ctx.runtime.n > 1:
            raise UserError(f'stage "{ctx.name}": routing = "token" is for one process')
        return ControlledFeed(config, ctx, start, tokenizer)


class ControlledFeed(Feed):
    def __init__(self, config: ControlledConfig, ctx: StageContext, start: Start, tokenizer: Tokenizer) -> None:
        super().__init__(config, ctx, start.corpus, start.row_length, tokenizer)
        self.controls = config
        self.table_VLK: Tensor | None = None
        if config.routing == "token" and start.cfg is not None:
            self.table_VLK = experts_by_token(start.cfg)

    def batch(self, first_row: int, n_rows: int) -> Batch:
        batch = super().batch(first_row, n_rows)
        if self.controls.mtp_targets == "other-row":  # by the run's rows: a micro-batch may have no other row
            batch.extras["mtp_tokens_BT"] = self.rows(first_row + 1, n_rows).tokens_BT
        return batch

    def rows(self, first_row: int, n_rows: int) -> Batch:
        batch, share = super().rows(first_row, n_rows), self.controls.token_noise
        if not share:
            return batch
        return with_noise(batch, share, self.seed, first_row, self.tokenizer.vocab_size, self.tokenizer.bos_id)

    def as_read(self, batch: Batch) -> Batch:
        """Also with its experts, if they are chosen by token."""
        batch = super().as_read(batch)
        if self.table_VLK is None:
            return batch
        return replace(batch, extras={**batch.extras, "choice_BTLK": self.table_VLK[batch.tokens_BT]})


def with_parallel_head(model: LanguageModel) -> LanguageModel:
    """Hides the next token from the MTP module: zeros take the place of its embedding."""
    [module] = model.mtp

    def hide(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        h_BTD, embedded_BTD, *others = inputs
        return h_BTD, torch.zeros_like(embedded_BTD), *others

    module.register_forward_pre_hook(hide)
    return model


def with_noise(batch: Batch, share: float, seed: int, first_row: int, vocab_size: int, bos_id: int | None) -> Batch:
    """Replaces a `share` of the trained tokens by random ones. Row n of the run draws from its own stream, so a larger
    share replaces the same tokens as a smaller one and more, whatever batch the row is in. BOS stays."""
    rows = []
    for row, tokens_T in enumerate(batch.tokens_BT, start=first_row):
        noise = np.random.default_rng((seed, row))
        drawn_T = torch.from_numpy(noise.random(len(tokens_T)))
        other_T = torch.from_numpy(noise.integers(vocab_size, size=len(tokens_T)))
        rows.append(torch.where(drawn_T < share, other_T, tokens_T))
    kept_BT = batch.loss_BT == 0
    if bos_id is not None:
        kept_BT |= batch.tokens_BT == bos_id
    return replace(batch, tokens_BT=torch.where(kept_BT, batch.tokens_BT, torch.stack(rows)))


def experts_by_token(cfg: ModelConfig) -> Tensor:
    """[V, L, K]: experts of every vocabulary entry in every MoE layer, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(cfg.vocab_size, cfg.n_layers - cfg.n_dense_layers, cfg.n_routed_experts, generator=generator)
    return scores.topk(cfg.n_activated_experts, dim=-1).indices
