"""The skeleton that every stage shares.

A stage is one file; its table is a class in `config/`, or in the same file. An entry point of the group
`bessemer.stages` gives it the name of its kind; one in a file of your own has `kind = "my_stage.py:Pretrain"`:

    class Pretrain(Stage[PretrainConfig]):
        def run(self, config, ctx):
            step = ...                      # load ctx.state if it holds a checkpoint
            ctx.rewind(step)                # metrics, samples and rollouts as they were at that step
            ctx.progress.total(config.tokens, "tokens", done=...)
            while ...:
                ctx.metrics.write(step, tokens, {"train/loss": loss})
                ctx.progress.advance(tokens_of_step, f"loss {loss:.3f}")
                if ctx.stop:
                    ...                     # save to ctx.state
                    ctx.interrupt()
            return {"tokens": tokens, "loss": loss}

Invariants: a stage reads its inputs and writes only inside `ctx.dir`. What it needs to resume after a kill is in
`ctx.state`; everything else in `ctx.dir` is its output, hashed when it ends. The same config, seed and inputs give the
same output, whether or not the stage was killed on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args

from bessemer import plugins
from bessemer.config.builtin import RUN_FORMAT
from bessemer.config.table import StageConfig
from bessemer.errors import UserError
from bessemer.pipeline.work import StageWork
from bessemer.runs import files
from bessemer.runs.context import Interrupted, StageContext

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe
    from bessemer.tasks import Problem


_Config = TypeVar("_Config", bound=StageConfig)
Probe = Callable[[], str | None]


class Stage(Generic[_Config]):
    """One step of a recipe: input directories in, one output directory out. `_Config` is the class of its table."""

    table: ClassVar[type[StageConfig]]
    """The class of its table: that in `Stage[...]`."""
    format: ClassVar[int] = 1
    """Raise it when the stage's output changes for the same config, so that old output is remade."""
    uses_model: ClassVar[bool] = True
    """Whether the recipe's [model] table changes what this stage makes."""
    uses_seed: ClassVar[bool] = True
    """Whether the recipe's seed changes what this stage makes."""
    distributed: ClassVar[bool] = False
    """Whether all ranks run it together; otherwise rank 0 alone does."""

    def __init_subclass__(cls) -> None:
        for part in (part for base in getattr(cls, "__orig_bases__", ()) for part in get_args(base)):
            if isinstance(part, type) and issubclass(part, StageConfig):
                cls.table = part

    def resolve(self, config: _Config, recipe: Recipe) -> dict[str, Any]:
        """Checks the stage's table against the recipe before anything runs (UserError); returns facts derived from it.

        The facts are plain JSON and part of the identity, so a preset changed in the code reruns the stage.
        """
        return {}

    def probes(self, config: _Config, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        """Further checks before anything runs, which may take longer: each reads one thing that the stage will need and
        returns what it found, None if that is not worth a line, or raises UserError. `pipeline/preflight.py` calls them
        for stages that are not finished."""
        return iter(())

    def identity(
        self, config: _Config, recipe: Recipe, derived: dict[str, Any], inputs: dict[str, str]
    ) -> dict[str, Any]:
        """Everything that determines the output of this stage; `inputs` maps the stages it reads to their
        fingerprints."""
        what = {
            "format": [RUN_FORMAT, config.kind, self.format],
            "settings": config.fingerprint_values(),
            "seed": recipe.seed_of(config) if self.uses_seed else None,
            "model": recipe.model if self.uses_model else None,
            "derived": derived,
            "inputs": inputs,
        }
        return json.loads(json.dumps(what))  # as it reads back from disk, tuples and all

    def work(self, config: _Config, recipe: Recipe) -> list[StageWork]:
        """The stage's work, for the time that it will take: everything that it does, model by model."""
        return [StageWork(seconds=30.0)]

    def run(self, config: _Config, ctx: StageContext) -> dict[str, Any]:
        """Does the work; returns the facts worth a line in the summary."""
        raise NotImplementedError

    def exports_conversations(self, config: _Config) -> bool:
        """Whether it writes a file of conversations for SFT."""
        return False

    def exported_tokens(self, config: _Config) -> float:
        """A rough guess of the tokens in these conversations."""
        return 0.0

    def training_data(self, config: _Config, recipe: Recipe, folder: Path, cache: Path) -> Iterator[Problem | str]:
        """What a model can have learnt from this finished stage: training texts, and problems it was asked.

        The contamination check of evaluation reads it. By default: the conversations that the stage exports.
        """
        if self.exports_conversations(config):
            yield from files.conversation_texts(folder)


def blamed(kind: str, stage: Stage[Any]) -> AbstractContextManager[object]:
    """Inside, an error in the code of a stage that is not this package's becomes a UserError with its file and line."""
    return plugins.blamed(kind, type(stage)) if plugins.digest("stages", kind) else nullcontext()


def run_stage(config: StageConfig, ctx: StageContext) -> dict[str, Any]:
    """`Stage.run` of the stage that `config` is the table of."""
    stage, stopped = find_kind(config.kind)(), None
    with blamed(config.kind, stage):
        try:
            summary = stage.run(config, ctx)
        except Interrupted as error:  # no fault
            stopped = error
    if stopped is not None:
        raise stopped
    if not isinstance(summary, dict):
        raise UserError(
            f"{plugins.where(config.kind, type(stage))}: run returned {type(summary).__name__}; return a dictionary of "
            "facts for the summary, {} for none"
        )
    return summary


def find_kind(kind: str) -> type[Stage[Any]]:
    """The stage class of a kind: one of the core, an entry point of the group `bessemer.stages`, or code
    of the user's own. UserError if it cannot be loaded."""
    stage_class: type[Stage[Any]] = plugins.find("stages", kind, derives=Stage)
    return stage_class
