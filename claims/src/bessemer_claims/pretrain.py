"""The pre-training arms: small networks that differ from the reference in one choice (arms.toml), on the same rows.

An arm is a list of settings on the recipe pretrain.toml, and a seed. `pretrain_measures`, `pretrain_speed` and
`pretrain_spikes` compute the numbers of a run; `pretrain_metrics` says how the metrics of the claims' rules follow from
the numbers of several arms.
"""

from __future__ import annotations

import json
import re
import tomllib
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import Field

from bessemer.config.recipe import Recipe
from bessemer.config.table import ConfigTable
from bessemer.config.training import PretrainConfig
from bessemer.model.config import ModelConfig
from bessemer.runs.metrics import read_lines
from bessemer_claims import pretrain_speed, pretrain_spikes, registry
from bessemer_claims.pretrain_metrics import BESIDE, METRICS, SPIKES, WIDE
from bessemer_claims.runs import ArmJob, Tier, donated

__all__ = ["BESIDE", "METRICS", "SAME", "SHAPE", "SIZES", "jobs", "measure"]

SHAPE: dict[Tier, str] = {"quick": "nano", "default": "short", "full": "claims"}
CONTROLLED = 'kind = "bessemer_claims.controls:Controlled"\nname = "pretrain"'
"""The stage of the arms, which has controls beside the keys of the package's."""
SIZES = {
    "nano": ["network 64 wide, 2 layers, 250K tokens read", "网络宽 64、2 层，读 25 万词元"],
    "short": ["network 128 wide, 4 layers, 500K tokens read", "网络宽 128、4 层，读 50 万词元"],
    "claims": ["network 128 wide, 4 layers, 1.5M tokens read", "网络宽 128、4 层，读 150 万词元"],
    WIDE: ["network 256 wide, 4 layers, 1.5M tokens read", "网络宽 256、4 层，读 150 万词元"],
}
SAME = ("ref", "ref'", "bpb")
CORPUS = "corpus"
"""The job that makes the corpora, which all arms reuse."""
OTHER_WEIGHTS = 1000
"""Added to the seed of the initial weights of an arm with `again`."""
FIRST_SEEDS = 3
"""How many seeds of every arm run before the further seeds of any arm."""
MEASURES = 1
"""Version of `pretrain_measures`: raise it when a number changes its meaning, and older results are left out."""


class Arm(ConfigTable):
    """One arm; the head of arms.toml explains the fields."""

    about: str
    set: list[str] = Field(default_factory=list)
    nano: list[str] | None = None
    tokens: float = 1.0
    cost: float = 1.0
    seeds: int = FIRST_SEEDS
    rate: float = 1.0
    quick: bool = False
    full: bool = False
    spikes: bool = False
    wide: bool = False
    again: bool = False


class Shape(ConfigTable):
    """A size of all arms."""

    set: list[str] = Field(default_factory=list)
    tokens: int
    lr: float
    minutes: float
    """Minutes of the reference, on one core."""


@cache
def _data() -> dict[str, dict[str, Any]]:
    return tomllib.loads(registry.data("arms.toml").decode())


@cache
def shapes() -> dict[str, Shape]:
    return {name: registry.entry(Shape, values, f"arms.toml, {name}") for name, values in _data()["shape"].items()}


@cache
def arms() -> dict[str, Arm]:
    return {name: registry.entry(Arm, values, f"arms.toml, {name}") for name, values in _data()["arm"].items()}


def settings(name: str, shape: str) -> list[str]:
    """What an arm and a shape change in pretrain.toml."""
    arm, size = arms()[name], shapes()[shape]
    own = arm.nano if shape == "nano" and arm.nano is not None else arm.set
    tokens = int(size.tokens * arm.tokens)

    def at(share: float) -> str:
        return str(int(tokens * share))

    rate = size.lr * arm.rate
    lr = [["0", 0.0], [at(0.1), rate], [at(0.7), rate], [at(1), rate / 10, "cosine"]]
    own = [re.sub(r"\{([\d.]+)\}", lambda share: at(float(share[1])), setting) for setting in own]
    return [f"pretrain.tokens={tokens}", f"pretrain.lr={json.dumps(lr)}", *size.set, *own]


