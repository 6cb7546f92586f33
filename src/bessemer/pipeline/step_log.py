"""What every stage that trains shows of each step."""

from __future__ import annotations

import math
from typing import Any

from bessemer.runs.context import StageContext
from bessemer.train.trainer import Trainer


class StepLog:
    """Metrics and progress, step by step; `log` is the trainer's. Knows which marks the last step passed."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx = ctx
        self.tokens = self.before = 0
        """Consumed tokens after and before the last step."""

    def begin(self, trainer: Trainer) -> None:
        """After `trainer.start()`, which may have gone back to a checkpoint."""
        self.tokens = self.before = trainer.tokens

    def log(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        self.ctx.metrics.write(step, tokens, values)
        loss = values.get("train/loss", math.nan)
        rate = values.get("train/tokens_per_second", 0.0)
        self.ctx.progress.advance(tokens - self.tokens, f"loss {loss:.3f}, {rate:,.0f} tokens/s")
        self.before, self.tokens = self.tokens, tokens

    def passed(self, every: int) -> bool:
        """Whether the last step passed a multiple of so many tokens; never when `every` is 0."""
        return every > 0 and self.tokens // every > max(0, self.before) // every
