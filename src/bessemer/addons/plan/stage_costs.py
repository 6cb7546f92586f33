"""What every stage of a recipe costs on planned devices.

Pre-training from random weights costs what the plan says. RL, rejection sampling and evaluation are priced by their
answers, with the decoding steps and rollouts of `plan.inference`; other training by the tokens that the stage expects,
at the plan's rate. Reading, tokenising, judging and downloads need no GPU and count as nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from bessemer.addons.plan.cost import RunPlan, amount
from bessemer.addons.plan.guess import estimate_seconds, guessed, training_flops, training_seconds
from bessemer.addons.plan.inference import RolloutTime, rollout_time
from bessemer.addons.plan.other_models import shape_of
from bessemer.addons.plan.plan_config import begun, planned
from bessemer.addons.plan.record import TimeFactors
from bessemer.addons.plan.stage_memory import network_of, step_rows
from bessemer.addons.plan.training_setup import ModelShape
from bessemer.addons.r1.tables import RejectConfig
from bessemer.config import places
from bessemer.config.evaluation import EvalConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig
from bessemer.config.training import OptimizerConfig, PretrainConfig
from bessemer.errors import UserError
from bessemer.pipeline.stage import find_kind
from bessemer.pipeline.stages.eval import n_answers
from bessemer.train import lineage

NO_GPU = ("corpus", "import", "examples")
"""Kinds of stages without work for a GPU."""


AS_IF = ", as if its model were [model]"


@dataclass(frozen=True)
class StageCost:
    """One stage on the devices of a plan."""

    name: str
    kind: str
    gpu_hours: float
    work: str
    """What is counted, as a phrase."""
    rollout: RolloutTime | None = None
    """The last rollout of an RL stage, with its updates."""

    def facts(self, interval: TimeFactors) -> dict[str, Any]:
        rollout = {} if self.rollout is None else {
            "sampling_seconds": self.rollout.sampling, "updating_seconds": self.rollout.updating,
            "rollout_seconds_interval": interval.facts(self.rollout.seconds),
        }  # fmt: skip
        facts = {"stage": self.name, "kind": self.kind, "gpu_hours": self.gpu_hours, "work": self.work}
        return facts | {"gpu_hours_interval": interval.facts(self.gpu_hours)} | rollout


def stage_costs(plan: RunPlan, recipe: Recipe | None) -> list[StageCost]:
    """The cost of each stage that uses GPUs, in order; none without a recipe. RL's sampler does not use MTP drafts."""
    if recipe is None:
        return []
    with places.of_recipe(recipe.folder):
        return [cost for stage in recipe.stages if (cost := _cost(plan, recipe, stage))]


