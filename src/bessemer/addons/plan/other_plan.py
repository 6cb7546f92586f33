"""The plan of a recipe whose model is of another family: memory and time of its stages on a cluster.

All ranks are data-parallel, and FSDP2 shards the model over them (on one, nothing is sharded). Times are those of
`step_time` and `rollout_time` for layers of this shape, with the interval of `record`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.plan import record, stage_memory
from bessemer.addons.plan.cost import amount
from bessemer.addons.plan.hardware import GIB, ClusterSpec
from bessemer.addons.plan.inference import RolloutTime, rollout_time
from bessemer.addons.plan.other_models import OtherModel, shape_of
from bessemer.addons.plan.record import TimeFactors
from bessemer.addons.plan.stage_memory import StageMemory
from bessemer.addons.plan.step_time import step_time
from bessemer.addons.plan.training_setup import Setup
from bessemer.addons.r1.tables import RejectConfig
from bessemer.config import places
from bessemer.config.evaluation import EvalConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig
from bessemer.config.training import OptimizerConfig
from bessemer.config.units import show_seconds
from bessemer.errors import UserError
from bessemer.pipeline.stage import find_kind
from bessemer.pipeline.stages.eval import n_answers

MICRO = 8
"""Micro-batches of a step whose time gives the rate."""
TOKENS = 16384
"""Tokens of a micro-batch there."""


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage on the cluster."""

    name: str
    seconds: float
    work: str


@dataclass(frozen=True)
class OtherPlan:
    recipe: Recipe
    model: OtherModel
    cluster: ClusterSpec
    rate: float
    """Tokens per second per GPU of a training step."""
    needs: dict[str, StageMemory]
    faults: list[str]
    notes: list[str]
    times: list[StageTime]
    interval: TimeFactors
    """Factors on every time."""

    @property
    def fits(self) -> bool:
        return not self.faults

    def facts(self) -> dict[str, Any]:
        interval = self.interval
        return {
            "name": self.recipe.name, "family": self.model.family, "params_total": self.model.count(),
            "params_active": self.model.active(), "device": self.cluster.device.name, "gpus": self.cluster.size,
            "tokens_per_second_per_gpu": self.rate, "fits": self.fits, "faults": self.faults, "notes": self.notes,
            "interval": record.of_facts(interval),
            "stage_memory": {name: need.facts() for name, need in self.needs.items()},
            "stages": [
                {"stage": time.name, "seconds": time.seconds, "seconds_interval": interval.facts(time.seconds),
                 "gpu_hours": time.seconds * self.cluster.size / 3600, "work": time.work}
                for time in self.times
            ],
        }  # fmt: skip

    def describe(self) -> str:
        interval = self.interval
        lines = [
            f"{self.recipe.name}: {amount(self.model.count())} parameters, {amount(self.model.active())} per token, "
            f"{self.model.family}, on {self.cluster}",
            f"{self.rate:,.0f} tokens per second per GPU while it trains",
            "",
            *describe_memory(self.needs.values(), self.cluster),
            *self.faults,
            *self.notes,
        ]
        if self.times:
            width = max(5, *(len(time.name) for time in self.times))
            lines += ["", f"{'stage':<{width}}  {'likely':>10}  {'nine in ten':>24}  work"]
            lines += [
                f"{time.name:<{width}}  {show_seconds(interval.middle * time.seconds):>10}  "
                f"{interval.describe(time.seconds):>24}  {time.work}"
                for time in self.times
            ]
            lines.append(f"likely and nine in ten: by {interval.source}, {interval.middle:.2f} x the formula's time")
        return "\n".join(lines)


def describe_memory(needs: Collection[StageMemory], cluster: ClusterSpec) -> list[str]:
    """Memory of the stages, as lines of text."""
    room = f"{cluster.device.room / 2**30:.1f} of {cluster.device.memory:.1f} GiB can be filled"
    head = f"memory of the fullest of {cluster.size:,} {cluster.device.name}, GiB; {room}"
    sampling: dict[str, list[str]] = {}
    for need in needs:
        if need.workers:
            each = f"{need.workers:,} more devices sample, each with {sum(need.worker_bytes.values()) / GIB:.1f} GiB"
            sampling.setdefault(each, []).append(need.stage)
    beside = [f"{', '.join(names)}: {each}; the {cluster.size:,} here train" for each, names in sampling.items()]
    return [head, *(f"  {line}" for line in stage_memory.table(needs)), *beside]


