"""Can a published cost be true? Three views of it, none of which uses it: `bessemer audit NAME --draws N`.

    inside      the planner under every draw of its uncertain inputs (`chance`)
    outside     the planner's point prediction, corrected by its errors on all other published runs
    reference   large runs that others published, as 6 N D FLOPs per GPU second, and the bill at their rate

The batch ramp, the context extension and post-training are not drawn: the ramp costs the share that the plan gives it,
and the hours are those of pre-training only.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from bessemer.addons.plan.cost import RunPlan
from bessemer.addons.plan.step_time import step_time
from bessemer.errors import UserError
from bessemer_claims import audit, chance, planner_page
from bessemer_claims.chance import Draws, Quantiles
from bessemer_claims.registry import citation, read_toml

TIMES = (2, 5, 10)
LEAST_DRAWS = 20


@dataclass(frozen=True)
class Held:
    """A published run of another system and its prediction."""

    name: str
    published: float
    point: float
    """Tokens per second per GPU that the planner predicts with its usual inputs."""
    drawn: Quantiles
    recorded: Quantiles
    """The point prediction with the planner's errors on the runs looked at before."""
    seen: bool
    """Looked at before the ranges were set."""

    @property
    def error(self) -> float:
        """The relative error of the point prediction."""
        return self.point / self.published - 1


@dataclass(frozen=True)
class Credibility:
    """What the three views say of V3's pre-training; hours in millions, prices in million dollars."""

    draws: int
    seed: int
    published: float
    published_usd: float
    hours: np.ndarray
    usd: np.ndarray
    inputs: list[dict[str, Any]]
    """For every input: its range and source, its rank correlation with the hours, its share of their variance in %."""
    outside: Quantiles
    others: list[Held]
    reference: list[dict[str, Any]]
    false: list[dict[str, Any]]
    """For each factor by which the published hours may be too low: what would have to hold."""

    @property
    def test(self) -> list[Held]:
        return [run for run in self.others if not run.seen]

    @property
    def inside(self) -> Quantiles:
        return Quantiles.of(self.hours)

    @property
    def covered(self) -> tuple[int, int]:
        """How many test runs lie inside their 90 % intervals: (of the draws, of the record)."""
        return (
            sum(run.drawn.holds(run.published) for run in self.test),
            sum(run.recorded.holds(run.published) for run in self.test),
        )

    def facts(self) -> dict[str, Any]:
        return {
            "draws": self.draws, "seed": self.seed, "published_million_gpu_hours": self.published,
            "published_million_usd": self.published_usd, "inside_million_gpu_hours": vars(self.inside),
            "inside_million_usd": vars(Quantiles.of(self.usd)),
            "percentile": chance.percentile(self.hours, self.published),
            "percentile_usd": chance.percentile(self.usd, self.published_usd),
            "outside_million_gpu_hours": vars(self.outside), "inputs": self.inputs,
            "reference": [run | {"citation": run["citation"].facts()} for run in self.reference],
            "would_have_to_be_false": self.false,
            "test_runs": {
                "runs": len(self.test), "inside_90_of_draws": self.covered[0],
                "inside_90_of_record": self.covered[1],
                "median_error_percent": 100 * statistics.median(abs(run.error) for run in self.test),
            },
            "other_runs": [
                {"name": run.name, "seen_before": run.seen, "published": run.published, "point": run.point,
                 "error": run.error, "drawn": vars(run.drawn), "recorded": vars(run.recorded)}
                for run in self.others
            ],
        }  # fmt: skip

    def _warning(self) -> list[str]:
        """If the draws fail their test, what that means for the inside view."""
        inside, fast = self.covered[0], sum(run.published > run.drawn.high for run in self.test)
        if inside >= 0.9 * len(self.test):
            return []
        return [
            f"The draws fail this test: {fast} of {len(self.test)} runs are faster than their interval, "
            f"{len(self.test) - inside - fast} slower. The ranges are not right, so a published figure outside the "
            "inside view is not evidence against it."
        ]

    def describe(self) -> str:
        inside, usd, hours = self.inside, Quantiles.of(self.usd), "M GPU hours"
        at, at_usd = chance.percentile(self.hours, self.published), chance.percentile(self.usd, self.published_usd)
        error = 100 * statistics.median(abs(one.error) for one in self.test)
        lines = [
            f"DeepSeek-V3, pre-training: {self.published:.3f}{hours}, ${self.published_usd:.2f}M as published; "
            f"{self.draws} draws, seed {self.seed}",
            "",
            f"inside view    {_range(inside, hours)}; {at:.0f} % of the draws are below the published figure",
            f"               ${usd.median:.1f}M ({usd.low:.1f} to {usd.high:.1f}); {at_usd:.0f} % are below the "
            "published bill",
            f"outside view   {_range(self.outside, hours)}: the planner's errors on {len(self.others)} other runs",
            "",
            "which inputs matter: rank correlation with the hours, share of their variance",
            *(f"  {one['correlation']:+.2f} {one['variance']:3.0f} %  {one['what']}: {one['range']} [{one['source']}]"
              for one in sorted(self.inputs, key=lambda one: -one["variance"])),
            "",
            "for the published hours to be too low, this would have to hold",
            *(f"  {one['times']} x: {one['text']}" for one in self.false),
            "",
            "what others published, and V3's bill at their rate",
            *(f"  {run['name']:<32} {run['v3_hours']:5.2f}{hours}, ${2 * run['v3_hours']:5.2f}M at $2 [{run['source']}]"
              for run in self.reference),
            "",
            f"{len(self.test)} runs that nothing was tuned on: the point prediction's median error is {error:.0f} %; "
            f"{self.covered[1]} lie in the 90 % interval of the planner's record on the "
            f"{len(self.others) - len(self.test)} runs looked at before, {self.covered[0]} in that of the same draws",
            *self._warning(),
        ]  # fmt: skip
        for seen, title in ((False, "test"), (True, "looked at before")):
            lines.append(f"  {title}: tokens/s/GPU published, predicted, error, 90 % by draws, by record")
            lines += [
                f"    {one.name:<56} {one.published:7,.0f} {one.point:7,.0f} {100 * one.error:+5.0f} %  "
                f"{one.drawn.low:,.0f} to {one.drawn.high:,.0f} ({_side(one, one.drawn)}), {one.recorded.low:,.0f} to "
                f"{one.recorded.high:,.0f} ({_side(one, one.recorded)})"
                for one in self.others
                if one.seen == seen
            ]
        return "\n".join(lines)


