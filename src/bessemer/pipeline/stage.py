"""The skeleton every stage shares, what it is handed, and the register of kinds.

A stage is one file in `recipe/stages/`, found by walking that folder:

    @register
    class Pretrain(Stage):
        kind = "pretrain"

        config = PretrainConfig

        def run(self, settings, ctx):
            step = ...                      # load ctx.state if it holds a checkpoint
            ctx.rewind(step)                # metrics, samples and rollouts as they were at that step
            ctx.progress.total(settings.tokens, "tokens", done=...)
            while ...:
                ctx.metrics.write(step, tokens, {"train/loss": loss})
                ctx.progress.advance(tokens_of_step, f"loss {loss:.3f}")
                if ctx.stop:
                    ...                     # save to ctx.state
                    ctx.interrupt()
            return {"tokens": tokens, "loss": loss}

Invariants: a stage reads its inputs and writes inside `ctx.dir` only. What it needs to go on after a kill lies in
`ctx.state`; everything else it leaves in `ctx.dir` is its output, hashed when it ends. Same settings, seed and inputs
give the same output, whether or not it was killed on the way.
"""

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bessemer.config.recipe import Recipe
from bessemer.config.stages import STAGES
from bessemer.config.table import StageConfig
from bessemer.runs import conversations
from bessemer.runs.context import StageContext
from bessemer.runs.record import RUN_FORMAT
from bessemer.tasks import Problem


class Stage:
    """One step of a recipe: input directories in, one output directory out."""

    kind: ClassVar[str]
    config: ClassVar[type[StageConfig]] = StageConfig
    """The keys of its table."""
    format: ClassVar[int] = 1
    """Raise it when the stage writes something else than before for the same settings: old output is then redone."""
    uses_model: ClassVar[bool] = True
    """Whether the recipe's [model] table changes what this stage makes."""
    uses_seed: ClassVar[bool] = True
    """Whether the recipe's seed changes what this stage makes."""
    across: ClassVar[bool] = False
    """Whether all ranks run it together; otherwise rank 0 does, alone."""

    def resolve(self, settings: Any, recipe: Recipe) -> dict[str, Any]:
        """Check settings against the recipe before anything runs (UserError), and return facts derived from them.

        The facts are plain JSON; they count as settings, so a preset that changes in the code redoes the stage.
        """
        return {}

    def identity(
        self, settings: StageConfig, recipe: Recipe, derived: dict[str, Any], inputs: dict[str, str]
    ) -> dict[str, Any]:
        """Everything the output of this stage follows from; `inputs` maps the stages it reads to their fingerprints."""
        what = {
            "format": [RUN_FORMAT, self.kind, self.format],
            "settings": settings.fingerprint_values(),
            "seed": recipe.seed_of(settings) if self.uses_seed else None,
            "model": recipe.model if self.uses_model else None,
            "derived": derived,
            "inputs": inputs,
        }
        return json.loads(json.dumps(what))  # as it reads back from disk, tuples and all

    def estimate(self, settings: Any, recipe: Recipe) -> float:
        """Rough seconds on two CPU cores: only for the whole run's time left, corrected by what the run measures."""
        return 30.0

    def run(self, settings: Any, ctx: StageContext) -> dict[str, Any]:
        """Do the work; return the facts worth a line in the summary."""
        raise NotImplementedError

    def leaves_conversations(self, settings: Any) -> bool:
        """Whether it leaves a file of `conversations` for SFT with these settings."""
        return False

    def shown(self, settings: Any, recipe: Recipe, folder: Path, cache: Path) -> Iterator[Problem | str]:
        """What a model can have learnt from this finished stage: training texts, and problems it was asked.

        The contamination check of evaluation reads it. Here: the conversations that the stage leaves.
        """
        if self.leaves_conversations(settings):
            yield from conversations.texts(folder)


KINDS: dict[str, type[Stage]] = {}
_StageType = TypeVar("_StageType", bound=type[Stage])


def register(stage: _StageType) -> _StageType:
    """Class decorator: make `kind = "..."` in a recipe mean this stage."""
    known = KINDS.get(stage.kind)
    assert known is None or known.__qualname__ == stage.__qualname__, f"two stages of kind {stage.kind}"
    KINDS[stage.kind] = stage
    STAGES.setdefault(stage.kind, stage.config)
    return stage


def load_kinds() -> dict[str, type[Stage]]:
    """Every kind there is: each file of `pipeline/stages/` registers its own when imported."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "stages")]):
        importlib.import_module(f"bessemer.pipeline.stages.{module.name}")
    return KINDS


def find_kind(kind: str) -> type[Stage]:
    """The stage of a kind that a recipe names, and that reading the recipe has found to exist."""
    return (KINDS if kind in KINDS else load_kinds())[kind]
