"""The work of a stage, counted before it runs: tokens trained on, read and sampled, and seconds that no token explains.

`guessed` turns work into seconds at fixed rates of a CPU core or a GPU; `pipeline.pace` at rates measured on this
machine. What cannot be known is assumed in one place: the length of answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.config.recipe import Recipe
from bessemer.model.accounting import stored_params
from bessemer.train import lineage

ANSWER = 0.5
"""Ratio of answers' mean length to `max_new_tokens`."""
PROMPT = 40
"""Tokens of a prompt."""
DISK = 3e8
"""Bytes per second of reading a model, or of hashing and writing one."""


@dataclass(frozen=True)
class StageWork:
    """Work of a stage with one model."""

    model: str | None = None
    """The stage whose network it is; None: none."""
    trained: float = 0.0
    """Tokens with a forward and a backward pass, padding included."""
    read: float = 0.0
    """Tokens with a forward pass alone."""
    sampled: float = 0.0
    """Tokens that the model writes."""
    length: int = 256
    """Tokens of a row."""
    seconds: float = 0.0
    """Loading, saving, texts, downloads."""


def guessed(recipe: Recipe, work: StageWork) -> float:
    """Seconds at the rates of `setup.estimate_seconds`: a token read costs a third of one trained on, and one sampled
    about a quarter."""
    tokens = work.trained + work.read / 3 + work.sampled / 4
    return work.seconds + (lineage.estimate_seconds(recipe, work.model, tokens, work.length) if tokens else 0.0)


def params(recipe: Recipe, name: str | None) -> float:
    """Stored parameters of the model of `name`; 0 if nothing here tells."""
    if (cfg := lineage.config_of(recipe, name)) is not None:
        return float(stored_params(cfg))
    return (lineage.training_flops(recipe, name, 256) or 0.0) / 6


def moved(recipe: Recipe, name: str | None, trains: bool = True) -> float:
    """Seconds to load a model and, if the stage `trains`, to save its last checkpoint and to export it, in float32;
    ranks share this."""
    return (4 + (12 + 4) * trains) * params(recipe, name) / DISK / recipe.layout.fewest


def answers(count: float, cap: float) -> float:
    """Tokens of `count` answers of at most `cap` tokens."""
    return count * ANSWER * cap