def _side(run: Held, interval: Quantiles) -> str:
    return "inside" if interval.holds(run.published) else "faster" if run.published > interval.high else "slower"


def _range(quantiles: Quantiles, unit: str) -> str:
    return f"{quantiles.median:.2f}{unit} (90 %: {quantiles.low:.2f} to {quantiles.high:.2f})"


@cache
def reference() -> list[dict[str, Any]]:
    """Large runs that others published, and V3's million GPU hours at their rate, from 6 N D."""
    runs: list[dict[str, Any]] = read_toml("reference.toml")["run"]
    own = runs[0]
    for run in runs:
        run |= {key: run.get(key, False) for key in ("small", "same_network")}
        run["citation"] = cited = citation(run["source"])
        run["source"] = "; ".join(filter(None, (cited.label(0), run.get("note"))))
        if "hours" in run:
            run["tokens_s"] = run["tokens"] / run["hours"] / 3600
        run["tflops"] = 6 * run["active"] * run["tokens_s"] / 1e12
        run["v3_hours"] = 6 * own["active"] * own["tokens"] / (run["tflops"] * 1e12) / 3600 / 1e6
    return runs


def slowest(small: bool) -> float:
    """The most million GPU hours that V3 would take at the rate of a listed run: of a large one, or of any."""
    return max(run["v3_hours"] for run in reference() if small or not run["small"])


@cache
def outside_view() -> Quantiles:
    """Million GPU hours if V3's pre-training differs from its prediction as other runs differ from theirs."""
    runs = [*planner_page.other_runs(), *planner_page.held_out()]
    record = chance.next_one([run.predicted / run.published for run in runs])
    hours = audit.v3().gpu_hours / 1e6
    return Quantiles(hours * record.low, hours * record.median, hours * record.high)