def _cost(plan: RunPlan, recipe: Recipe, stage: StageConfig) -> StageCost | None:
    if stage.kind in NO_GPU:
        return None
    if isinstance(stage, PretrainConfig) and stage.corpus is None:
        hours, tokens = plan.gpu_hours, plan.tokens
        if stage is not next(begun(recipe)):
            hours *= stage.tokens / plan.tokens / _speed(plan, recipe, stage.name)
            tokens = stage.tokens
        return StageCost(stage.name, stage.kind, hours, f"{amount(tokens)} tokens of pre-training")
    if isinstance(stage, RLConfig):
        return _rl(plan, recipe, stage)
    if isinstance(stage, RejectConfig):
        answers = stage.problems * stage.samples
        hours = _answers(plan, recipe, stage.source, answers, stage.max_new_tokens)
        work = f"{amount(answers)} answers{_as_if(recipe, stage.source)}"
        return StageCost(stage.name, stage.kind, hours, work)
    if isinstance(stage, EvalConfig):
        try:
            rows = n_answers(stage)  # asked one after the other
        except UserError as error:  # all of a file's problems, and the file is elsewhere
            return StageCost(stage.name, stage.kind, 0.0, f"not counted: {error}")
        hours = sum(_answers(plan, recipe, name, n, stage.max_new_tokens) for name in stage.models for n in rows)
        work = f"{amount(sum(rows) * len(stage.models))} answers{_as_if(recipe, *stage.models)}"
        return StageCost(stage.name, stage.kind, hours, work)
    # the stage's work, turned from this machine's seconds into tokens of the plan's network
    first = planned(recipe)
    length = plan.setup.length
    per_token = estimate_seconds(recipe, first.name, 1.0, length) if first else training_seconds(recipe, 1.0, length)
    counted = find_kind(stage.kind)().work(stage, recipe)
    tokens = sum(guessed(recipe, replace(work, seconds=0.0, bytes=0)) for work in counted) / per_token
    work = f"as much as {amount(tokens)} tokens of pre-training" if tokens else "not counted: its files are not here"
    if tokens and training_flops(recipe, stage.name, length) is None:
        work += AS_IF
    waiting = 1.0  # GPUs for one that computes
    if isinstance(stage, OptimizerConfig) and network_of(recipe, stage)[1] is not None:
        waiting = max(1.0, plan.gpus / step_rows(stage, plan.gpus))
    return StageCost(stage.name, stage.kind, waiting * tokens / plan.rate / 3600, work)


def _rl(plan: RunPlan, recipe: Recipe, stage: RLConfig) -> StageCost:
    answers = stage.prompts_per_rollout * stage.samples
    caps = [int(stage.max_new_tokens(n * stage.updates_per_rollout)) for n in range(stage.rollouts)]
    rate = plan.rate * _speed(plan, recipe, stage.name)
    critic = stage.advantage.name == "critic"
    by_cap = {cap: _rollout(plan, recipe, stage.name, answers, cap, rate, critic) for cap in set(caps)}
    hours = sum(by_cap[cap].seconds for cap in caps) * plan.gpus / 3600
    work = f"{stage.rollouts} rollouts of {amount(answers)} answers{_as_if(recipe, stage.name)}"
    return StageCost(stage.name, stage.kind, hours, work, by_cap[caps[-1]])


def _answers(plan: RunPlan, recipe: Recipe, name: str | None, answers: int, cap: int) -> float:
    """GPU hours of sampling answers, without updates."""
    return _rollout(plan, recipe, name, answers, cap, math.inf).seconds * plan.gpus / 3600


def _rollout(
    plan: RunPlan, recipe: Recipe, name: str | None, answers: int, cap: int, rate: float, critic: bool = False
) -> RolloutTime:
    shape, device, unit = _shape(plan, recipe, name), plan.setup.device, min(plan.gpus, 64)
    # the engine samples with BF16 weights, whatever the stage trains in
    return rollout_time(shape, device, plan.gpus, answers, cap, rate, unit, critic=critic, fp8=False)


def _speed(plan: RunPlan, recipe: Recipe, name: str) -> float:
    """How many times as fast the model of `name` trains as the plan's, by FLOPs per token."""
    length = plan.setup.length
    return plan.setup.shape.flops(length) / _shape(plan, recipe, name).flops(length)


def _as_if(recipe: Recipe, *names: str | None) -> str:
    """Says that a stage is priced with [model], because nothing here tells the shape of one of its models."""
    known = (lineage.config_of(recipe, name) or network_of(recipe, recipe.stage(name))[1] for name in names if name)
    return "" if all(known) else AS_IF


def _shape(plan: RunPlan, recipe: Recipe, name: str | None) -> ModelShape:
    """The network of `name`: the plan's, unless it began in another stage and the recipe gives its config."""
    if lineage.origin(recipe, name) is planned(recipe):
        return plan.setup.shape
    cfg, other = lineage.config_of(recipe, name), None if name is None else network_of(recipe, recipe.stage(name))[1]
    if other is not None:
        return shape_of(other)
    return plan.setup.shape if cfg is None else ModelShape.of(cfg)
