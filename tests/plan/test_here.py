"""`bessemer plan RECIPE --here`: rates measured on this machine, compared with a finished run."""

import json
import os
from pathlib import Path

import pytest
import torch

from bessemer.addons.accelerate.precision.fp8_layers import recipe_of
from bessemer.addons.plan import pace
from bessemer.addons.plan.estimate import estimate
from bessemer.addons.plan.guess import guessed, of_stage, training_seconds
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline.stage import find_kind
from bessemer.train import setup
from bessemer.workers import side_by_side

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.dim=32", "model.n_layers=2", "model.vocab_size=512", "pretrain.batch_rows=4", "pretrain.micro_rows=2",
         "pretrain.precision=float32", "corpus.row_length=32"]  # fmt: skip


def test_planned_and_measured_times_are_compared(tmp_path):
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
        assert (recipe_of(model.layers[0]) is None) == (settings.fp8 == "off")
        return rates[settings.fp8] / model.cfg.dim

    monkeypatch.setattr("bessemer.addons.plan.pace.training_rate", training_rate)
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


def counted(recipe, name, **keys):
    stage = recipe.stage(name).model_copy(update=keys)
    return find_kind(stage.kind)().work(stage, recipe)


def test_what_is_asked_and_validated_is_counted():
    """By hand, for the demo. Without a mixture, every part of the corpus is read."""
    recipe = Recipe.load(RECIPES / "tiny.toml")
    (base,) = counted(recipe, "pretrain")
    assert (base.trained, base.length, base.read) == (6_000_000, 320, (1 + 3) * 7 * 64 * 320)
    assert counted(recipe, "pretrain", mixture={}) == [base] and base.sampled == 3 * 7 * 100
    assert counted(recipe, "pretrain", validate_every=0)[0].read == 7 * 64 * 320
    assert counted(recipe, "pretrain", ema_decay=0.9)[0].read == 2 * base.read
    _, one, other = counted(recipe, "eval")
    assert (one.model, other.model, one.sampled) == ("pretrain", "zero", 100 * 2 * 16 * 300 / 2)
    assert counted(recipe, "eval", shots=[0, 1, 3, 8])[1].sampled == 4 * one.sampled


def test_an_rl_stage_is_more_than_its_rollouts():
    """The gate, held-out evaluations, probes, passes of the reference; the cap rises at rollout 16."""

    def of_zero(*changes):
        return counted(Recipe.load(RECIPES / "tiny.toml", changes), "zero")

    (zero, critic) = of_zero()
    rollouts = (16 * 200 + 24 * 300) * 256 / 2
    heldout = (64 * 4 + 12) * (200 + 300 + 300) / 2  # before the first, after 20 and after 40
    assert zero.sampled == rollouts + heldout and zero.trained == rollouts + 40 * 256 * 40
    assert zero.read == zero.trained and not critic.trained, (
        "the reference; the sampler's log-probabilities are the old"
    )
    assert of_zero("zero.kl.weight=0.0")[0].read == 0
    assert of_zero('zero.hooks=[{name="correction", form="token-mask"}]')[1].read == zero.trained
    more = of_zero('zero.heldout.tasks=["countdown","arithmetic","logic"]')[0].sampled - zero.sampled
    assert more == 2 * 64 * 4 * (200 + 300 + 300) / 2
    seldom = of_zero("zero.heldout.every=41")[0].sampled
    assert zero.sampled - seldom == (64 * 4 + 12) * 300 / 2
    assert of_zero("zero.advantage=critic")[1].trained == zero.trained


def test_work_at_the_size_of_the_papers_is_counted_at_once():
    """32K answers of 671B parameters, in arithmetic alone; every stage of the paper's recipe has its work."""
    recipe = Recipe.load(RECIPES / "r1-paper.toml")
    with places.of_recipe(recipe.folder):
        for stage in recipe.stages:
            if stage.kind in ("rl", "reject"):
                work = find_kind(stage.kind)().work(stage, recipe)
                assert work[0].sampled > 1e8 and work[0].seconds >= 0


