"""The pre-training arms: small networks that differ from the reference in one choice (arms.toml), on the same rows.

An arm is a list of settings on the recipe pretrain.toml, and a seed; `pretrain_metrics` says how the claims' metrics
follow from the numbers of arms, `pretrain_measures` what those numbers are.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import Field

from bessemer.claims import registry
from bessemer.claims.pretrain_metrics import METRICS
from bessemer.claims.runs import ArmJob, Tier
from bessemer.config.recipe import Recipe
from bessemer.config.table import ConfigTable

__all__ = ["METRICS", "SAME", "SHAPE", "jobs", "measure"]

SHAPE: dict[Tier, str] = {"quick": "nano", "default": "claims", "full": "claims"}
SAME = ("ref", "ref'", "bpb")
CORPUS = "corpus"
"""The job that makes the corpora; all arms of a shape take them over."""
OTHER_WEIGHTS = 1000
"""Added to the seed of the first weights of an arm "again"."""


class Arm(ConfigTable):
    """One arm; the head of arms.toml explains the fields."""

    about: str
    set: list[str] = Field(default_factory=list)
    nano: list[str] | None = None
    cost: float = 1.0
    seeds: int = 3
    default: bool = False
    quick: bool = False
    again: bool = False


class Shape(ConfigTable):
    """A size of all arms."""

    set: list[str]
    minutes: float
    """Of the reference, on one core."""


@cache
def _tables() -> tuple[dict[str, Shape], dict[str, Arm]]:
    data = tomllib.loads(registry.data("arms.toml").decode())
    shapes, arms = (
        {name: registry.entry(kind, values, f"arms.toml, {name}") for name, values in data[key].items()}
        for key, kind in (("shape", Shape), ("arm", Arm))
    )
    return shapes, arms  # type: ignore[return-value]  # one generator of two kinds


def _settings(arm: str, shape: str) -> list[str]:
    shapes, arms = _tables()
    own = arms[arm]
    return [*shapes[shape].set, *(own.nano if shape == "nano" and own.nano is not None else own.set)]


def recipe(arm: str, seed: int, shape: str) -> Recipe:
    """The recipe of one run."""
    overrides = [*_settings(arm, shape), f"seed={seed}"]
    if _tables()[1][arm].again:
        overrides.append(f"pretrain.weights_seed={seed + OTHER_WEIGHTS}")
    return Recipe.parse(registry.data("pretrain.toml").decode(), overrides, "pretrain.toml")


def _corpora() -> Recipe:
    made = recipe("ref", 1, "claims")
    return made.model_copy(update={"stages": [stage for stage in made.stages if stage.kind == "corpus"]})


@cache
def _base() -> dict[str, Any]:
    return tomllib.loads(registry.data("pretrain.toml").decode())


def jobs(tier: Tier) -> list[ArmJob]:
    """The corpora, then the arms: every arm's first seed before any arm's second."""
    return list(_jobs(tier))


def _jobs(tier: Tier) -> Iterator[ArmJob]:
    shapes, arms = _tables()
    shape = SHAPE[tier]
    yield (
        donor := ArmJob(
            "pretrain", CORPUS, 0, "all", {"base": _base()}, 0.3, "texts and tokenizer", _corpora, arms=False
        )
    )
    chosen = {
        name: arm for name, arm in arms.items() if tier == "full" or (arm.quick if tier == "quick" else arm.default)
    }
    most = max(arm.seeds for arm in chosen.values()) if tier == "full" else 1
    for seed in range(1, most + 1):
        for name, arm in chosen.items():
            if seed <= arm.seeds:
                settings = {"base": _base(), "set": _settings(name, shape), "again": arm.again}
                yield ArmJob(
                    "pretrain", name, seed, shape, settings, arm.cost * shapes[shape].minutes, arm.about,
                    partial(recipe, name, seed, shape), donor.name,
                )  # fmt: skip


def measure(job: ArmJob, folder: Path) -> dict[str, float]:
    """The numbers of a finished run; none of the corpora."""
    if not job.arms:
        return {}
    from bessemer.claims.pretrain_measures import numbers

    return numbers(job, folder)
