"""A plan as one HTML file: the read_toml, where the time goes, who does what when, memory, what each idea is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bessemer.dist.timeline import as_svg
from bessemer.model import counts
from bessemer.plan.cost import RunPlan, assumptions
from bessemer.plan.hardware import GIB
from bessemer.plan.memory import KINDS
from bessemer.plan.render import PARTS, amount
from bessemer.report import page


def document(name: str, plan: RunPlan, ideas: Mapping[str, Any]) -> str:
    setup, device = plan.setup, plan.setup.device
    usd = "no price given" if plan.usd is None else f"${amount(plan.usd)} at ${plan.usd_hour:g} a GPU hour"
    fits = "fits" if plan.fits else "does not fit"
    tiles = "".join([
        page.tile("GPU hours", amount(plan.gpu_hours), f"{plan.hours_per_trillion / 1e3:,.1f}K a trillion tokens"),
        page.tile("Days", f"{plan.days:.1f}", f"on {plan.gpus:,} {device.name}"),
        page.tile("Price", "-" if plan.usd is None else f"${amount(plan.usd)}", usd),
        page.tile("Tokens/s/GPU", f"{plan.rate:,.0f}", f"{100 * plan.mfu(device.bf16):.1f} % of the BF16 peak"),
        page.tile("Step", f"{plan.step.seconds:.2f} s", f"{amount(setup.step_tokens)} tokens"),
        page.tile("Fullest rank", f"{plan.highest / GIB:.1f} GiB", f"{fits} on {device.memory:.1f}"),
    ])  # fmt: skip
    lead = (
        f"{amount(counts.main_params(plan.cfg))} parameters, {amount(counts.active_params(plan.cfg))} a token; "
        f"{amount(plan.tokens)} tokens; {setup.layout}; {setup.schedule}; {'FP8' if setup.fp8 else 'BF16'}. "
        f"Bound by {plan.bound}."
    )
    body = f"<h1>{page.text(name)}</h1>" + page.section(
        "figures", "What it costs", f'<div class="tiles">{tiles}</div>', lead
    )
    body += page.section("time", "Where a step goes", _parts(plan))
    gantt = as_svg(plan.step.table, plan.step.timeline, width=1800, row=22)
    body += page.section("gantt", "Who does what when", f'<div class="scroll">{gantt}</div>',
                         "A row a pipeline rank, seconds to the right; the optimizer comes after.")  # fmt: skip
    body += page.section("memory", "What every rank holds, GiB", _memory(plan))
    if ideas:
        body += page.section("ideas", "Without one of its ideas", _ideas(plan, ideas))
    rows = "".join(f"<li>{page.text(one)}</li>" for one in assumptions(plan))
    body += page.section("assumed", "Assumed", f"<ul>{rows}</ul>")
    return page.document(f"Plan: {name}", body)


def _parts(plan: RunPlan) -> str:
    rows = [
        (page.text(PARTS[part]), f"{seconds:.3f}", page.meter(seconds / plan.step.seconds, None, part == "pairs"))
        for part, seconds in plan.step.parts.items()
    ]
    links = [(page.text(link), f"{size / 1e9:,.1f}") for link, size in plan.step.links.items()]
    return page.table(("part", "seconds", "share"), rows, (1,)) + page.table(
        ("link", "GB a rank and step"), links, (1,)
    )


def _memory(plan: RunPlan) -> str:
    rows = [
        (str(rank), *(f"{kinds[kind] / GIB:.2f}" for kind in KINDS), f"{sum(kinds.values()) / GIB:.2f}")
        for rank, kinds in enumerate(plan.memory)
    ]
    return page.table(("rank", *KINDS, "total"), rows, tuple(range(len(KINDS) + 2)))


def _ideas(plan: RunPlan, ideas: Mapping[str, Any]) -> str:
    rows = []
    for idea, worth in ideas.items():
        if isinstance(worth, str):
            rows.append((page.text(idea), page.text(worth), ""))
        else:
            hours = worth["gpu_hours_per_trillion_tokens"]
            rows.append((page.text(idea), f"{hours / 1e3:,.1f}K", f"x {worth['factor']:.3f}"))
    return page.table(("left out", "GPU hours a trillion tokens", "against the plan"), rows, (1, 2))
