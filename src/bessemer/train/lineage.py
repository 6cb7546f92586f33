"""Where a stage's model comes from, and what the recipe says about it before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.config.places import located
from bessemer.config.training import FineTuningConfig, PretrainConfig
from bessemer.data import sources
from bessemer.data.documents import HUB
from bessemer.data.model_files import read_object
from bessemer.data.sources import PACKAGE
from bessemer.errors import UserError
from bessemer.hf.families import family
from bessemer.hf.model_directory import own_config, own_family
from bessemer.model.accounting import flops_per_token
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


def check_lora(config: FineTuningConfig, recipe: Recipe) -> None:
    """UserError, before anything runs, if a stage's [lora] is not supported."""
    if config.lora is None:
        return
    family().check_adapters()
    if config_of(recipe, config.source) is not None:
        raise own_family(config.name)
    for key, value, only in (("fp8", config.fp8, "off"), ("optimizer", config.optimizer, "adamw")):
        if value != only:
            raise UserError(f'stage "{config.name}": lora does not go with {key} = "{value}"; set {key} = "{only}"')


def imported_config(recipe: Recipe, name: str | None) -> dict[str, Any] | None:
    """config.json of the local directory that the model of `name` is imported from; None for any other origin."""
    folder = _local(origin(recipe, name))
    return None if folder is None else read_object(folder / "config.json")


def training_flops(recipe: Recipe, name: str | None, length: int) -> float | None:
    """FLOPs of training the model of `name` on one token in rows of `length`; None if the recipe does not say.

    A model of another family takes 6 per parameter; its number of parameters follows from file sizes and dtype.
    """
    if (cfg := config_of(recipe, name)) is not None:
        return flops_per_token(cfg, length).training
    first = origin(recipe, name)
    if first is None or first.imported is None:
        return None
    if first.imported.startswith(PACKAGE):  # GGUF files of about five bits per parameter
        return 6 * 8 / 5 * 1e6 * sources.known_model(first.imported.removeprefix(PACKAGE)).package.megabytes
    folder = _local(first)
    if folder is None:
        return None
    config = read_object(folder / "config.json")
    each = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    return 6 * sum(path.stat().st_size for path in folder.glob("*.safetensors")) / each


def estimate_seconds(recipe: Recipe, name: str | None, tokens: float, length: int = 256) -> float:
    """`setup.estimate_seconds` for the model of `name`, or for the recipe's [model] if the recipe does not say."""
    flops = training_flops(recipe, name, length)
    return setup.estimate_seconds(recipe, tokens, length=length) if flops is None else setup.seconds_of(tokens * flops)


def _local(stage: StageConfig | None) -> Path | None:
    """The directory that a stage imports, if it is on this machine."""
    if stage is None or stage.imported is None or stage.imported.startswith((PACKAGE, HUB)):
        return None
    return folder if ((folder := located(stage.imported)) / "config.json").is_file() else None
