"""A plan as one HTML file: the figures, where the time goes, the schedule as a Gantt chart, memory, and what each idea
is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bessemer.addons.distributed.timeline import as_svg
from bessemer.addons.plan.cost import RunPlan, assumptions
from bessemer.addons.plan.hardware import GIB
from bessemer.addons.plan.memory import KINDS
from bessemer.addons.plan.render import PARTS, amount
from bessemer.addons.watch import page
from bessemer.addons.watch.page import Html
from bessemer.model import accounting


def document(name: str, plan: RunPlan, ideas: Mapping[str, Any]) -> str:
    setup = plan.setup
    lead = (
        f"{amount(accounting.main_params(plan.cfg))} parameters, {amount(accounting.active_params(plan.cfg))} per token"
        f"{f'; {amount(plan.tokens)} tokens' if plan.tokens else ''}; {setup.layout}; {setup.schedule}; "
        f"{'FP8' if setup.fp8 else 'BF16'}. "
        f"Bound by {plan.bound}."
    )
    gantt = Html(f'<div class="scroll">{as_svg(plan.step.table, plan.step.timeline, width=1800, row=22)}</div>')
    rows = "".join(f"<li>{page.text(assumption)}</li>" for assumption in assumptions(plan))
    parts = [
        page.section("figures", "What it costs", page.tiles(_tiles(plan)), lead),
        page.section("time", "Where a step goes", _parts(plan)),
        page.section(
            "gantt", "The schedule", gantt, "A row per pipeline rank, seconds to the right; the optimizer follows."
        ),
        page.section("memory", "Memory of every rank, GiB", _memory(plan)),
        page.section("ideas", "Without one of its ideas", _ideas(ideas)) if ideas else "",
        page.section("assumed", "Assumptions", Html(f"<ul>{rows}</ul>")),
    ]
    return page.document(f"Plan: {name}", page.join(Html(f"<h1>{page.text(name)}</h1>"), *parts))


def _tiles(plan: RunPlan) -> list[Html]:
    device = plan.setup.device
    usd = "no price given" if plan.usd is None else f"${amount(plan.usd)} at ${plan.usd_hour:g} per GPU hour"
    fits = "fits" if plan.fits else "does not fit"
    return [
        page.tile("GPU hours", amount(plan.gpu_hours), f"{plan.hours_per_trillion / 1e3:,.1f}K per trillion tokens"),
        page.tile("Days", f"{plan.days:.1f}", f"on {plan.gpus:,} {device.name}"),
        page.tile("Price", "-" if plan.usd is None else f"${amount(plan.usd)}", usd),
        page.tile("Tokens/s/GPU", f"{plan.rate:,.0f}", f"{100 * plan.mfu(device.bf16):.1f} % of the BF16 peak"),
        page.tile("Step", f"{plan.step.seconds:.2f} s", f"{amount(plan.setup.step_tokens)} tokens"),
        page.tile("Fullest rank", f"{plan.highest / GIB:.1f} GiB", f"{fits} on {device.memory:.1f}"),
    ]


def _parts(plan: RunPlan) -> Html:
    rows = [
        (PARTS[part], f"{seconds:.3f}", page.meter(seconds / plan.step.seconds, strong=part == "pairs"))
        for part, seconds in plan.step.parts.items()
    ]
    links = [(link, f"{size / 1e9:,.1f}") for link, size in plan.step.links.items()]
    times = page.table(("part", "seconds", "share"), rows, (1,))
    return page.join(times, page.table(("link", "GB per rank and step"), links, (1,)))


def _memory(plan: RunPlan) -> Html:
    rows = [
        (str(rank), *(f"{kinds[kind] / GIB:.2f}" for kind in KINDS), f"{sum(kinds.values()) / GIB:.2f}")
        for rank, kinds in enumerate(plan.memory)
    ]
    return page.table(("rank", *KINDS, "total"), rows, range(len(KINDS) + 2))


def _ideas(ideas: Mapping[str, Any]) -> Html:
    rows = []
    for idea, cost in ideas.items():
        if isinstance(cost, str):
            rows.append((idea, cost, ""))
        else:
            rows.append((idea, f"{cost['gpu_hours_per_trillion_tokens'] / 1e3:,.1f}K", f"x {cost['factor']:.3f}"))
    return page.table(("left out", "GPU hours per trillion tokens", "against the plan"), rows, (1, 2))