def test_what_does_not_matter_is_not_measured_and_what_was_measured_serves_again(tmp_path, monkeypatch):
    """A first run measures what takes long; another command minutes later reads the file; an hour later it does not."""
    measured = []
    for name in ("training_rate", "decoding_rate"):
        monkeypatch.setattr(
            f"bessemer.addons.plan.pace.{name}", lambda *how, name=name: measured.append(name) or 1000.0
        )
    recipe = Recipe.load(RECIPES / "tiny.toml", [*SMALL, "pretrain.tokens=30M", "zero.precision=device"])
    stages = [stage for stage in recipe.stages if stage.name in ("pretrain", "zero")]
    assert pace.Pace(recipe, worth=1e9).of_stages(stages) and not measured
    found = pace.Pace(recipe, worth=5.0, cache=tmp_path).of_stages(stages)
    assert measured[0] == "training_rate" and found["pretrain"] > 30_000
    first = [*measured]
    assert pace.Pace(recipe, worth=5.0, cache=tmp_path).of_stages(stages) == found and measured == first
    path = tmp_path / "rates.json"
    old = {key: one | {"time": one["time"] - 3600} for key, one in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(old | {"broken": 5}))
    pace.Pace(recipe, worth=5.0, cache=tmp_path).of_stages(stages)
    assert measured == first * 2


def test_a_network_that_this_machine_cannot_hold_is_guessed(monkeypatch):
    """671B parameters: nothing is allocated, no step is tried."""
    recipe = Recipe.load(RECIPES / "tiny.toml", ["model.preset=v3"])
    monkeypatch.setattr("bessemer.addons.plan.pace.training_rate", lambda *how: pytest.fail("measured"))
    stage = recipe.stage("pretrain")
    seconds = pace.Pace(recipe, worth=0.0).of_stages([stage])["pretrain"]
    assert seconds == pytest.approx(sum(guessed(recipe, one) for one in counted(recipe, "pretrain")))
    assert pace.Pace(recipe, worth=0.0, ranks=8).of_stages([stage])["pretrain"] < seconds


def test_what_cannot_be_measured_is_guessed(monkeypatch):
    def fails(*how):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("bessemer.addons.plan.pace.training_rate", fails)
    recipe = Recipe.load(RECIPES / "tiny.toml", ["pretrain.prompts=[]"])
    seconds = pace.Pace(recipe, worth=0.0).of_stages([recipe.stage("pretrain")])["pretrain"]
    assert seconds == pytest.approx(sum(guessed(recipe, one) for one in counted(recipe, "pretrain", prompts=[])))


def test_measuring_leaves_random_numbers_and_processes_as_they_were(monkeypatch):
    recipe = Recipe.load(RECIPES / "tiny.toml", SMALL)
    monkeypatch.setattr(setup, "workers", lambda: side_by_side(2))
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before, state = children.read_text(), torch.random.get_rng_state()
    pace.Pace(recipe, seconds=0.02, worth=0.0).of_stages(recipe.stages)
    assert torch.equal(torch.random.get_rng_state(), state) and children.read_text() == before


def test_a_recipe_without_pre_training():
    with pytest.raises(UserError, match="--here measures pre-training"):
        estimate(Recipe.load(RECIPES / "r1-paper.toml"))


def test_before_anything_is_measured_a_stage_is_estimated_by_its_own_model():
    """Not by the recipe's [model], which `smollm2` has not and which is no student."""

    def seconds(recipe, name):
        stage = recipe.stage(name)
        return of_stage(stage, recipe)

    smollm2 = Recipe.load(RECIPES / "smollm2.toml")  # 135M parameters; the preset `tiny` uses 1.4M for a token
    assert seconds(smollm2, "grpo") > 50 * training_seconds(smollm2, 12 * 8 * 8 * 64)
    assert seconds(smollm2, "eval") > 50 * training_seconds(smollm2, 4 * 2 * 64 * 4 * 64 / 4)
    r1 = Recipe.load(RECIPES / "r1-small.toml")
    keys = ("rollouts", "prompts_per_rollout", "samples", "max_new_tokens")
    same = {key: getattr(r1.stage("r1"), key) for key in keys}
    stages = [stage.model_copy(update=same if stage.name == "student-rl" else {}) for stage in r1.stages]
    r1 = r1.model_copy(update={"stages": stages})
    assert seconds(r1, "student-rl") < 0.5 * seconds(r1, "r1")
