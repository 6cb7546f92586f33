"""Predictions next to published values, with every error: `python -m bessemer.plan.validate` writes docs/planner.md.

The model is calibrated on `efficiency.toml` (single kernels) and `IN_STEP` (one number of a training profile); it is
validated on `claims.toml` and `validation.toml`. A test compares the page with the output of this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bessemer.dist.mesh import Layout
from bessemer.model.config import ModelConfig, preset
from bessemer.plan import audit, layer_time
from bessemer.plan.hardware import attention_rates, device, efficiency, fit_gemm, read_toml, wave_fill
from bessemer.plan.layer_time import layer_times
from bessemer.plan.step_time import step_time
from bessemer.plan.training_setup import IN_STEP, ModelShape, Setup


@dataclass(frozen=True)
class Comparison:
    """A published value and its prediction."""

    what: str
    published: float
    predicted: float
    unit: str
    note: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def other_runs() -> list[Comparison]:
    """Runs of other systems: tokens per second per device."""
    return [_predict(run) for run in read_toml("validation.toml")["run"]]


def _predict(run: dict[str, Any]) -> Comparison:
    on = device(run["device"])
    if "bandwidth" in run:
        on = replace(on, bandwidth=run["bandwidth"])
    if "shape" in run:
        values = run["shape"]
        shape = ModelShape(**values, dense=values["n_layers"])
    else:
        shape = ModelShape.of(preset(run["preset"]) if "preset" in run else ModelConfig.make(run["model"]))
    pp, ep, rows = run.get("pp", 1), run.get("ep", 1), run.get("micro_rows", 1)
    layout = Layout(pp, run["gpus"] // (pp * ep), ep, on.devices)
    micro = max(1, run["batch"] // (layout.dp * ep * rows))
    setup = Setup(
        shape, layout, on, run["schedule"], micro, rows, run["seq"], run["precision"] == "fp8",
        recompute=tuple(run.get("recompute", ())), fsdp=run.get("fsdp", False),
    )  # fmt: skip
    rate = setup.step_tokens / step_time(setup).seconds / layout.world
    return Comparison(run["name"], run["tokens_s"], rate, "tokens/s/GPU", f"{run['source']}. Assumed: {run['assumed']}")


def isca() -> list[Comparison]:
    """Parts of a step of V3, means over the ranks of a pipeline."""
    measured, parts = read_toml("claims.toml")["isca"], audit.v3().step.parts
    names = {"forward": "1F", "bubble": "bubble", "backward": "1B", "weights": "1W", "pairs": "1F1B"}
    names["optimizer"] = "optimizer"
    return [Comparison(name, measured[part], parts[part], "s", measured["source"]) for part, name in names.items()]


def pair(in_step: float = 1.0) -> Comparison:
    """An overlapped pair of 4 + 4 layers, as in the public trace."""
    trace = read_toml("claims.toml")["trace"]
    setup = replace(audit.v3().setup, in_step=in_step)
    times = layer_times(setup, False, efficiency()["exchange"]["units"])
    predicted = 1e3 * layer_time.pair([times] * 4, [times] * 4)
    return Comparison("4 + 4 layers", trace["pair_ms"], predicted, "ms", trace["source"])


def imbalances() -> list[tuple[float, float]]:
    """(load of the busiest expert rank over the mean, thousand GPU hours per trillion tokens of V3)."""
    setup = audit.v3().setup
    hours = []
    for busiest in (1.0, 1.1, 1.2, 1.3):
        other = replace(setup, imbalance=busiest)
        hours.append((busiest, 1e9 / other.step_tokens * step_time(other).seconds * other.layout.world / 3600))
    return hours


def gemms() -> list[Comparison]:
    """The fit of the FP8 GEMMs at the points that it was fitted to."""
    table = efficiency()["gemm"]["fp8"]
    rate, k0 = fit_gemm("fp8")
    units = device(table["device"]).units
    return [
        Comparison(
            f"{g} x {m} x {n} x {k}",
            tflops,
            rate * wave_fill((g, m, n, k), units) * k / (k + k0),
            "TFLOPS",
            table["source"],
        )
        for g, m, n, k, tflops in table["points"]
    ]


PAGE = """\
# The planner against what was published

This page is written by `python -m bessemer.plan.validate`, and a test keeps it up to date. The planner's inputs are
makers' figures (`plan/hardware.toml`), published measurements of single kernels and collectives
(`plan/efficiency.toml`), and one number of a training profile: kernels take {in_step:g} x as long within a step as
alone (the compute streams of the public DeepSeek trace are busy 124.3 ms; the same kernels alone take 103.6). Published
throughputs and GPU hours are in `plan/claims.toml` and `plan/validation.toml`, and no prediction reads them. Errors are
stated as they are: nothing was tuned to reduce one. Routing is balanced throughout.

    bessemer plan v3 --cluster 2048xH800 --html v3.html    cost, memory, timeline, savings of each idea
    bessemer plan v3 --cluster 1024xH100 --search          the best layout that fits, and why others do not
    bessemer plan mine.toml --cluster 64xH100 --set batch=2048 precision=bf16 recompute=attend
    bessemer plan mine.toml --here                         this machine, measured for a few seconds
    bessemer plan --audit deepseek-v3                      claims next to predictions