def recipe(name: str, seed: int, shape: str) -> Recipe:
    """The recipe of one run."""
    overrides = [*settings(name, shape), f"seed={seed}"]
    if arms()[name].again:
        overrides.append(f"pretrain.weights_seed={seed + OTHER_WEIGHTS}")
    text = registry.data("pretrain.toml").decode().replace('kind = "pretrain"', CONTROLLED)
    return Recipe.parse(text, overrides, "pretrain.toml")


def _corpora() -> Recipe:
    reference = recipe("ref", 1, "claims")
    return reference.model_copy(update={"stages": [stage for stage in reference.stages if stage.kind == "corpus"]})


@cache
def _base() -> dict[str, Any]:
    return tomllib.loads(registry.data("pretrain.toml").decode())


def jobs(tier: Tier, seeds: int | None = None) -> list[ArmJob]:
    """The corpora, then the arms in order, the first seeds of all before the rest; the wide ones last. `seeds`: how
    many for every arm, instead of the tier's number."""
    shape = SHAPE[tier]
    donor = ArmJob(
        "pretrain", CORPUS, 0, "all", {"base": _base()}, 1.0, "texts and tokenizer", _corpora, arms=False
    )  # fmt: skip
    chosen = [
        name for name, arm in arms().items() if tier == "full" or (arm.quick if tier == "quick" else not arm.full)
    ]
    several = {name: seeds or (arms()[name].seeds if tier == "full" else 1) for name in chosen}
    turns = [range(1, FIRST_SEEDS + 1), range(FIRST_SEEDS + 1, max(several.values()) + 1)]
    order = [(name, seed) for turn in turns for name in chosen for seed in turn if seed <= several[name]]
    planned = [donor]
    for name, seed in order:
        planned.append(_job(name, seed, shape, donor.name))
        if arms()[name].spikes and tier != "quick":
            planned.append(_spikes(planned[-1]))
    wide = [name for name in chosen if arms()[name].wide and tier == "full"]
    seed_range = range(1, (seeds or FIRST_SEEDS) + 1)
    return planned + [_job(name, seed, WIDE, donor.name) for seed in seed_range for name in wide]


def _job(name: str, seed: int, shape: str, donor: str) -> ArmJob:
    arm, about = arms()[name], arms()[name].about
    facts = {"base": _base(), "set": settings(name, shape), "again": arm.again, "measures": MEASURES}
    if name in pretrain_speed.PAIRS:
        return ArmJob("pretrain", name, seed, shape, facts | {"clock": "process"}, 1.0, about)
    minutes = arm.cost * shapes()[shape].minutes
    return ArmJob("pretrain", name, seed, shape, facts, minutes, about, partial(recipe, name, seed, shape), donor)


def _spikes(of: ArmJob) -> ArmJob:
    """The job that counts jumps of a run's loss: a separate one, because a run that diverged has them too."""
    facts = {"of": of.settings, "window": pretrain_spikes.WINDOW, "deviations": pretrain_spikes.DEVIATIONS}
    about = f"jumps of the loss in the training of {of.arm}"
    return ArmJob("pretrain", SPIKES + of.arm, of.seed, of.shape, facts, 0.1, about, donor=of.name)


def measure(job: ArmJob, folder: Path) -> dict[str, float]:
    """The numbers of a finished run; none of the corpora."""
    if not job.arms:
        return {}
    if job.arm.startswith(SPIKES):
        lines = read_lines(donated(job, folder) / "metrics.jsonl")
        return {"spikes": pretrain_spikes.spikes(line for line in lines if line["stage"] == "pretrain")}
    if job.arm in pretrain_speed.PAIRS:
        return pretrain_speed.ratios(pretrain_speed.PAIRS[job.arm], lambda arm: network(arm, job.shape), job.seed)
    from bessemer_claims.pretrain_measures import numbers

    return numbers(folder, _stage(recipe(job.arm, job.seed, job.shape)))


def network(arm: str, shape: str) -> ModelConfig:
    """The network that an arm trains."""
    from bessemer.train.setup import model_config

    arm_recipe = recipe(arm, 1, shape)
    return model_config(arm_recipe, _stage(arm_recipe).model)


def _stage(arm_recipe: Recipe) -> PretrainConfig:
    config = arm_recipe.stage("pretrain")
    assert isinstance(config, PretrainConfig)
    return config
