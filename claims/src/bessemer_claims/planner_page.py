"""Predictions next to published values, with every error.

`python -m bessemer_claims.planner_page` writes docs/planner.md. The model is calibrated on `efficiency.toml` (single
kernels) and `IN_STEP` (one number from a training profile) and validated on `reports.toml` and `validation.toml`.
`planner_page.toml` has the text of the page. A test compares the page with the output of this module.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.plan import layer_time
from bessemer.addons.plan.hardware import attention_rates, device, efficiency, fit_gemm, wave_fill
from bessemer.addons.plan.layer_time import layer_times
from bessemer.addons.plan.step_time import step_time
from bessemer.addons.plan.training_setup import IN_STEP, ModelShape, Setup
from bessemer.model.config import ModelConfig, preset
from bessemer_claims import audit, chance
from bessemer_claims.registry import read_toml


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


def held_out() -> list[Comparison]:
    """Held-out runs of other systems, which no parameter was set by."""
    return [_predict(run) for run in read_toml("heldout.toml")["run"]]


def _predict(run: dict[str, Any]) -> Comparison:
    setup = setup_of(run)
    rate = setup.step_tokens / step_time(setup).seconds / setup.layout.world
    return Comparison(run["name"], run["tokens_s"], rate, "tokens/s/GPU", f"{run['source']}. Assumed: {run['assumed']}")


def setup_of(run: dict[str, Any]) -> Setup:
    """The setup of a published run of another system."""
    on = device(run["device"])
    if "bandwidth" in run:
        on = replace(on, bandwidth=run["bandwidth"])
    if "shape" in run:
        values = run["shape"]
        shape = ModelShape(**values, dense=0 if "experts" in values else values["n_layers"])
    else:
        shape = ModelShape.of(preset(run["preset"]) if "preset" in run else ModelConfig.make(run["model"]))
    pp, ep, rows = run.get("pp", 1), run.get("ep", 1), run.get("micro_rows", 1)
    layout = Layout(pp, run["gpus"] // (pp * ep), ep, on.devices)
    setup = Setup(
        shape, layout, on, run["schedule"], 1, rows, run["seq"], run["precision"] == "fp8",
        recompute=tuple(run.get("recompute", ())), fsdp=run.get("fsdp", False), tp=run.get("tp", 1),
        tp_overlap=run.get("tp_overlap", False), cp=run.get("cp", 1), slices=run.get("slices", 2),
    )  # fmt: skip
    return replace(setup, micro=max(1, run["batch"] // (setup.piece * rows)))


def isca() -> list[Comparison]:
    """The parts of a step of V3, as means over the ranks of a pipeline."""
    measured, parts = read_toml("reports.toml")["isca"], audit.v3().step.parts
    names = {"forward": "1F", "bubble": "bubble", "backward": "1B", "weights": "1W", "pairs": "1F1B"}
    names["optimizer"] = "optimizer"
    return [Comparison(name, measured[part], parts[part], "s", audit.cited(measured)) for part, name in names.items()]


def pair(in_step: float = 1.0) -> Comparison:
    """An overlapped pair of 4 + 4 layers, as in the public trace."""
    trace = read_toml("reports.toml")["trace"]
    setup = replace(audit.v3().setup, in_step=in_step)
    times = layer_times(setup, False, efficiency()["exchange"]["units"])
    predicted = 1e3 * layer_time.pair([times] * 4, [times] * 4)
    return Comparison("4 + 4 layers", trace["pair_ms"], predicted, "ms", audit.cited(trace))


def imbalances() -> list[tuple[float, float]]:
    """(ratio of the busiest expert rank's load to the mean, thousand GPU hours per trillion tokens of V3)."""
    setup = audit.v3().setup
    hours = []
    for busiest in (1.0, 1.1, 1.2, 1.3):
        other = replace(setup, imbalance=busiest)
        hours.append((busiest, 1e9 / other.step_tokens * step_time(other).seconds * other.layout.world / 3600))
    return hours


def gemms() -> list[Comparison]:
    """The FP8 GEMM fit at the points to which it was fitted."""
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


def outside_view() -> dict[str, float]:
    """The planner's record on other runs, and V3's pre-training in million GPU hours if it is like them."""
    runs, tested = other_runs(), held_out()
    record = chance.next_one([run.published / run.predicted for run in (*runs, *tested)])
    before = chance.next_one([run.published / run.predicted for run in runs])
    hours = audit.v3().gpu_hours / 1e6
    fast = [100 * run.error for run in runs if run.error > 0.25]
    return {
        "n_others": len(runs), "n_tested": len(tested), "n_all": len(runs) + len(tested),
        "n_fast": len(fast), "fast_low": min(fast), "fast_high": max(fast), "record": record.median,
        "median": hours / record.median,
        "low": hours / record.high, "high": hours / record.low,
        "tested_error": 100 * statistics.median(abs(run.error) for run in tested),
        "tested_inside": sum(before.holds(run.published / run.predicted) for run in tested),
    }  # fmt: skip


def page() -> str:
    """The text of docs/planner.md."""
    alone, inside, runs, uneven = pair(), pair(IN_STEP), other_runs(), imbalances()
    tested = held_out()
    (r8, k8), (r16, k16), (forward, backward, l0) = fit_gemm("fp8"), fit_gemm("bf16"), attention_rates()
    claims = [
        (
            f"{part.claim}, {part.unit}",
            f"{part.published:,.6g}",
            f"{part.predicted:,.4g}",
            percent(part.error),
            part.verdict,
        )
        for part in audit.deepseek_v3()
    ]
    hours = [("thousand GPU hours", *(f"{n:.1f}" for _, n in uneven))]
    return read_toml("planner_page.toml")["text"].format(
        in_step=IN_STEP, r8=r8, k8=k8, r16=r16, k16=k16, forward=forward, backward=backward, l0=l0,
        claims=table(("claim", "published", "predicted", "error", "verdict"), claims),
        imbalances=table(("busiest rank", *(f"{busiest:g} x" for busiest, _ in uneven)), hours),
        **outside_view(), isca=rows(isca()), others=rows(runs), tested=rows(tested), gemms=rows(gemms()),
        own=rows(local_runs()),
        **_pairs(),
        pair=rows([replace(alone, what="from kernels alone"), replace(inside, what=f"with the factor {IN_STEP:g}")]),
        notes="\n".join(f"- {run.what}: {run.note}." for run in (*runs, *tested)),
    )  # fmt: skip


def _pairs() -> dict[str, float]:
    """Overlapped pairs: how many a rank has, and the published and predicted ms of one."""
    step = audit.v3().step
    count = sum(step.timeline.pairs) / step.table.ranks
    seconds = read_toml("reports.toml")["isca"]["pairs"]
    return {"count": count, "theirs": 1e3 * seconds / count, "ours": 1e3 * step.parts["pairs"] / count}


def local_runs() -> list[Comparison]:
    """Stages of this repository's recipes: seconds predicted by `bessemer plan RECIPE --here` and measured."""
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