## DeepSeek-V3 on 2,048 H800

`bessemer plan --audit deepseek-v3`

{claims}

The planner does not know how uneven the expert loads of a micro-batch are in real training. A trillion tokens take, by
the load of the busiest of the 64 ranks over the mean:

{imbalances}

The context extension used another, undocumented layout, and long sequences cost more than their FLOPs. Serving is
planned for an even load, whereas the published number of nodes follows the load of the day. A prefill rate of 72
thousand tokens per second is what 32 GPUs reach when they always have prompts of 4K; the published rate is a mean over
the actual demand.

## A step of DeepSeek-V3, part by part (ISCA 2025, Table 4)

{isca}

Stages have nearly equal work: 4 layers on each of 15, and the last main layer, MTP and both uses of the head on the
last; the reports do not specify this. With equal numbers of layers the bubble would be twice as large. The difference
is in the overlapped pairs, {count:.1f} per rank: {theirs:.0f} ms each in the published table, 129 in the trace below,
which has balanced routing and no pipeline, and {ours:.0f} here. Two effects are not modelled: waits inside a pair
(4 %: 129 ms in the trace, of which 124.3 are busy) and the cost of real routing and messages (8 %).

## The public training trace: 4 + 4 MoE layers on H800

{pair}

The second row is not a validation: the factor comes from this trace's busy time, though not from its length.

## Runs of other systems

{others}

Predictions assume fused kernels, no failures and the clock rates implied by the factor above. Runs with unfused
operations, lower power limits, or recomputation and waits that their authors do not describe are slower, here by up to
40 %: a prediction is what a system with the best known kernels would reach.

{notes}

## Our own runs on CPUs

{own}

All trials of `bessemer plan recipes/tiny.toml --here` on 2 cores of a Xeon. The first ran on an idle machine; its
corpus was planned at 60 s and took 16, because the files were already there, and everything else was measured. The
others, of pre-training only, shared the machine with other work: where the load stayed the same, plan and run agree
(-3 %); where it changed, a measurement of a few seconds did not represent the following minutes.

Memory: planned sizes of what a rank holds before a step are exact to the byte; those of what it saves and uses within
a step are within 5 % of what torch's allocator counted in real gloo processes (`tests/plan/test_memory.py`).

## Calibration: the fit of the FP8 GEMMs

{gemms}

TFLOPS = R q K / (K + K0), where q is the share of multiprocessors that have a tile, over all waves: R = {r8:,.0f},
K0 = {k8:,.0f}; for BF16 on H100, R = {r16:,.0f}, K0 = {k16:,.0f}. Attention on H100: forward {forward:.0f}, backward
{backward:.0f} TFLOPS in the limit of long sequences, with a fixed cost of {l0:.0f} tokens.
"""


def page() -> str:
    """The text of docs/planner.md."""
    alone, inside, runs, uneven = pair(), pair(IN_STEP), other_runs(), imbalances()
    (r8, k8), (r16, k16), (forward, backward, l0) = fit_gemm("fp8"), fit_gemm("bf16"), attention_rates()
    claims = [
        (f"{one.claim}, {one.unit}", f"{one.published:,.6g}", f"{one.predicted:,.4g}", percent(one.error), one.verdict)
        for one in audit.deepseek_v3()
    ]
    hours = [("thousand GPU hours", *(f"{n:.1f}" for _, n in uneven))]
    return PAGE.format(
        in_step=IN_STEP, r8=r8, k8=k8, r16=r16, k16=k16, forward=forward, backward=backward, l0=l0,
        claims=table(("claim", "published", "predicted", "error", "verdict"), claims),
        imbalances=table(("busiest rank", *(f"{busiest:g} x" for busiest, _ in uneven)), hours),
        isca=rows(isca()), others=rows(runs), gemms=rows(gemms()), own=rows(local_runs()),
        **_pairs(),
        pair=rows([replace(alone, what="from kernels alone"), replace(inside, what=f"with the factor {IN_STEP:g}")]),
        notes="\n".join(f"- {run.what}: {run.note}." for run in runs),
    )  # fmt: skip


def _pairs() -> dict[str, float]:
    """Overlapped pairs: how many a rank has, and the published and predicted ms of one."""
    step = audit.v3().step
    count = sum(step.timeline.pairs) / step.table.ranks
    seconds = read_toml("claims.toml")["isca"]["pairs"]
    return {"count": count, "theirs": 1e3 * seconds / count, "ours": 1e3 * step.parts["pairs"] / count}


def local_runs() -> list[Comparison]:
    """Stages of this repository's recipes: seconds as predicted by `bessemer plan RECIPE --here`, and as measured."""
    return [
        Comparison(f"{run['what']}; {run['load']}", run["measured"], run["planned"], run["unit"], "")
        for run in read_toml("validation.toml")["own"]
    ]


def percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def rows(comparisons: list[Comparison]) -> str:
    cells = [
        (r.what, f"{r.published:,.5g} {r.unit}", f"{r.predicted:,.4g} {r.unit}", percent(r.error)) for r in comparisons
    ]
    return table(("what", "published" if comparisons[0].note else "measured", "predicted", "error"), cells)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))


if __name__ == "__main__":
    from pathlib import Path

    Path("docs/planner.md").write_text(page(), encoding="utf-8")
