"""A whole run: hours, days, dollars, what limits its speed, and how much each idea of the paper saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from bessemer.addons.distributed import schedules
from bessemer.addons.distributed.table import Table
from bessemer.addons.plan import memory, record
from bessemer.addons.plan.hardware import GIB
from bessemer.addons.plan.layer_time import cuts
from bessemer.addons.plan.memory import NumberFormats
from bessemer.addons.plan.plan_config import micro_batches
from bessemer.addons.plan.record import TimeFactors
from bessemer.addons.plan.step_time import StepTime, step_time
from bessemer.addons.plan.training_setup import Setup
from bessemer.errors import UserError
from bessemer.model import accounting
from bessemer.model.config import ModelConfig

RAMP = 8
"""Intervals over which the cost of a growing batch is summed."""


@dataclass(frozen=True)
class RunPlan:
    """What a run costs, and its assumptions. Step times are those of the full batch; hours cover all tokens."""

    cfg: ModelConfig
    setup: Setup
    step: StepTime
    tokens: float
    gpu_hours: float
    usd_hour: float | None
    memory: list[dict[str, int]]
    """Bytes by kind of every pipeline rank."""
    interval: TimeFactors = field(default_factory=record.of_clusters)
    """Factors on every time."""

    @property
    def gpus(self) -> int:
        return self.setup.layout.world

    @property
    def rate(self) -> float:
        """Tokens per second per GPU."""
        return self.setup.step_tokens / self.step.seconds / self.gpus

    @property
    def hours_per_trillion(self) -> float:
        return 1e12 / self.rate / 3600

    @property
    def days(self) -> float:
        return self.gpu_hours / self.gpus / 24

    @property
    def usd(self) -> float | None:
        return None if self.usd_hour is None else self.gpu_hours * self.usd_hour

    def mfu(self, peak: float) -> float:
        """Model FLOPs utilisation: causal FLOPs at the run's sequence length, forward and backward, without MTP."""
        return self.rate * self.setup.shape.flops(self.setup.length) / (peak * 1e12)

    @property
    def highest(self) -> int:
        """Bytes of the rank that needs the most."""
        return max(sum(kinds.values()) for kinds in self.memory)

    @property
    def fits(self) -> bool:
        return self.highest <= self.setup.device.room

    @property
    def bound(self) -> str:
        """What limits the speed of a step, as a phrase."""
        parts = self.step.parts
        share = parts["bubble"] / self.step.seconds
        times = next(iter(self.step.stages[len(self.step.stages) // 2].layers), None)
        if share > 0.25:
            return f"the pipeline's bubble ({100 * share:.0f} % of the step)"
        if times is not None and parts["pairs"] and times.communication > times.compute:
            return "the exchange of tokens between nodes"
        if (
            times is not None
            and not parts["pairs"]
            and times.communication > 0.3 * (times.compute + times.communication)
        ):
            return "the exchange of tokens, which nothing hides"
        return "computation"

    def facts(self) -> dict[str, Any]:
        """The plan as JSON (`--json`), with units in the keys."""
        cfg, layout, device = self.cfg, self.setup.layout, self.setup.device
        gib = [{kind: size / GIB for kind, size in kinds.items()} for kinds in self.memory]
        return {
            "params_total": accounting.main_params(cfg), "params_active": accounting.active_params(cfg),
            "params_mtp": accounting.mtp_params(cfg), "device": device.name, "gpus": self.gpus,
            "layout": {"pp": layout.pp, "ep": layout.ep, "dp": layout.dp, "cp": layout.cp, "node": layout.node},
            "schedule": self.setup.schedule, "micro_batches": self.setup.micro, "micro_rows": self.setup.rows,
            "sequence_length": self.setup.length, "precision": "fp8" if self.setup.fp8 else "bf16",
            "tokens": self.tokens, "tokens_per_step": self.setup.step_tokens, "gpu_hours": self.gpu_hours,
            "gpu_hours_per_trillion_tokens": self.hours_per_trillion, "days": self.days, "usd": self.usd,
            "usd_per_gpu_hour": self.usd_hour, "step_seconds": self.step.seconds, "step_parts_seconds": self.step.parts,
            "tokens_per_second_per_gpu": self.rate, "mfu_bf16": self.mfu(device.bf16),
            "mfu_fp8": None if device.fp8 is None else self.mfu(device.fp8),
            "memory_gib_per_rank": [kinds | {"total": sum(kinds.values())} for kinds in gib],
            "memory_gib_of_device": device.memory, "fits": self.fits, "bytes_per_step": self.step.links,
            "bound": self.bound, "assumptions": assumptions(self), "interval": record.of_facts(self.interval),
            "gpu_hours_interval": self.interval.facts(self.gpu_hours),
            "days_interval": self.interval.facts(self.days),
            "step_seconds_interval": self.interval.facts(self.step.seconds),
        }  # fmt: skip


def plan_run(
    cfg: ModelConfig,
    setup: Setup,
    tokens: float,
    batch: Callable[[float], float] | None = None,
    usd_hour: float | None = None,
) -> RunPlan:
    """The plan of a run over `tokens`. `batch`: sequences per step as a function of consumed tokens, if they grow; if
    they are too few for the schedule, 1F1B is assumed. `usd_hour`: dollars per device hour."""
    step = step_time(setup)
    hours = tokens * step.seconds / setup.step_tokens * setup.layout.world / 3600
    if batch is not None:
        hours = _ramp_hours(setup, tokens, batch)
    return RunPlan(cfg, setup, step, tokens, hours, usd_hour, setup_memory(cfg, setup, step.table))


def setup_memory(cfg: ModelConfig, setup: Setup, table: Table) -> list[dict[str, int]]:
    """Bytes by kind of every pipeline rank of a run with this schedule."""
    padded = setup.packed or not setup.device.cudnn
    numbers = NumberFormats(moments=setup.moments, fp8=setup.fp8, muon=setup.muon, padded=padded)
    ranks = memory.per_rank(
        cfg, setup.layout, table, setup.rows, setup.length, numbers, setup.recompute, setup.mtp,
        cuts(setup, table.stages), setup.device.room,
    )  # fmt: skip
    return [memory.of_process(kinds, setup.layout) for kinds in ranks]


def _ramp_hours(setup: Setup, tokens: float, batch: Callable[[float], float]) -> float:
    """GPU hours of all tokens, with the batch at the middle of intervals that halve in length towards the beginning."""
    edges = [0.0, *(tokens / 2**k for k in range(RAMP - 1, -1, -1))]
    seconds, batch_tokens = 0.0, setup.piece * setup.rows
    for low, high in pairwise(edges):
        target = round(batch((low + high) / 2)) // batch_tokens
        few = target < schedules.least(setup.schedule, setup.layout.pp)
        name, micro = micro_batches("1f1b" if few else setup.schedule, setup.layout.pp, target)
        at = replace(setup, micro=micro, schedule=name, batch=None)
        seconds += (high - low) / at.step_tokens * step_time(at).seconds
    return seconds * setup.layout.world / 3600


def ideas(plan: RunPlan) -> dict[str, dict[str, float] | str]:
    """For each idea, the run without it, all else equal: GPU hours per trillion tokens, their ratio to the plan's and,
    if the network keeps MLA, GiB of the fullest rank; or the reason why the run is impossible."""
    setup, shape = plan.setup, plan.setup.shape
    changes: dict[str, Setup] = {}
    if setup.fp8:
        changes["FP8"] = replace(setup, fp8=False)
    if setup.schedule.startswith("dualpipe"):
        changes["DualPipe and its overlap"] = replace(setup, schedule="1f1b")
    if not shape.kv_heads:
        changes["MLA"] = replace(setup, shape=shape.without_mla())
    if shape.limited < shape.groups and setup.layout.nodes > 1:
        changes["node limit of the routing"] = replace(setup, shape=replace(shape, limited=shape.groups))
    if setup.n_mtp:
        changes["MTP (what it costs)"] = replace(setup, mtp=False)
    if not setup.even and setup.layout.pp > 1:
        changes["stages of equal work instead of equal layers"] = replace(setup, even=True)
    costs: dict[str, dict[str, float] | str] = {}
    for name, changed in changes.items():
        try:
            step = step_time(changed)
        except UserError as error:
            costs[name] = str(error)
            continue
        hours = 1e12 / changed.step_tokens * step.seconds * changed.layout.world / 3600
        cost = {"gpu_hours_per_trillion_tokens": hours, "factor": hours / plan.hours_per_trillion}
        if not changed.shape.kv_heads:
            cost["memory_gib"] = max(sum(kinds.values()) for kinds in setup_memory(plan.cfg, changed, step.table)) / GIB
        costs[name] = cost
    return costs


def assumptions(plan: RunPlan) -> list[str]:
    """The assumptions behind the figures, in words."""
    setup = plan.setup
    routing = "balanced routing" if setup.imbalance == 1 else f"busiest expert rank {setup.imbalance:.2f} x the mean"
    texts = [
        f"{routing}, no token dropped, {setup.shape.limited} of {setup.shape.groups} expert groups per token"
        if setup.shape.experts
        else "no experts",
        "single kernels and collectives as published (plan/efficiency.toml), communication as fast in a step as alone",
        f"kernels take {setup.in_step:g} x as long within a step as alone"
        + (" (from the public training profile of DeepSeek, H800)" if setup.in_step != 1 else ""),
        "gradient synchronisation and the update overlap with nothing; no failures, no evaluation, no restarts",
        f"stages of {'equal numbers of layers' if setup.even else 'nearly equal work'}",
    ]
    if setup.recompute:
        texts.append(f"recomputed in backward: {', '.join(setup.recompute)}")
    if setup.packed:
        texts.append("rows hold several texts that do not see each other")
    if plan.usd_hour is not None:
        texts.append(f"${plan.usd_hour:g} per GPU hour")
    return texts


def amount(value: float) -> str:
    """671026419200 -> 671B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
