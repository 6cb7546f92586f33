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
    prediction = estimate(recipe, seconds=0.05, run=tmp_path)
    assert list(prediction.stages) == recipe.names() and all(seconds > 0 for seconds in prediction.stages.values())
    rate = prediction.rates["training_tokens_per_second"]
    assert prediction.stages["pretrain"] > recipe.stage("pretrain").tokens / rate, "validation comes on top"
    rows = {row["stage"]: row for row in prediction.facts()["stages"]}
    assert rows["pretrain"]["measured_seconds"] == 100 and rows["zero"]["measured_seconds"] is None
    output = prediction.describe()
    assert "1m 40s" in output and "not measured" in output
    longer = estimate(Recipe.load(RECIPES / "tiny.toml", [*SMALL, "pretrain.tokens=32M"]), seconds=0.05)
    rate = longer.rates["training_tokens_per_second"]  # measured again: a loaded machine changes from second to second
    assert longer.stages["pretrain"] > 32_000_000 / rate > 0


def test_each_training_setup_is_measured_once(monkeypatch):
    """Short sums in FP8 took 33 times as long as BF16, and every stage was planned at the rate of the first."""
    trained, rates = [], {"off": 1000.0, "short-sums": 40.0}

    def training_rate(model, settings, length, seconds):
        trained.append((model.cfg.dim, settings.fp8, settings.precision, settings.optimizer))
        assert (recipe_of(model.layers[0]) is None) == (settings.fp8 == "off")
        return pace.Measured(rates[settings.fp8] / model.cfg.dim, 1.0, 1.0)

    monkeypatch.setattr("bessemer.addons.plan.pace.training_rate", training_rate)
    recipe = Recipe.load(RECIPES / "tiny.toml", [*SMALL, "zero.rollouts=1"])
    base, zero = recipe.stage("pretrain"), recipe.stage("zero")
    variants = {"again": {}, "short": {"fp8": "short-sums"}, "wide": {"model": {"dim": 64}}}
    more = [base.model_copy(update={"name": name, **keys}) for name, keys in variants.items()]
    more.append(zero.model_copy(update={"name": "wide-zero", "source": "wide"}))
    prediction = estimate(recipe.model_copy(update={"stages": [*recipe.stages, *more]}), seconds=0.02)
    assert (
        prediction.stages["again"]
        == prediction.stages["pretrain"]
        < prediction.stages["wide"]
        < prediction.stages["short"] / 8
    )
    assert trained == [
        (32, "off", "float32", "muon"), (32, "off", "auto", "adamw"), (32, "short-sums", "float32", "muon"),
        (64, "off", "float32", "muon"), (64, "off", "auto", "adamw"),
    ]  # fmt: skip
    share = prediction.rates["training_tokens_per_second"] / (1000 / 32)  # of a core, which other work left
    assert 0 < share <= 1.001
    assert prediction.rates["training_tokens_per_second_of_short"] == pytest.approx(share * 40 / 32)
    assert "decoding_tokens_per_second_of_wide-zero" in prediction.rates and "of_again" not in str(prediction.rates)


def counted(recipe, name, **keys):
    stage = recipe.stage(name).model_copy(update=keys)
    return find_kind(stage.kind)().work(stage, recipe)


def test_evaluation_and_validation_are_counted():
    """By hand, for the demo. Without a mixture, every part of the corpus is read."""
    recipe = Recipe.load(RECIPES / "tiny.toml")
    (base,) = counted(recipe, "pretrain")
    assert (base.trained, base.length, base.read) == (6_000_000, 320, (1 + 3) * 7 * 64 * 320)
    assert counted(recipe, "pretrain", mixture={}) == [base] and base.sampled == 3 * 7 * 100
    assert counted(recipe, "pretrain", validate_every=0)[0].read == 7 * 64 * 320
    assert counted(recipe, "pretrain", ema_decay=0.9)[0].read == 2 * base.read
    _, answers, longer = counted(recipe, "eval")
    assert (answers.model, longer.model, answers.sampled) == ("pretrain", "zero", 100 * 2 * 16 * 300 / 2)
    assert counted(recipe, "eval", shots=[0, 1, 3, 8])[1].sampled == 4 * answers.sampled


