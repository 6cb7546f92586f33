"""`bessemer run RECIPE --dry-run`: a cluster's layout, checked on one machine."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bessemer import cli
from bessemer.addons.plan import dry_run, plan_config
from bessemer.addons.plan.conformance import rows
from bessemer.addons.plan.hardware import parse_cluster
from bessemer.addons.plan.render import describe_search
from bessemer.addons.plan.search import search
from bessemer.addons.plan.step_time import step_time
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.model.config import preset

V3 = Path(__file__).parents[2] / "recipes" / "v3.toml"
TINY = V3.with_name("tiny.toml")


def test_v3_on_2048_ranks():
    run = dry_run.of_recipe(Recipe.load(V3), device_name="h800")
    assert run.layout.world == 2048 and run.fits
    assert [(point["micro"], point["schedule"]) for point in run.ramp] == [
        (24, "1f1b"),
        (32, "dualpipe"),
        (120, "dualpipe"),
    ]
    assert list(run.ranks) == [0, 1024, 1920]
    assert run.ranks[0] == run.ranks[1920], "DualPipe's ends hold the same two stages"
    output = dry_run.describe(run)
    assert "pipeline 15, copy 1: 1984 to 2047" in output and "fits on H800" in output
    assert not dry_run.of_recipe(Recipe.load(V3), device_name="RTX4090").fits


def test_v3_recipe_matches_the_paper():
    """Every item of V3's pre-training in the conformance table is as published; only the needle test is not."""
    recipe = Recipe.load(V3)
    v3 = [row for row in rows(recipe) if row["section"].startswith(("V3 2", "V3 3", "V3 4"))]
    assert [row["item"].split()[0] for row in v3 if row["state"] != "as published"] == ["Needle"]
    lr = recipe.stage("pretrain").lr
    expected = [2.2e-4, 1.21e-4, 2.2e-5, 7.3e-6]  # V3 4.2
    assert [lr(x) for x in (28.1e9, 12.15e12, 14.5e12, 14.7e12)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["layout.ep=3"], None, ["256 experts cannot be divided evenly among 3 ranks", "these fit"]),
        (["layout.dp=auto"], 2000, ["it makes 1024 ranks"]),
        (["layout.schedule=dualpipe"], None, ["a step of 3072 rows is too small", "4096 rows in all"]),
        (["layout.cp=2", 'pretrain.lengths=[["0",1024]]', "corpus.row_length=4098"], None, ["rows of 4098 tokens"]),
        (["layout.cp=3"], None, ["rows of 4096 tokens cannot be split into 6 equal chunks", "4098"]),
    ],
)
def test_impossible_layouts_are_refused(overrides, world, words):
    with pytest.raises(UserError) as caught:
        dry_run.of_recipe(Recipe.load(V3, overrides), world)
    assert all(word in str(caught.value) for word in words), caught.value


def test_context_parallelism_divides_rows_and_optimizer_state():
    """cp 4: the same weights, a quarter of the optimizer's share, and a quarter of a row."""
    plain, cut = (
        dry_run.of_recipe(Recipe.load(V3, ["layout.dp=2", f"layout.cp={cp}", "pretrain.fp8=off"]), device_name="h800")
        for cp in (1, 4)
    )
    assert cut.layout.world == 4 * plain.layout.world and cut.facts()["cp"] == 4 and cut.ramp == plain.ramp
    before, after = plain.ranks[0], cut.ranks[0]
    assert after["weights"] == pytest.approx(before["weights"], rel=0.01), "up to the filling"
    assert after["moments"] == pytest.approx(before["moments"] / 4, rel=0.01)
    assert after["activations"] < 0.26 * before["activations"]
    assert "4096 ranks" not in dry_run.describe(plain) and "pipeline 0, copy 1, piece 3: " in dry_run.describe(cut)


def test_planner_prices_context_parallelism():
    config = plan_config.of_recipe(Recipe.load(V3, ["layout.cp=2"]), None, 4096)
    cfg = preset("v3")
    cut = plan_config.setup(config, cfg, parse_cluster("4096xH800"))
    uncut = plan_config.setup(replace(config, cp=1), cfg, parse_cluster("2048xH800"))
    assert cut.layout.cp == cut.cp == 2 and cut.tokens == uncut.tokens // 2
    assert cut.step_tokens == uncut.step_tokens and step_time(cut).seconds > 0.5 * step_time(uncut).seconds
    best = search(cfg, replace(config, pp=8, ep=64, schedule="1f1b", micro_rows=1), parse_cluster("2048xH800"))
    layout = best.candidates[0].setup.layout
    assert (layout.cp, layout.dp, best.candidates[0].facts()["cp"]) == (2, 2, 2)
    assert "  cp" in describe_search(best) and f"{8:>4}{64:>5}{2:>5}{2:>4}" in describe_search(best)
    with pytest.raises(UserError, match="these fit"):
        search(cfg, replace(config, pp=8, ep=64, cp=3), parse_cluster("2048xH800"))


def test_a_recipe_without_pre_training():
    with pytest.raises(UserError, match='no "pretrain" stage'):
        dry_run.of_recipe(Recipe.load(V3.with_name("r1-paper.toml")))


def test_from_the_command_line(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bessemer", "run", str(TINY), *arguments])
        try:
            cli.main()
        except SystemExit as done:
            assert done.code in (0, 2, None)
        return capsys.readouterr()

    facts = json.loads(call("--dry-run", "--set", "layout.dp=auto", "--world", "4", "--json").out)
    assert facts["world"] == facts["dp"] == 4 and facts["memory_gib_per_rank"]["0"]["total"] > 0
    assert "has no effect without --dry-run" in call("--world", "4").err
    assert "did you mean H100" in call("--dry-run", "--device", "H10").err
