"""A plan in words, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.model import counts
from bessemer.plan.cost import Plan, assumptions
from bessemer.plan.hardware import GIB
from bessemer.plan.memory import KINDS
from bessemer.plan.search import Searched

PARTS = {"forward": "forward alone", "backward": "backward alone", "weights": "weight gradients alone",
         "pairs": "overlapped forward and backward", "bubble": "bubble", "optimizer": "optimizer"}  # fmt: skip


def amount(value: float) -> str:
    """671026419200 -> 671B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def described(
    name: str, plan: Plan, ideas: Mapping[str, Any], rl: Sequence[Mapping[str, Any]] = (),
    serving: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    setup, cfg, device = plan.setup, plan.cfg, plan.setup.device
    usd = "" if plan.usd is None else f", ${amount(plan.usd)}"
    lines = [
        f"{name}: {amount(counts.main_params(cfg))} parameters, {amount(counts.active_params(cfg))} a token, "
        f"{amount(plan.tokens)} tokens",
        f"{plan.gpus:,} {device.name}, {setup.layout}, {setup.schedule}, {setup.micro} micro-batches of {setup.rows} x "
        f"{setup.length:,} tokens a step, {'FP8' if setup.fp8 else 'BF16'}",
        "",
        (
            f"{plan.gpu_hours / 1e3:,.1f} thousand GPU hours ({plan.hours_per_trillion / 1e3:,.1f} a trillion tokens), "
            f"{plan.days:.1f} days{usd}"
        )
        if plan.tokens
        else "no pre-training",
        f"{plan.rate:,.0f} tokens a second and GPU; of the BF16 peak {100 * plan.mfu(device.bf16):.1f} %"
        + (f", of the FP8 peak {100 * plan.mfu(device.fp8):.1f} %" if device.fp8 else "")
        + " (causal FLOPs, MTP and recomputation not counted)",
        f"bound by {plan.bound}",
        "",
        f"a step of {amount(setup.step_tokens)} tokens: {plan.step.seconds:.3f} s, means over the ranks of a pipeline",
    ]
    lines += [f"  {PARTS[part]:<34}{seconds:9.3f} s" for part, seconds in plan.step.parts.items() if seconds]
    lines += ["", "bytes that a rank in the middle sends in a step, GB"]
    lines += [f"  {link:<34}{size / 1e9:9.1f}" for link, size in plan.step.links.items()]
    worst = max(range(len(plan.memory)), key=lambda rank: sum(plan.memory[rank].values()))
    middle = len(plan.memory) // 2
    shown = list(dict.fromkeys((0, middle, len(plan.memory) - 1, worst)))
    lines += ["", "memory by pipeline rank, GiB" + "".join(f"{rank:>10}" for rank in shown)]
    for kind in (*KINDS, "total"):
        sizes = [sum(plan.memory[r].values()) if kind == "total" else plan.memory[r][kind] for r in shown]
        lines.append(f"  {kind:<26}" + "".join(f"{size / GIB:10.2f}" for size in sizes))
    room = f"{device.room / GIB:.1f} of {device.memory:.1f} GiB"
    lines.append(f"  {'fits' if plan.fits else 'DOES NOT FIT'}: {room} can be filled")
    if ideas:
        lines += ["", "without one of its ideas, thousand GPU hours a trillion tokens"]
        for idea, worth in ideas.items():
            if isinstance(worth, str):
                lines.append(f"  {idea:<48} {worth}")
            else:
                hours = worth["gpu_hours_per_trillion_tokens"] / 1e3
                held = worth.get("memory_gib", 0.0)
                over = f"  but {held:.0f} GiB do not fit" if held * GIB > device.room else ""
                lines.append(f"  {idea:<48}{hours:9.1f}  x {worth['factor']:.3f}{over}")
        if "MLA" in ideas:
            other = setup.shape.without_mla()
            ratio = other.kv_bytes() / setup.shape.kv_bytes()
            lines.append(f"  without MLA a token's cache is {ratio:.0f} x as large, which serving pays for")
    for stage in rl:
        lines += ["", f"RL stage {stage['stage']}: {stage['gpu_hours']:,.0f} GPU hours, {stage['days']:.1f} days; a "
                  f"rollout {stage['sampling_seconds']:.0f} s of sampling (waits for {stage['bound']}) and "
                  f"{stage['updating_seconds']:.0f} s of updates"]  # fmt: skip
    if serving is not None:
        price = serving["usd_per_million_output_tokens"]
        read = serving["usd_per_million_input_tokens"]
        paid = "" if price is None else f"; ${price:.2f} a million of them, ${read:.3f} a million read"
        lines += ["", f"served from units of {serving['gpus_of_a_unit']}, {serving['answers_per_gpu']} answers a GPU, "
                  f"each {serving['tokens_per_second_of_an_answer']:.0f} tokens/s: "
                  f"{serving['output_tokens_per_second_per_node']:,.0f} tokens/s a node{paid}"]  # fmt: skip
    lines += ["", "assumed", *(f"  {text}" for text in assumptions(plan))]
    return "\n".join(lines)


def searched(found: Searched, shown: int = 8) -> str:
    lines = [f"{found.considered:,} layouts considered, the {len(found.found)} most promising that fit simulated",
             f"{'pp':>4}{'ep':>5}{'dp':>5}  {'schedule':<13}{'made again':<16}{'rows':>5}{'micro':>7}  {'format':<7}"
             f"{'tokens/s/GPU':>13}{'GiB':>7}"]  # fmt: skip
    for one in found.found[:shown]:
        s = one.setup
        lines.append(
            f"{s.layout.pp:>4}{s.layout.ep:>5}{s.layout.dp:>5}  {s.schedule:<13}{','.join(s.recompute) or '-':<16}"
            f"{s.rows:>5}{s.micro:>7}  {'fp8' if s.fp8 else 'bf16':<7}{one.rate:>13,.0f}{one.bytes / GIB:>7.1f}"
        )
    lines += [f"out: {count:,} because {reason}" for reason, count in found.refused.most_common()]
    return "\n".join(lines)
