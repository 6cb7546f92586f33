"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.addons.plan.cost import RunPlan, amount, assumptions
from bessemer.addons.plan.hardware import GIB
from bessemer.addons.plan.memory import KINDS
from bessemer.addons.plan.search import SearchResult
from bessemer.addons.plan.stage_costs import StageCost
from bessemer.model import accounting

PARTS = {"forward": "forward alone", "backward": "backward alone", "weights": "weight gradients alone",
         "pairs": "overlapped forward and backward", "bubble": "bubble", "optimizer": "optimizer"}  # fmt: skip


def hours(value: float) -> str:
    """2430164.9 -> 2,430,165 GPU hours; 0.0066 -> 0.0066 GPU hours."""
    return f"{value:,.0f} GPU hours" if value >= 100 else f"{value:.3g} GPU hours"


def duration(days: float) -> str:
    """0.5 -> 12.0 hours, in the largest unit that gives at least 1."""
    for unit, size in (("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440)):
        if days >= size:
            return f"{days / size:.1f} {unit}"
    return f"{86400 * days:.2g} seconds"


def describe(
    name: str,
    plan: RunPlan,
    ideas: Mapping[str, Any],
    stages: Sequence[StageCost] = (),
    serving: Mapping[str, Any] | None = None,
) -> str:
    """The whole plan; `ideas`, `stages`, `serving`: results of `cost.ideas`, `stage_costs` and `ServingOffer.facts`."""
    parts = [_run(name, plan), _step(plan), _memory(plan), _ideas(plan, ideas), _stages(plan, stages)]
    parts += [_serving(serving), ["assumed", *(f"  {text}" for text in assumptions(plan))]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _run(name: str, plan: RunPlan) -> list[str]:
    setup, cfg, device = plan.setup, plan.cfg, plan.setup.device
    lines = [
        f"{name}: {amount(accounting.main_params(cfg))} parameters, {amount(accounting.active_params(cfg))} per token"
        + (f", {amount(plan.tokens)} tokens" if plan.tokens else ""),
        f"{plan.gpus:,} {device.name}, {setup.layout}, {setup.schedule}, {setup.micro} micro-batches of {setup.rows} x "
        f"{setup.length:,} tokens per step, {'FP8' if setup.fp8 else 'BF16'}",
    ]
    if plan.tokens:
        usd = "" if plan.usd is None else f", ${amount(plan.usd)}"
        lines.append(
            f"{hours(plan.gpu_hours)} ({plan.hours_per_trillion / 1e3:,.1f} thousand per trillion tokens), "
            f"{duration(plan.days)}{usd}"
        )
        at = plan.interval
        span = f"{amount(at.low * plan.gpu_hours)} to {amount(at.high * plan.gpu_hours)}"
        lines.append(
            f"likely {hours(at.middle * plan.gpu_hours)}, {duration(at.middle * plan.days)}; nine in ten: {span} GPU "
            f"hours, {_range(plan, plan.days)}, by {at.source}"
        )
    eight = "" if device.fp8 is None else f", {100 * plan.mfu(device.fp8):.1f} % of the FP8 peak"
    lines.append(
        f"{plan.rate:,.0f} tokens per second per GPU; {100 * plan.mfu(device.bf16):.1f} % of the BF16 peak{eight} "
        "(causal FLOPs, MTP and recomputation not counted)"
    )
    return [*lines, f"bound by {plan.bound}"]


def _step(plan: RunPlan) -> list[str]:
    tokens = amount(plan.setup.step_tokens)
    low, high = (factor * plan.step.seconds for factor in (plan.interval.low, plan.interval.high))
    lines = [
        f"a step of {tokens} tokens: {plan.step.seconds:.3f} s ({low:.3g} to {high:.3g}), averaged over the ranks of a "
        "pipeline"
    ]
    lines += [f"  {PARTS[part]:<34}{seconds:9.3f} s" for part, seconds in plan.step.parts.items() if seconds]
    lines.append("GB that a rank in the middle sends per step")
    return lines + [f"  {link:<34}{size / 1e9:9.1f}" for link, size in plan.step.links.items()]


def _memory(plan: RunPlan) -> list[str]:
    device, ranks = plan.setup.device, plan.memory
    worst = max(range(len(ranks)), key=lambda rank: sum(ranks[rank].values()))
    picked = list(dict.fromkeys((0, len(ranks) // 2, len(ranks) - 1, worst)))
    lines = ["memory by pipeline rank, GiB" + "".join(f"{rank:>10}" for rank in picked)]
    for kind in (*KINDS, "total"):
        sizes = [sum(ranks[rank].values()) if kind == "total" else ranks[rank][kind] for rank in picked]
        lines.append(f"  {kind:<26}" + "".join(f"{size / GIB:10.2f}" for size in sizes))
    room = f"{device.room / GIB:.1f} of {device.memory:.1f} GiB"
    return [*lines, f"  {'fits' if plan.fits else 'DOES NOT FIT'}: {room} can be filled"]


def _ideas(plan: RunPlan, ideas: Mapping[str, Any]) -> list[str]:
    lines = ["without one of its ideas, thousand GPU hours per trillion tokens"]
    for idea, cost in ideas.items():
        if isinstance(cost, str):
            lines.append(f"  {idea:<48} {cost}")
            continue
        gib = cost.get("memory_gib", 0.0)
        over = f"  but {gib:.0f} GiB do not fit" if gib * GIB > plan.setup.device.room else ""
        thousands = cost["gpu_hours_per_trillion_tokens"] / 1e3
        lines.append(f"  {idea:<48}{thousands:9.1f}  x {cost['factor']:.3f}{over}")
    if "MLA" in ideas:
        ratio = plan.setup.shape.without_mla().kv_bytes() / plan.setup.shape.kv_bytes()
        lines.append(f"  without MLA a token's cache is {ratio:.0f} x as large, a cost of serving")
    return lines if ideas else []


def _stages(plan: RunPlan, costs: Sequence[StageCost]) -> list[str]:
    if not costs:
        return []
    width = max(6, *(len(cost.name) for cost in costs))
    lines = [f"stages{'':{width - 4}}  GPU hours  {'likely':>13}  {'nine in ten':>28}  work"]
    for cost in costs:
        likely = plan.interval.middle * cost.gpu_hours
        used, time = amount(likely), duration(likely / plan.gpus / 24)
        span = _range(plan, cost.gpu_hours / plan.gpus / 24)
        if not cost.gpu_hours:
            used = time = span = "-"
        lines.append(f"  {cost.name:<{width}}{used:>11}  {time:>13}  {span:>28}  {cost.work}")
        if (last := cost.rollout) is not None:
            lines.append(
                f"  {'':{width}}{'':26}  the last: {last.sampling:.3g} s of sampling, {last.updating:.3g} s of updates"
            )
    total = sum(cost.gpu_hours for cost in costs)
    likely, span = plan.interval.middle * total, _range(plan, total / plan.gpus / 24)
    price = "" if plan.usd_hour is None else f"  ${amount(plan.usd_hour * likely)}"
    time = duration(likely / plan.gpus / 24)
    return [*lines, f"  {'all':<{width}}{amount(likely):>11}  {time:>13}  {span:>28}{price}"]


def _range(plan: RunPlan, days: float) -> str:
    """The times of nine cases in ten."""
    return f"{duration(plan.interval.low * days)} to {duration(plan.interval.high * days)}"


def _serving(offer: Mapping[str, Any] | None) -> list[str]:
    if offer is None:
        return []
    out, read = offer["usd_per_million_output_tokens"], offer["usd_per_million_input_tokens"]
    price = "" if out is None else f"; ${out:.2f} per million output tokens, ${read:.3f} per million input"
    return [
        f"served from units of {offer['gpus_of_a_unit']}, {offer['answers_per_gpu']} answers per GPU at "
        f"{offer['tokens_per_second_of_an_answer']:.0f} tokens/s each: "
        f"{offer['output_tokens_per_second_per_node']:,.0f} tokens/s per node{price}"
    ]


def describe_search(result: SearchResult, limit: int = 8) -> str:
    """The best layouts, and why others were rejected."""
    most = len(result.candidates)
    cp = f"{result.candidates[0].setup.layout.cp:>4}" if result.candidates[0].setup.layout.cp > 1 else ""
    lines = [
        f"{result.considered:,} layouts considered; the {most} most promising that fit were simulated",
        f"{'pp':>4}{'ep':>5}{'dp':>5}{'  cp' if cp else ''}  {'schedule':<13}{'recomputed':<16}{'rows':>5}{'micro':>7}"
        f"  {'format':<7}{'tokens/s/GPU':>13}{'GiB':>7}",
    ]
    for candidate in result.candidates[:limit]:
        s = candidate.setup
        lines.append(
            f"{s.layout.pp:>4}{s.layout.ep:>5}{s.layout.dp:>5}{cp}  {s.schedule:<13}{','.join(s.recompute) or '-':<16}"
            f"{s.rows:>5}{s.micro:>7}  {'fp8' if s.fp8 else 'bf16':<7}{candidate.rate:>13,.0f}"
            f"{candidate.bytes / GIB:>7.1f}"
        )
    return "\n".join(
        lines + [f"{count:,} layouts rejected: {reason}" for reason, count in result.rejected.most_common()]
    )
