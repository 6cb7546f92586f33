"""The audits: random draws, intervals, the three views of a published cost, the page of the planner's errors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.plan.hardware import device
from bessemer.addons.plan.step_time import step_time
from bessemer.addons.plan.training_setup import ModelShape, Setup
from bessemer.cli import app
from bessemer.errors import UserError
from bessemer_claims import audit, chance, credibility, planner_page
from bessemer_claims.registry import read_toml

LLAMA = ModelShape(128256, 8192, 80, 80, 28672, heads=64, kv_heads=8)
PLAIN = Setup(LLAMA, Layout(8, 8), device("H100"), "1f1b", 16, 1, 8192)


@pytest.mark.slow
def test_the_page_is_what_the_planner_says_now():
    page = Path(__file__).parents[2] / "docs" / "planner.md"
    assert page.read_text(encoding="utf-8") == planner_page.page(), (
        "docs/planner.md is out of date; run python -m bessemer_claims.planner_page"
    )


def test_the_verdicts_of_the_audit():
    lines = json.loads(CliRunner().invoke(app, ["audit", "deepseek-v3", "--json"]).output)
    assert {line["verdict"] for line in lines} >= {"exact", "within 10%", "within 35%", "missed"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deepsek"], "did you mean deepseek-v3"),
        (["deepseek-v3", "--seed", "1"], "--seed has no effect without --draws"),
        (["deepseek-v3", "--draws", "3"], "at least 20"),
    ],
)
def test_an_audit_that_cannot_be_made(arguments, words):
    assert words in str(CliRunner().invoke(app, ["audit", *arguments]).exception)


def test_draws_have_their_distribution():
    values = chance.draw(1000, 3)
    for row in read_toml("ranges.toml")["input"]:
        drawn = values[row["name"]]
        if "chance" in row:
            assert drawn.mean() == pytest.approx(row["chance"], abs=0.002)
            continue
        low, mode, high = row["low"], row["mode"], row["high"]
        assert low <= drawn.min() and drawn.max() <= high
        assert drawn.mean() == pytest.approx((low + mode + high) / 3, rel=1e-3)
        below = np.mean(drawn < mode)
        assert below == pytest.approx((mode - low) / (high - low), abs=0.002), "every share is drawn once"
    again, other = chance.draw(1000, 3), chance.draw(1000, 4)
    assert all((values[name] == again[name]).all() for name in values) and (values["gemm"] != other["gemm"]).any()


def test_batched_step_times_equal_single_ones():
    v3 = audit.v3().setup
    shared = (replace(v3, layout=Layout(4, 2, 64), micro=8), replace(PLAIN, schedule="interleaved", slices=5, tp=2))
    for setup in shared:
        setups = list(chance.drawn(setup, chance.draw(5, 0), setup.shape.experts > 0))
        alone = [step_time(case).seconds for case in setups]
        assert chance.step_seconds(setups).tolist() == pytest.approx(alone, rel=1e-12)


def test_the_prediction_interval_covers():
    """In 4,000 simulated records of eight runs, 90 % of ninth runs fall inside the interval."""
    generator = np.random.default_rng(0)
    runs = np.exp(generator.normal(-0.3, 0.2, (4000, 9)))
    inside = [chance.next_one(list(eight)).holds(ninth) for *eight, ninth in runs]
    assert np.mean(inside) == pytest.approx(0.90, abs=0.015)


def test_rank_correlation_and_percentile():
    x = np.arange(100.0)
    assert chance.rank_correlation(x, x**3) == pytest.approx(1) and chance.rank_correlation(x, -x) == pytest.approx(-1)
    assert chance.percentile(x, 18.0) == 18
    assert chance.Quantiles.of(x) == chance.Quantiles(*np.quantile(x, (0.05, 0.5, 0.95)).tolist())


def test_the_credibility_of_the_published_cost(monkeypatch):
    """Reproducible, and honest about how it does on its own test."""
    small = {name: {"run": read_toml(name)["run"][:2]} for name in ("validation.toml", "heldout.toml")}
    monkeypatch.setattr(credibility, "read_toml", lambda name: small.get(name) or read_toml(name))
    call = ["audit", "deepseek-v3", "--draws", "20", "--seed", "5"]
    facts = json.loads(CliRunner().invoke(app, [*call, "--json"]).output)
    credibility.credibility.cache_clear()
    credibility.inside_view.cache_clear()
    assert json.loads(CliRunner().invoke(app, [*call, "--json"]).output) == facts
    inside = facts["inside_million_gpu_hours"]
    assert 2 < inside["low"] < inside["median"] < inside["high"] < 6 and facts["published_million_gpu_hours"] == 2.664
    assert sum(row["variance"] for row in facts["inputs"]) == pytest.approx(100)
    twice = facts["would_have_to_be_false"][0]
    assert twice["million_gpu_hours"] == 2 * 2.664
    assert twice["tokens_per_second_per_gpu"] == pytest.approx(14.8e12 / (2 * 2.664e6 * 3600))
    assert {row["seen_before"] for row in facts["other_runs"]} == {True, False}
    printed = CliRunner().invoke(app, call).output
    assert "what would" not in printed and "The draws fail this test" in printed and "Llama 4 Scout" in printed
    with pytest.raises(UserError, match="an interval needs at least 20"):
        credibility.credibility("deepseek-v3", 3, 0)
    with pytest.raises(UserError, match="did you mean deepseek-v3"):
        credibility.credibility("deepseek-v4", 100, 0)


def test_tuning_and_test_runs_are_disjoint():
    """No run is used both for tuning and for the test, and no range has a test run as its source."""
    tuned, test = (read_toml(name)["run"] for name in ("validation.toml", "heldout.toml"))
    assert not {(run["source"], run["tokens_s"]) for run in tuned} & {(run["source"], run["tokens_s"]) for run in test}
    assert len(test) == 16 and all({"source", "assumed"} <= run.keys() for run in test)
    assert all(row["source"] for row in read_toml("ranges.toml")["input"])
