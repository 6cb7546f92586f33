"""`bessemer plan RECIPE --here`: rates measured on this machine, compared with a finished run."""

import json
from pathlib import Path

import pytest

from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline.stage import find_kind
from bessemer.plan.estimate import estimate
from bessemer.train import setup

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.dim=32", "model.n_layers=2", "model.vocab_size=512", "pretrain.batch_rows=4", "pretrain.micro_rows=2",
         "pretrain.precision=float32", "corpus.row_length=32"]  # fmt: skip


def test_planned_beside_measured(tmp_path):
    folder = tmp_path / "02-pretrain"
    folder.mkdir()
    (folder / "done.json").write_text(json.dumps({"seconds": 100.0}))
    recipe = Recipe.load(RECIPES / "tiny.toml", SMALL)
    found = estimate(recipe, seconds=0.05, run=tmp_path)
    assert list(found.stages) == recipe.names() and all(seconds > 0 for seconds in found.stages.values())
    rate = found.rates["training_tokens_per_second"]
    assert found.stages["pretrain"] > recipe.stage("pretrain").tokens / rate, "validation comes on top"
    rows = {row["stage"]: row for row in found.facts()["stages"]}
    assert rows["pretrain"]["measured_seconds"] == 100 and rows["zero"]["measured_seconds"] is None
    said = found.describe()
    assert "1m 40s" in said and "not measured" in said
    longer = estimate(Recipe.load(RECIPES / "tiny.toml", [*SMALL, "pretrain.tokens=32M"]), seconds=0.05)
    rate = longer.rates["training_tokens_per_second"]  # measured again: a loaded machine changes from second to second
    assert longer.stages["pretrain"] > 32_000_000 / rate > 0


def test_each_way_to_train_is_measured_once(monkeypatch):
    """Short sums in FP8 took 33 times as long as BF16, and every stage was planned at the rate of the first."""
    trained, rates = [], {"off": 1000.0, "short-sums": 40.0}

    def training_rate(model, settings, length, seconds):
        trained.append((model.cfg.dim, settings.fp8, settings.precision, settings.optimizer))
        assert (model.layers[0].fp8 is None) == (settings.fp8 == "off")
        return rates[settings.fp8] / model.cfg.dim

    monkeypatch.setattr("bessemer.plan.estimate.training_rate", training_rate)
    recipe = Recipe.load(RECIPES / "tiny.toml", [*SMALL, "zero.rollouts=1"])
    base, zero = recipe.stage("pretrain"), recipe.stage("zero")
    others = {"again": {}, "short": {"fp8": "short-sums"}, "wide": {"model": {"dim": 64}}}
    more = [base.model_copy(update={"name": name, **keys}) for name, keys in others.items()]
    more.append(zero.model_copy(update={"name": "wide-zero", "source": "wide"}))
    found = estimate(recipe.model_copy(update={"stages": [*recipe.stages, *more]}), seconds=0.02)
    assert found.stages["again"] == found.stages["pretrain"] < found.stages["wide"] < found.stages["short"] / 8
    assert trained == [
        (32, "off", "float32", "muon"), (32, "off", "auto", "adamw"), (32, "short-sums", "float32", "muon"),
        (64, "off", "float32", "muon"), (64, "off", "auto", "adamw"),
    ]  # fmt: skip
    assert found.rates["training_tokens_per_second"] == 1000 / 32
    assert found.rates["training_tokens_per_second_of_short"] == 40 / 32
    assert "decoding_tokens_per_second_of_wide-zero" in found.rates and "of_again" not in str(found.rates)


def test_what_is_asked_and_validated_is_counted(monkeypatch):
    """At rates of 1,000 tokens per second. Without a mixture, every part of the corpus is read."""
    for name in ("training_rate", "_held_out", "_decoding"):
        monkeypatch.setattr(f"bessemer.plan.estimate.{name}", lambda *how: 1000.0)
    recipe = Recipe.load(RECIPES / "tiny.toml", SMALL)

    def seconds(name, **keys):
        stages = [one.model_copy(update=keys if one.name == name else {}) for one in recipe.stages]
        return estimate(recipe.model_copy(update={"stages": stages}), seconds=0.0).stages[name]

    assert seconds("eval", shots=[0, 1, 3, 8]) == pytest.approx(4 * seconds("eval"))
    evaluations = 2 + 40 // recipe.stage("zero").eval_every
    more = seconds("zero", eval_tasks=["countdown", "arithmetic", "logic"]) - seconds("zero")
    assert more == pytest.approx(2 * evaluations * 64 * 4 * 0.5 * (200 + 200 + 300) / 3 / 1000)
    pass_of_7 = 7 * 64 * 32 / 1000 / setup.workers().n
    for parts in (recipe.stage("pretrain").mixture, {}):
        assert seconds("pretrain", validate_every=0, mixture=parts) == pytest.approx(6000 + pass_of_7)
        assert seconds("pretrain", validate_every=2_000_000, mixture=parts) == pytest.approx(6000 + 4 * pass_of_7)


def test_a_recipe_without_pre_training():
    with pytest.raises(UserError, match="--here measures pre-training"):
        estimate(Recipe.load(RECIPES / "r1-paper.toml"))


def test_before_anything_is_measured_a_stage_is_estimated_by_its_own_model():
    """Not by the recipe's [model], which `smollm2` has not and which is no student."""

    def seconds(recipe, name):
        stage = recipe.stage(name)
        return find_kind(stage.kind)().estimate(stage, recipe)

    smollm2 = Recipe.load(RECIPES / "smollm2.toml")  # 135M parameters; the preset `tiny` uses 1.4M for a token
    assert seconds(smollm2, "grpo") > 50 * setup.estimate_seconds(smollm2, 12 * 8 * 8 * 64)
    assert seconds(smollm2, "eval") > 50 * setup.estimate_seconds(smollm2, 4 * 2 * 64 * 4 * 64 / 4)
    r1 = Recipe.load(RECIPES / "r1-small.toml")
    keys = ("rollouts", "prompts_per_rollout", "samples", "max_new_tokens")
    same = {key: getattr(r1.stage("r1"), key) for key in keys}
    stages = [stage.model_copy(update=same if stage.name == "student-rl" else {}) for stage in r1.stages]
    r1 = r1.model_copy(update={"stages": stages})
    assert seconds(r1, "student-rl") < 0.5 * seconds(r1, "r1")
