"""Claims of the DeepSeek reports next to the planner's predictions, with the error, verdict and assumptions of each.

Published values are read from `reports.toml`; no prediction uses them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bessemer.addons.plan.cost import RunPlan, plan_run
from bessemer.addons.plan.hardware import parse_cluster
from bessemer.addons.plan.inference import ACCEPTED, CONTEXT, MEAN, Deployment, decode, prefill, rollout_time
from bessemer.addons.plan.plan_config import published, setup, tokens_of
from bessemer.addons.plan.step_time import step_time
from bessemer.errors import UserError
from bessemer.model import accounting
from bessemer.model.config import preset
from bessemer_claims.registry import citation, read_toml

CLOSE, LOOSE = 0.10, 0.35
"""Bounds of the verdicts. They are our choice, and a reader may prefer others, so each verdict comes with its error."""


@dataclass(frozen=True)
class Claim:
    """A published figure and its prediction."""

    claim: str
    unit: str
    published: float
    predicted: float
    source: str
    assumptions: str
    exact: bool = False
    """Whether the prediction is arithmetic, not an estimate."""

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1

    @property
    def verdict(self) -> str:
        off = abs(self.error)
        if self.exact:
            return "exact" if off < 0.006 else "not what arithmetic gives"
        if off <= CLOSE:
            return f"within {CLOSE:.0%}"
        return f"within {LOOSE:.0%}" if off <= LOOSE else "missed"

    def facts(self) -> dict[str, Any]:
        return {
            "claim": self.claim, "unit": self.unit, "published": self.published, "predicted": self.predicted,
            "error": self.error, "verdict": self.verdict, "source": self.source, "assumptions": self.assumptions,
        }  # fmt: skip


def v3() -> RunPlan:
    """The published run of DeepSeek-V3 on its own cluster."""
    run, cfg, cluster = published("v3"), preset("v3"), parse_cluster("2048xH800")
    return plan_run(cfg, setup(run, cfg, cluster), tokens_of(run, "v3"), run.rows, cluster.device.usd_hour)


def deepseek_v3() -> list[Claim]:
    plan, published_claims = v3(), read_toml("reports.toml")
    claims = []
    for key, predicted, assumptions in (*_counts(plan), *_training(plan), *_rl(plan), *_serving(plan)):
        claim = published_claims[key]
        values = (claim["claim"], claim["unit"], claim["value"], predicted, cited(claim))
        claims.append(Claim(*values, assumptions, claim.get("exact", False)))
    return claims


def cited(row: dict[str, Any]) -> str:
    """Source and note of a row of reports.toml, in words."""
    return "; ".join(filter(None, (citation(row["source"]).label(0), row.get("note"))))


Predicted = Iterator[tuple[str, float, str]]
"""(key in reports.toml, predicted value, assumptions)."""


def _counts(plan: RunPlan) -> Predicted:
    cfg = plan.cfg
    yield "params", accounting.main_params(cfg) / 1e9, "counted from the config"
    yield "flops", accounting.flops_per_token(cfg, 4096).training / 1e9, "causal, without MTP"
    yield "kv_bytes", accounting.kv_cache_bytes(cfg) / 1e3, "BF16, 61 layers x 576 numbers"


def _training(plan: RunPlan) -> Predicted:
    own = plan.setup
    run = f"balanced routing, {own.layout}, {own.schedule}, kernels {own.in_step:g} x as long as alone"
    yield "hours_per_trillion", plan.hours_per_trillion / 1e3, run
    yield "days_per_trillion", plan.hours_per_trillion / plan.gpus / 24, run
    yield "step", plan.step.seconds, run
    yield "mfu", 100 * plan.mfu(own.device.bf16), f"causal FLOPs over {own.device.bf16:.0f} TFLOPS, {run}"
    yield "pretraining", plan.gpu_hours / 1e3, f"{run}; batch ramp linear in tokens, 1F1B below 32 micro-batches"
    extension = sum(_extension_hours(plan, length, batch) for length, batch in EXTENSION)
    rows = f"rows cut so that a GPU keeps {own.tokens:,} tokens as at 4K; keys and values gathered before each layer"
    yield "extension", extension / 1e3, rows
    total = plan.gpu_hours + extension + 5e3
    yield "hours", total / 1e3, "the two above and the published 5K for post-training"
    yield "usd", 2e-6 * total, "$2 per GPU hour, without research, failed runs, data, salaries and hardware"


EXTENSION, EXTENSION_STEPS = ((32768, 1920), (131072, 480)), 1000
"""(tokens of a row, rows of a step) of the two phases, and the steps of each (V3 4.3)."""


def _extension_hours(plan: RunPlan, length: int, batch: int) -> float:
    """GPU hours of a phase in the layout of pre-training, with rows n times as long cut over n ranks. The layout that
    was used is not published."""
    own, cut = plan.setup, length // plan.setup.length
    longer = replace(own, length=length, cp=cut, micro=batch * cut // own.ranks, batch=batch)
    return EXTENSION_STEPS * step_time(longer).seconds * plan.gpus / 3600


def _rl(plan: RunPlan) -> Predicted:
    seconds = 0.0
    for rollouts, cap in ((513, 32768), (137, 65536)):
        rollout = rollout_time(plan.setup.shape, plan.setup.device, 512, 8192, cap, plan.rate, 64, ACCEPTED)
        seconds += rollouts * rollout.seconds
    longest = (
        "650 rollouts of 8,192 answers on 512 H800; cap 32K, 64K for the last fifth, reached by the longest of every "
        f"rollout; mean {100 * MEAN:.0f} % of it; {100 * ACCEPTED:.0f} % of MTP drafts accepted"
    )
    yield "r1_zero", seconds * 512 / 3600e3, longest
    yield "r1_usd", 2 * 147, "147K GPU hours x $2, in thousands, without the base model"


def _serving(plan: RunPlan) -> Predicted:
    shape, device = plan.setup.shape, plan.setup.device

    def unit(batch: int) -> Deployment:
        return Deployment(shape, device, 144, batch, CONTEXT, 32)

    # published: 20 to 22 tokens per second for every answer
    answering = unit(max((n for n in range(8, 257, 4) if 21 * decode(unit(n)).seconds <= 1), default=8))
    per_node = 8 * decode(answering).rate(answering)
    yield "decode", per_node / 1e3, f"EP144, {answering.batch} answers per GPU: each gets the published 21 tokens/s"
    hits = 342 / 608  # share of the tokens read, published
    reading = 8 * prefill(shape, device, 32, 16384, 4096, cached=hits).rate
    busy = (
        f"EP32, 16K new tokens per GPU in prompts of 4K, {100 * hits:.0f} % of them cached, never idle; the "
        "published rate is a daily mean"
    )
    yield "prefill", reading / 1e3, busy
    nodes = 168e9 / 86400 / per_node + (608e9 - 342e9) / 86400 / reading
    yield "nodes", nodes, "168B tokens out, 266B read, evenly over 24 hours"
    margin = 562_027 / (nodes * 8 * 24 * 2) - 1
    yield "margin", 100 * margin, "published revenue at list prices; nodes as predicted, $2 per GPU hour"


AUDITS: dict[str, Callable[[], list[Claim]]] = {"deepseek-v3": deepseek_v3}


def check(name: str) -> None:
    """UserError for an unknown audit."""
    if name not in AUDITS:
        near = difflib.get_close_matches(name, AUDITS, n=1, cutoff=0.3)
        raise UserError(
            f'no audit "{name}"; ' + (f"did you mean {near[0]}?" if near else f"known: {', '.join(AUDITS)}")
        )


def audit(name: str) -> list[Claim]:
    """The claims of an audit; UserError for an unknown name."""
    check(name)
    return AUDITS[name]()


def describe(claims: list[Claim]) -> str:
    """The audit for a terminal."""
    width = max(len(claim.claim) for claim in claims)
    lines = [f"{'claim':<{width}}  {'published':>12} {'predicted':>12} {'error':>8}  verdict"]
    for claim in claims:
        lines.append(
            f"{claim.claim:<{width}}  {claim.published:>12,.6g} {claim.predicted:>12,.6g} {100 * claim.error:>+7.1f}%  "
            f"{claim.verdict}"
        )
        lines.append(f"{'':<{width}}    {claim.unit}; {claim.assumptions} [{claim.source}]")
    return "\n".join(lines)
