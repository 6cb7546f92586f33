"""Seconds that the work of a stage takes, guessed at fixed rates before anything is measured (`pipeline.pace` does)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bessemer.addons.families.packaged_models import known_model
from bessemer.addons.plan.other_models import known_model as known_shape
from bessemer.config.table import StageConfig
from bessemer.data.model_files import read_object
from bessemer.data.sources import PACKAGE
from bessemer.model import ops
from bessemer.model.accounting import flops_per_token, stored_params
from bessemer.pipeline.stage import find_kind
from bessemer.pipeline.work import StageWork
from bessemer.train import lineage, setup
from bessemer.workers import cores

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe

DISK = 3e8
"""Bytes per second of reading a model, or of hashing and writing one."""


def of_stage(config: StageConfig, recipe: Recipe) -> float:
    return sum(guessed(recipe, work) for work in find_kind(config.kind)().work(config, recipe))


def guessed(recipe: Recipe, work: StageWork) -> float:
    """Seconds at the rates of `training_seconds`: a token read costs a third of one trained on, and one sampled about a
    quarter."""
    tokens = work.trained + work.read / 3 + work.sampled / 4
    return fixed(recipe, work) + (estimate_seconds(recipe, work.model, tokens, work.length) if tokens else 0.0)


def fixed(recipe: Recipe, work: StageWork) -> float:
    """Seconds that no token explains; ranks share the bytes of a model."""
    size = work.bytes * params(recipe, work.model) if work.bytes else 0.0
    return work.seconds + size / DISK / recipe.layout.fewest


def params(recipe: Recipe, name: str | None) -> float:
    """Stored parameters of the model of `name`; 0 if nothing here tells."""
    if (cfg := lineage.config_of(recipe, name)) is not None:
        return float(stored_params(cfg))
    return (training_flops(recipe, name, 256) or 0.0) / 6


def training_flops(recipe: Recipe, name: str | None, length: int) -> float | None:
    """FLOPs of training the model of `name` on one token in rows of `length`; None if the recipe does not say.

    A model of another family takes 6 per parameter; its number of parameters follows from file sizes and dtype.
    """
    if (cfg := lineage.config_of(recipe, name)) is not None:
        return flops_per_token(cfg, length).training
    first = lineage.origin(recipe, name)
    if first is None or first.imported is None:
        return None
    if first.imported.startswith(PACKAGE):  # GGUF files of about five bits per parameter
        return 6 * 8 / 5 * 1e6 * known_model(first.imported.removeprefix(PACKAGE)).package.megabytes
    folder = lineage.imported_folder(recipe, name)
    if folder is None:
        published = known_shape(first.imported)
        return None if published is None else 6.0 * published.active()
    config = read_object(folder / "config.json")
    bytes_each = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    return 6 * sum(path.stat().st_size for path in folder.glob("*.safetensors")) / bytes_each


def estimate_seconds(recipe: Recipe, name: str | None, tokens: float, length: int = 256) -> float:
    """`training_seconds` for the model of `name`, or for the recipe's [model] if the recipe does not say."""
    flops = training_flops(recipe, name, length)
    return training_seconds(recipe, tokens, length) if flops is None else seconds_of(tokens * flops)


def training_seconds(recipe: Recipe, tokens: float, length: int = 256) -> float:
    """A first estimate of the seconds to train on `tokens` in rows of `length` on this machine, before anything is
    measured: 50 GFLOPS per core with kernels, 25 without (measured with `tiny` and `small` on Xeons without AMX), 100
    TFLOPS on a GPU."""
    return seconds_of(tokens * flops_per_token(setup.model_config(recipe), length).training)


def seconds_of(flops: float) -> float:
    """Seconds for this many FLOPs of training, at the rates of `training_seconds`."""
    if torch.cuda.is_available():
        return flops / 1e14
    return flops / ((25e9 if ops.instructions() == "off" else 50e9) * cores())