def plan_other(recipe: Recipe, model: OtherModel, cluster: ClusterSpec, run: Path | None = None) -> OtherPlan:
    """`run`: a run of the recipe on such a cluster; its finished stages correct the times of all."""
    with places.of_recipe(recipe.folder):
        needs = stage_memory.of_stages(recipe, cluster.size, cluster.device)
        faults = [fault for need in needs.values() if (fault := stage_memory.fault(recipe, need, cluster.device))]
        notes = [
            f'stage "{stage.name}": {note}' for stage in recipe.stages
            if (note := stage_memory.without_rows(recipe, stage, cluster.size))
        ]  # fmt: skip
        rate = training_rate(recipe, model, cluster)
        times = [time for stage in recipe.stages if (time := _time(recipe, stage, model, cluster, rate)) is not None]
    predicted = {time.name: time.seconds for time in times}
    interval = record.of_run(predicted, record.measured(run), record.of_clusters())
    return OtherPlan(recipe, model, cluster, rate, needs, faults, notes, times, interval)


def training_rate(recipe: Recipe, model: OtherModel, cluster: ClusterSpec) -> float:
    """Tokens per second per GPU of a step on rows as long as those of RL, or as the model reads."""
    caps = [int(max(stage.max_new_tokens.values)) for stage in recipe.stages if isinstance(stage, RLConfig)]
    length = max(256, min([*caps, model.context or 4096]))
    setup = Setup(
        shape_of(model), Layout(1, cluster.size, 1, cluster.device.devices), cluster.device, "1f1b", MICRO,
        max(1, TOKENS // length), length, False, recompute=("layer",) if recipe.layout.recompute else (),
        fsdp=cluster.size > 1,
    )  # fmt: skip
    return setup.step_tokens / step_time(setup).seconds / cluster.size


def _time(recipe: Recipe, stage: StageConfig, model: OtherModel, cluster: ClusterSpec, rate: float) -> StageTime | None:
    if isinstance(stage, RLConfig):
        answers = stage.prompts_per_rollout * stage.samples
        caps = [int(stage.max_new_tokens(n * stage.updates_per_rollout)) for n in range(stage.rollouts)]
        seconds = sum(_rollout(model, cluster, answers, cap, rate).seconds for cap in caps)
        return StageTime(stage.name, seconds, f"{stage.rollouts} rollouts of {amount(answers)} answers")
    if isinstance(stage, RejectConfig | EvalConfig):
        try:
            counts = [stage.problems * stage.samples] if isinstance(stage, RejectConfig) else n_answers(stage)
        except UserError as error:
            return StageTime(stage.name, 0.0, f"not counted: {error}")
        total = sum(counts) * (len(stage.models) if isinstance(stage, EvalConfig) else 1)
        seconds = _rollout(model, cluster, total, stage.max_new_tokens, float("inf")).seconds
        return StageTime(stage.name, seconds, f"{amount(total)} answers")
    if isinstance(stage, OptimizerConfig):
        try:
            counted = find_kind(stage.kind)().work(stage, recipe)
        except UserError as error:
            return StageTime(stage.name, 0.0, f"not counted: {error}")
        tokens = sum(work.trained + work.read / 3 + work.sampled / 4 for work in counted)
        busy = min(cluster.size, stage_memory.step_rows(stage, cluster.size))
        return StageTime(stage.name, tokens / rate / busy, f"as much as {amount(tokens)} trained tokens")
    return None


def _rollout(model: OtherModel, cluster: ClusterSpec, answers: int, cap: int, rate: float) -> RolloutTime:
    unit = 1 if not model.experts else min(cluster.size, 8)
    return rollout_time(shape_of(model), cluster.device, cluster.size, answers, cap, rate, unit, fp8=False)