def test_an_rl_stage_is_more_than_its_rollouts():
    """The gate, held-out evaluations, probes, passes of the reference; the cap rises at rollout 10."""

    def of_zero(*changes):
        return counted(Recipe.load(RECIPES / "tiny.toml", changes), "zero")

    (zero, critic) = of_zero("zero.kl.weight=0.001")
    rollouts = (10 * 200 + 14 * 300) * 256 / 2
    heldout = (64 * 4 + 12) * (200 + 300 + 300) / 2  # before the first, after 12 and after 24
    assert zero.sampled == rollouts + heldout and zero.trained == rollouts + 24 * 256 * 40
    assert zero.read == zero.trained and not critic.trained, (
        "the reference; the sampler's log-probabilities are the old"
    )
    assert of_zero()[0].read == 0, "the demo has no reference"
    assert of_zero('zero.hooks=[{name="correction", form="token-mask"}]')[1].read == zero.trained
    more = of_zero('zero.heldout.tasks=["countdown","arithmetic","logic"]')[0].sampled - zero.sampled
    assert more == 2 * 64 * 4 * (200 + 300 + 300) / 2
    seldom = of_zero("zero.heldout.every=25")[0].sampled
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


def test_short_stages_are_guessed_and_long_ones_measured(monkeypatch):
    measured = []

    def rate(name):
        return lambda *how: measured.append(name) or pace.Measured(1000.0, 1.0, 1.0)

    for name in ("training_rate", "decoding_rate"):
        monkeypatch.setattr(f"bessemer.addons.plan.pace.{name}", rate(name))
    recipe = Recipe.load(RECIPES / "tiny.toml", [*SMALL, "pretrain.tokens=30M", "zero.precision=device"])
    stages = [stage for stage in recipe.stages if stage.name in ("pretrain", "zero")]
    assert pace.Pace(recipe, worth=1e9).of_stages(stages) and not measured
    times = pace.Pace(recipe, worth=5.0).of_stages(stages)
    assert measured[0] == "training_rate" and times["pretrain"].seconds > 30_000
    assert times["pretrain"].parts["training"] > 0.9


def test_time_of_a_network_too_large_to_measure_is_guessed(monkeypatch):
    """671B parameters: nothing is allocated, no step is tried."""
    recipe = Recipe.load(RECIPES / "tiny.toml", ["model.preset=v3"])
    monkeypatch.setattr("bessemer.addons.plan.pace.training_rate", lambda *how: pytest.fail("measured"))
    stage = recipe.stage("pretrain")
    seconds = pace.Pace(recipe, worth=0.0).of_stages([stage])["pretrain"].seconds
    assert seconds == pytest.approx(sum(guessed(recipe, work) for work in counted(recipe, "pretrain")))
    assert pace.Pace(recipe, worth=0.0, ranks=8).of_stages([stage])["pretrain"].seconds < seconds


def test_time_is_guessed_where_measuring_fails(monkeypatch):
    def fails(*how):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("bessemer.addons.plan.pace.training_rate", fails)
    recipe = Recipe.load(RECIPES / "tiny.toml", ["pretrain.prompts=[]"])
    seconds = pace.Pace(recipe, worth=0.0).of_stages([recipe.stage("pretrain")])["pretrain"].seconds
    assert seconds == pytest.approx(sum(guessed(recipe, work) for work in counted(recipe, "pretrain", prompts=[])))


def rated(monkeypatch, training, decoding, share=1.0):
    """Every network trains and samples at these rates, in this share of the clock's time."""
    monkeypatch.setattr("bessemer.addons.plan.pace.training_rate", lambda *how: pace.Measured(training, share, 1.0))
    monkeypatch.setattr("bessemer.addons.plan.pace.decoding_rate", lambda *how: pace.Measured(decoding, share, 1.0))


