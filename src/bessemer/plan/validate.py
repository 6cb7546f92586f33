"""Predictions beside what was published, with every error: `python -m bessemer.plan.validate` writes docs/planner.md.

Calibration data are in `efficiency.toml` (single kernels) and `setup.IN_STEP` (one number of one training profile);
validation data in `claims.toml` and `validation.toml`. A test compares the page with what this writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bessemer.dist.mesh import Layout
from bessemer.model.config import ModelConfig
from bessemer.model.presets import preset
from bessemer.plan import audit, layer_time
from bessemer.plan.hardware import attention_rates, device, efficiency, fit_gemm, read_toml, wave_fill
from bessemer.plan.layer_time import layer_times
from bessemer.plan.step_time import step_time
from bessemer.plan.training_setup import IN_STEP, ModelShape, Setup


@dataclass(frozen=True)
class Comparison:
    """One comparison."""

    what: str
    published: float
    predicted: float
    unit: str
    note: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def others() -> list[Comparison]:
    """Runs of other systems: tokens a second and device."""
    return [_other(run) for run in read_toml("validation.toml")["run"]]


def _other(run: dict[str, Any]) -> Comparison:
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
    said, parts = read_toml("claims.toml")["isca"], audit.v3().step.parts
    names = {
        "forward": "1F",
        "bubble": "bubble",
        "backward": "1B",
        "weights": "1W",
        "pairs": "1F1B",
        "optimizer": "optimizer",
    }
    return [Comparison(names[part], said[part], parts[part], "s", said["source"]) for part in names]


def pair(in_step: float = 1.0) -> Comparison:
    """The 4 + 4 layers of the public trace, from kernels alone."""
    said = read_toml("claims.toml")["trace"]
    own = replace(audit.v3().setup, in_step=in_step)
    times = layer_times(own, False, efficiency()["exchange"]["units"])
    return Comparison(
        "4 + 4 layers", said["pair_ms"], 1e3 * layer_time.pair([times] * 4, [times] * 4), "ms", said["source"]
    )


def imbalances() -> list[tuple[float, float]]:
    """(busiest expert rank over the mean, thousand GPU hours a trillion tokens of V3)."""
    own = audit.v3().setup
    found = []
    for busiest in (1.0, 1.1, 1.2, 1.3):
        other = replace(own, imbalance=busiest)
        found.append((busiest, 1e9 / other.step_tokens * step_time(other).seconds * other.layout.world / 3600))
    return found


def gemms() -> list[Comparison]:
    """The fit of the FP8 GEMMs against the points it was made of."""
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


def _table(rows: list[Comparison]) -> list[str]:
    lines = ["| what | published | predicted | error |", "|---|---|---|---|"]
    lines += [
        f"| {r.what} | {r.published:,.5g} {r.unit} | {r.predicted:,.4g} {r.unit} | {100 * r.error:+.1f} % |"
        for r in rows
    ]
    return lines


PAGE = """\
# The planner against what was published

Written by `python -m bessemer.plan.validate`; a test compares. What the planner takes as given: makers' figures
(`plan/hardware.toml`), published measurements of single kernels and collectives (`plan/efficiency.toml`), and one
number of a training profile: kernels take {in_step:g} x as long within a step as alone (compute streams of the public
DeepSeek trace are busy 124.3 ms, the same kernels alone take 103.6). Published throughputs and hours are in
`plan/claims.toml` and `plan/validation.toml`, and no prediction reads them. Errors are stated as they are, nothing is
tuned to make one smaller. Routing is balanced throughout.

    bessemer plan v3 --cluster 2048xH800 --html v3.html    cost, memory, timeline, what each idea is worth
    bessemer plan v3 --cluster 1024xH100 --search          the best layout that fits, and why others do not
    bessemer plan mine.toml --cluster 64xH100 --set batch=2048 precision=bf16 recompute=attend
    bessemer plan mine.toml --here                         this machine, measured for some seconds
    bessemer plan --audit deepseek-v3                      claims beside predictions

## DeepSeek-V3 on 2,048 H800

`bessemer plan --audit deepseek-v3`

{claims}

What the planner does not know: how uneven the experts of one micro-batch are in real training. If the busiest of the
64 ranks has so many times the mean, a trillion tokens take

{imbalances}

The context extension was laid out otherwise (undocumented), and long sequences cost more than their FLOPs. Serving is
planned as if work came evenly; the published nodes follow the day. What is read at 72 thousand tokens a second is what
32 GPUs can do that always have prompts of 4K; the published rate is a mean of what there was to do.

