"""Samples of a stage that rank 0 runs alone, by all ranks: each has a GPU and would wait.

Rank 0 orders every call, with its prompts as token ids; the others load the same model and generate their share of the
batches, then all exchange what they have. Only for models that lie in a directory and do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from bessemer.data.tokenizer import Tokenizer
from bessemer.dist.ranks import Ranks
from bessemer.engine.engine import Engine, Prompt
from bessemer.rl.sampler import Completions, SamplingOptions, deal
from bessemer.runs.context import StageContext
from bessemer.train import setup


class DealtEngine:
    """Rank 0's: an `Engine` for what all ranks generate."""

    def __init__(self, engine: Engine, folder: Path, ranks: Ranks) -> None:
        self.engine, self.folder, self.ranks = engine, folder, ranks

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        assert not any(isinstance(prompt, str) for prompt in prompts), "stages ask in token ids"
        options.setdefault("stop_ids", self.tokenizer.stop_ids)
        listed = {name: list(value) if isinstance(value, Sequence) else value for name, value in options.items()}
        self.ranks.order(
            {"samples": str(self.folder), "prompts": [list(prompt) for prompt in prompts], "options": listed}
        )
        return deal(self.engine, self.ranks, prompts, **options)


class Helper:
    """Another rank's: what rank 0 orders. Keeps the last model until `forget`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._loaded: dict[str, Engine] = {}

    def take_part(self, order: dict[str, Any]) -> None:
        folder = order["samples"]
        if folder not in self._loaded:
            self.forget()
            self._loaded = {folder: Engine(*setup.load_to_sample(Path(folder), lambda text: None), setup.workers())}
        deal(self._loaded[folder], self.ranks, order["prompts"], **order["options"])

    def forget(self) -> None:
        self._loaded.clear()


def engine_of(folder: Path, ctx: StageContext) -> Engine | DealtEngine:
    """What generates from the model in a directory: with the ranks that wait for this stage, where they have GPUs of
    their own. On a CPU this rank has all cores already."""
    engine = Engine(*setup.load_to_sample(folder, ctx.say), setup.workers())
    if ctx.waiting is None or ctx.waiting.device.type == "cpu":
        return engine
    ctx.say(f"{ctx.waiting.n} ranks generate")
    return DealtEngine(engine, folder, ctx.waiting)
