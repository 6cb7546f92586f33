"""Metrics and progress of a stage that trains, step by step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bessemer.config.units import show_tokens
from bessemer.runs.metrics import Smoothed

if TYPE_CHECKING:
    from bessemer.runs.context import StageContext
    from bessemer.train.trainer import Trainer


class StepLog:
    """Metrics and progress of a stage that trains, step by step; pass `log` to the trainer."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx = ctx
        self.tokens = self.before = 0
        """Consumed tokens after and before the last step."""
        self.loss = Smoothed()

    def begin(self, trainer: Trainer) -> None:
        """Called after `trainer.start()`, which may have gone back to a checkpoint."""
        self.tokens = self.before = trainer.tokens

    def train(self, trainer: Trainer) -> None:
        """Starts or resumes, and trains to the end; a stop signal saves and raises Interrupted."""
        ctx, resumed = self.ctx, trainer.start()
        if resumed:
            ctx.say(f"resuming at step {trainer.step}, {show_tokens(trainer.tokens)} tokens")
        ctx.rewind(trainer.step or -1)  # at step 0 `begin` writes its lines again
        ctx.progress.total(trainer.plan.tokens, "tokens", done=trainer.tokens)
        self.begin(trainer)
        if not trainer.run():
            ctx.interrupt()
        history = (values.get("train/loss") for _, values in ctx.metrics.history())
        if losses := [loss for loss in history if loss is not None]:
            smooth = Smoothed()
            ctx.say(f"loss {losses[0]:.3f} at the first step, {[*map(smooth, losses)][-1]:.3f} at the last (smoothed)")

    def log(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        self.ctx.metrics.write(step, tokens, values)
        now = values.get("train/loss", math.nan)
        loss = self.loss(now) if math.isfinite(now) else now
        rate = values.get("train/tokens_per_second", 0.0)
        self.ctx.progress.advance(tokens - self.tokens, f"smoothed loss {loss:.3f}, {rate:,.0f} tokens/s")
        self.before, self.tokens = self.tokens, tokens

    def has_passed(self, every: int) -> bool:
        """Whether the last step crossed a multiple of `every` tokens; never when `every` is 0."""
        return every > 0 and self.tokens // every > max(0, self.before) // every
