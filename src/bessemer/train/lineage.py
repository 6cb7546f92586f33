"""Where a stage's model comes from, and what the recipe says about it before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.config.places import located
from bessemer.config.training import FineTuningConfig, PretrainConfig
from bessemer.data.documents import HUB
from bessemer.data.model_files import read_object
from bessemer.data.sources import PACKAGE
from bessemer.errors import UserError
from bessemer.hf.families import family
from bessemer.hf.model_directory import own_config
from bessemer.model.config import ModelConfig
from bessemer.train import setup

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe
    from bessemer.config.table import StageConfig


def origin(recipe: Recipe, name: str | None) -> StageConfig | None:
    """The stage that the model of `name` began in, with random weights or imported; None if no such stage comes
    before it."""
    while name is not None:
        stage = recipe.stage(name)
        if stage.imported is not None or (isinstance(stage, PretrainConfig) and stage.corpus is None):
            return stage
        name = stage.source
    return None


def config_of(recipe: Recipe, name: str | None) -> ModelConfig | None:
    """The network that the model of `name` began as; None if it is of another family, or only its import will tell."""
    first = origin(recipe, name)
    if isinstance(first, PretrainConfig):
        return setup.model_config(recipe, first.model)
    folder = _local(first)
    return None if folder is None else own_config(folder)


def imported_folder(recipe: Recipe, name: str | None) -> Path | None:
    """The local directory that the model of `name` is imported from; None for any other origin."""
    return _local(origin(recipe, name))


def check_lora(config: FineTuningConfig, recipe: Recipe) -> None:
    """UserError, before anything runs, if a stage's [lora] is not supported."""
    if config.lora is None:
        return
    if config_of(recipe, config.source) is None:
        family().check_adapters()
    else:
        rollout = getattr(config, "rollout", None)
        elsewhere = rollout is not None and rollout.engine != "local"
        if elsewhere or recipe.layout.fewest > 1:
            fix = 'set rollout.engine = "local"' if elsewhere else "leave [layout] out and run it with --processes 1"
            what = "lora on a model of the DeepSeek V3 family trains and samples in one process"
            raise UserError(f'stage "{config.name}": {what}; {fix}')
    for key, value, only in (("fp8", config.fp8, "off"), ("optimizer", config.optimizer, "adamw")):
        if value != only:
            raise UserError(f'stage "{config.name}": lora does not go with {key} = "{value}"; set {key} = "{only}"')


def imported_config(recipe: Recipe, name: str | None) -> dict[str, Any] | None:
    """config.json of the local directory that the model of `name` is imported from; None for any other origin."""
    folder = imported_folder(recipe, name)
    return None if folder is None else read_object(folder / "config.json")


def _local(stage: StageConfig | None) -> Path | None:
    """The directory that a stage imports, if it is on this machine."""
    if stage is None or stage.imported is None or stage.imported.startswith((PACKAGE, HUB)):
        return None
    return folder if ((folder := located(stage.imported)) / "config.json").is_file() else None