## A step of DeepSeek-V3, part by part (ISCA 2025, Table 4)

{isca}

Stages are those of nearly equal work: 4 layers on each of 15, and the last main layer, MTP and both uses of the head
on the last, which the reports leave open. With equal numbers of layers the bubble is twice as large. What is missing
is in the pairs, {count:.1f} a rank: {theirs:.0f} ms each in this table, 129 in the trace below, which is balanced and
has no pipeline, {ours:.0f} here. Neither the waits inside a pair (4 %: the trace's 129 against its busy 124.3) nor what
real routing and messages add (8 %) are modelled.

## The public training trace: 4 + 4 MoE layers on H800

{pair}

The second line is no validation: the factor comes from this trace's busy time (not from its length).

## Runs of other systems

{others}

Every prediction is of a run with fused kernels, without failures and at the clocks of the factor above. Runs with
operations that are not fused, at lower power, or with recomputation and waiting that their authors do not describe
stay below it, here by up to 40 %: read a prediction as what a system of the best known kernels would reach.

{notes}

## Our own runs on CPUs

{own}

`bessemer plan recipes/tiny.toml --here` on 2 cores of a Xeon, every trial that was made. First the one on a quiet
machine: the corpus was planned at 60 s and took 16 (its files were there already), everything else was measured. The
others, pre-training alone, had other work beside them: where the load stayed as it was while measuring, plan and run
agree (-3 %); where it did not, what some seconds showed was not what the following minutes were like.

Memory: what ranks hold before a step is planned to the byte, what they keep and use in it within 5 % of what torch's
allocator counted in real gloo processes (`tests/plan/test_memory.py`).

## Calibration: the fit of the FP8 GEMMs

{gemms}

TFLOPS = R q K / (K + K0), q the share of the last wave of tiles that is full: R = {r8:,.0f}, K0 = {k8:,.0f}; for BF16
on H100 R = {r16:,.0f}, K0 = {k16:,.0f}. Attention: forward {forward:.0f}, backward {backward:.0f} TFLOPS on H100 for
endless sequences, {l0:.0f} tokens of fixed cost.
"""


def page() -> str:
    """docs/planner.md."""
    alone, inside, runs, uneven = pair(), pair(IN_STEP), others(), imbalances()
    (r8, k8), (r16, k16), (forward, backward, l0) = fit_gemm("fp8"), fit_gemm("bf16"), attention_rates()
    claims = [
        (f"{one.claim}, {one.unit}", f"{one.published:,.6g}", f"{one.predicted:,.4g}", percent(one.error), one.verdict)
        for one in audit.deepseek_v3()
    ]
    busy = [("thousand GPU hours", *(f"{hours:.1f}" for _, hours in uneven))]
    return PAGE.format(
        in_step=IN_STEP, r8=r8, k8=k8, r16=r16, k16=k16, forward=forward, backward=backward, l0=l0,
        claims=table(("claim", "published", "predicted", "error", "verdict"), claims),
        imbalances=table(("busiest rank", *(f"{busiest:g} x" for busiest, _ in uneven)), busy),
        isca=rows(isca()), others=rows(runs), gemms=rows(gemms()), own=rows(own()),
        **_pairs(),
        pair=rows([replace(alone, what="from kernels alone"), replace(inside, what=f"with the factor {IN_STEP:g}")]),
        notes="\n".join(f"- {run.what}: {run.note}." for run in runs),
    )  # fmt: skip


def _pairs() -> dict[str, float]:
    """Overlapped pairs: how many a rank has, ms of one as published and as predicted."""
    step = audit.v3().step
    count = sum(step.timeline.pairs) / step.table.ranks
    said = read_toml("claims.toml")["isca"]["pairs"]
    return {"count": count, "theirs": 1e3 * said / count, "ours": 1e3 * step.parts["pairs"] / count}


def own() -> list[Comparison]:
    """Stages of this repository's recipes: seconds as `bessemer plan RECIPE --here` said before, and as measured."""
    return [
        Comparison(f"{run['what']}; {run['load']}", run["measured"], run["planned"], run["unit"], "")
        for run in read_toml("validation.toml")["own"]
    ]


def percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def rows(found: list[Comparison]) -> str:
    cells = [(r.what, f"{r.published:,.5g} {r.unit}", f"{r.predicted:,.4g} {r.unit}", percent(r.error)) for r in found]
    return table(("what", "published" if found[0].note else "measured", "predicted", "error"), cells)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Of Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))


if __name__ == "__main__":
    from pathlib import Path

    Path("docs/planner.md").write_text(page(), encoding="utf-8")