@cache
def inside_view(draws: int, seed: int) -> np.ndarray:
    """Million GPU hours of V3's pre-training under every draw."""
    plan, values = audit.v3(), chance.draw(draws, seed)
    ramp = plan.gpu_hours / (plan.hours_per_trillion * plan.tokens / 1e12)
    return ramp * plan.tokens / chance.rates(plan.setup, values, True) / 3600e6 / values["training"]


@cache
def credibility(name: str, draws: int, seed: int) -> Credibility:
    """The three views of an audit; UserError for an unknown audit and for fewer than `LEAST_DRAWS` draws."""
    audit.check(name)
    if draws < LEAST_DRAWS:
        raise UserError(f"--draws {draws}: an interval needs at least {LEAST_DRAWS}; the usual number is 400")
    plan, values = audit.v3(), chance.draw(draws, seed)
    published = read_toml("reports.toml")["pretraining"]["value"] / 1e3
    hours = inside_view(draws, seed)
    others, record = [], chance.next_one([run.published / run.predicted for run in planner_page.other_runs()])
    for runs, seen in ((read_toml("validation.toml")["run"], True), (read_toml("heldout.toml")["run"], False)):
        for run in runs:
            setup = planner_page.setup_of(run)
            point = setup.step_tokens / step_time(setup).seconds / setup.layout.world
            recorded = Quantiles(*(point * ratio for ratio in (record.low, record.median, record.high)))
            drawn = Quantiles.of(chance.rates(setup, values))
            others.append(Held(run["name"], run["tokens_s"], point, drawn, recorded, seen))
    return Credibility(
        draws, seed, published, 2 * published, hours, hours * values["price"], _inputs(values, hours), outside_view(),
        others, reference(), [_false(plan, times, published, hours) for times in TIMES],
    )  # fmt: skip


def _inputs(values: Draws, hours: np.ndarray) -> list[dict[str, Any]]:
    """The price is left out: it changes the bill, not the hours."""
    inputs = [row for row in read_toml("ranges.toml")["input"] if row["name"] != "price"]
    correlations = [chance.rank_correlation(values[row["name"]], hours) for row in inputs]
    total = sum(r**2 for r in correlations)
    return [
        {
            "name": row["name"], "what": row["what"], "source": row["source"], "correlation": r,
            "variance": 100 * r**2 / total,
            "range": f"yes {100 * row['chance']:.0f} %" if "chance" in row
            else f"{row['low']:g} to {row['high']:g}, most likely {row['mode']:g}",
        }
        for row, r in zip(inputs, correlations, strict=True)
    ]  # fmt: skip


def _false(plan: RunPlan, times: int, published: float, hours: np.ndarray) -> dict[str, Any]:
    """What would have to hold if the run took `times` the published hours."""
    setup, true = plan.setup, times * published * 1e6
    rate = plan.tokens / true / 3600
    use = rate * setup.shape.flops(setup.length) / (setup.device.bf16 * 1e12)
    slow = plan.gpu_hours / setup.in_step  # GPU hours if kernels were as fast as alone and all time were kernels
    others = (
        f"at the rate of the slowest large run listed V3 would need {slowest(False):.1f}M GPU hours, of the slowest "
        f"of a small network {slowest(True):.1f}M, this {true / 1e6:.1f}M"
    )
    return {
        "times": times, "million_gpu_hours": true / 1e6, "tokens_per_second_per_gpu": rate, "mfu_bf16": use,
        "in_step": true / slow,
        "days_on_2048": true / 2048 / 24, "share_of_draws": float(np.mean(hours * 1e6 >= true)),
        "text": (
            f"{rate:,.0f} tokens/s/GPU, {100 * use:.1f} % of the BF16 peak; kernels {true / slow:.1f} x as long in "
            f"a step as alone; {true / 2048 / 24:,.0f} days on 2,048 GPUs, or {2048 * times:,} GPUs for the published "
            f"days; {others}"
        ),
    }  # fmt: skip
