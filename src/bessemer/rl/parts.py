"""What a loop offers to its components and to its sampler."""

from __future__ import annotations

from typing import Any, Protocol

from bessemer.config.rl import RLConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.runs.context import StageContext
from bessemer.train.runtime import SampleCarrier, Whole
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers


class LoopParts(Protocol):
    settings: RLConfig
    ctx: StageContext
    workers: Workers

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def trainer(self) -> Trainer: ...

    @property
    def generator(self) -> Any:
        """The `RolloutGenerator`; complete once all components are made."""
        ...

    def cap(self) -> int:
        """Longest completion at this step, in tokens."""
        ...

    @property
    def policy(self) -> Whole:
        """The trainer's whole network."""
        ...

    @property
    def sampler_model(self) -> Whole:
        """The weights that sample."""
        ...

    @property
    def carrier(self) -> SampleCarrier | None:
        """Given if samples stay on their rank (`apart`)."""
        ...