def test_half_of_the_rollouts_take_half_as_long(monkeypatch):
    """Less what does not depend on them: the evaluation before the first, and loading."""
    rated(monkeypatch, 1000.0, 2000.0)

    def seconds(*changes):
        keys = ("corpus.row_length=256", "zero.max_new_tokens=200", "zero.kl.weight=0.001", "zero.heldout.every=20")
        recipe = Recipe.load(RECIPES / "tiny.toml", [*SMALL, *keys, *changes])
        return pace.Pace(recipe, worth=0.0).of_stages([recipe.stage("zero")])["zero"]

    few, many = seconds("zero.rollouts=20"), seconds("zero.rollouts=40")
    trained, sampled = 20 * 256 * (100 + 40) * 4 / 3, 20 * 256 * 100 + (64 * 4 + 12) * 200 / 2
    assert many.seconds - few.seconds == pytest.approx(trained / 1000 + sampled / 2000)
    assert few.each == (100.0,) * 20 and many.each == (100.0,) * 40
    rated(monkeypatch, 2000.0, 4000.0)
    fixed = 2 * seconds("zero.rollouts=40").seconds - many.seconds
    assert 0 <= fixed < 0.1 * many.seconds, "a machine twice as fast takes half as long"


def test_what_a_stage_took_here_corrects_its_next_run(tmp_path, monkeypatch):
    """On the same machine with the same recipe; the interval gets narrower, and other stages keep theirs."""
    rated(monkeypatch, 1000.0, 2000.0)
    recipe = Recipe.load(RECIPES / "tiny.toml", SMALL)

    def expected(recipe=recipe, ranks=1):
        return pace.estimate(recipe, recipe.stages, tmp_path, ranks, lambda text: None, 0.0)

    first = expected()
    whole = first.interval()
    assert whole.likely == pytest.approx(sum(time.seconds for time in first.stages.values()))
    assert whole.low < whole.likely < whole.high
    took = first.stages["zero"].seconds * 1.5
    first.learn("pretrain", 100.0, 0.3)  # other work had come
    first.learn("corpus", 1.0, 1.0)  # too short to matter
    first.learn("zero", took, 1.0)
    second = expected()
    assert second.stages["zero"].seconds == pytest.approx(took, rel=1e-3)
    assert second.stages["pretrain"] == first.stages["pretrain"]
    narrow, wide = second.interval(["zero"]), first.interval(["zero"])
    assert narrow.high / narrow.low < wide.high / wide.low
    rated(monkeypatch, 500.0, 1000.0)
    assert expected().stages["zero"].seconds == pytest.approx(2 * took, rel=0.1), "the machine is half as fast today"
    rated(monkeypatch, 1000.0, 2000.0, 0.5)
    busy = expected()
    assert busy.stages["zero"].seconds == pytest.approx(2 * took, rel=0.1), "other work takes half of it"
    assert busy.interval().high / busy.interval().low > whole.high / whole.low
    rated(monkeypatch, 500.0, 1000.0)
    other = Recipe.load(RECIPES / "tiny.toml", [*SMALL, "pretrain.tokens=3M"])
    assert expected(other).stages["zero"] == expected(other, 1).stages["zero"]
    assert expected(other).stages["zero"].seconds == pytest.approx(2 * first.stages["zero"].seconds, rel=0.1)
    (record,) = tmp_path.iterdir()
    record.write_text('{"a": 3, "b": ["x"]}')
    assert expected().stages["zero"].parts, "a damaged record is none"
    expected().learn("zero", took, 1.0)


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


def test_first_estimate_uses_the_stage_s_own_model():
    """Not by the recipe's [model], which `smollm2` has not and which is no student."""

    def seconds(recipe, name):
        stage = recipe.stage(name)
        return of_stage(stage, recipe)

    smollm2 = Recipe.load(RECIPES / "smollm2.toml")  # 135M parameters; the preset `tiny` uses 1.4M for a token
    assert seconds(smollm2, "grpo") > 50 * training_seconds(smollm2, 12 * 8 * 8 * 64)
    assert seconds(smollm2, "eval") > 50 * training_seconds(smollm2, 4 * 2 * 64 * 4 * 64 / 4)
    r1 = Recipe.load(RECIPES / "r1-small.toml")
    keys = ("rollouts", "prompts_per_rollout", "samples", "max_new_tokens")
    shared = {key: getattr(r1.stage("r1"), key) for key in keys}
    stages = [stage.model_copy(update=shared if stage.name == "student-rl" else {}) for stage in r1.stages]
    r1 = r1.model_copy(update={"stages": stages})
    assert seconds(r1, "student-rl") < 0.5 * seconds(r1, "r1")
