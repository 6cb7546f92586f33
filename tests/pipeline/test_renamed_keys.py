"""Recipes and run directories of version 0.1.0: keys are read under their old names, and fingerprints stay."""

import json
import shutil
import warnings
from typing import ClassVar

import pytest

from bessemer.config.recipe import STAGES, Recipe
from bessemer.config.table import StageConfig
from bessemer.errors import UserError
from bessemer.pipeline import runner, stage
from bessemer.runs.context import Interrupted
from bessemer.runs.directory import digest

RECIPE = """
name = "old"
[[stage]]
kind = "rl"
tasks = ["countdown"]
ahead = 1
leaves = "correct"
[stage.rollout]
engine = "here"
[[stage]]
name = "more"
like = "rl"
draws = 2
"""


def parse(text, *overrides):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return Recipe.parse(text, overrides), [str(one.message) for one in caught]


def test_old_names_are_read_with_one_warning_for_each():
    recipe, said = parse(RECIPE, "rl.draws=3", "rl.rollout.engine=here")
    first, second = recipe.stages
    assert (first.max_off_policy_rollouts, first.export_samples, first.max_resamples) == (1, "correct", 3)
    assert (second.max_off_policy_rollouts, second.export_samples, second.max_resamples) == (1, "correct", 2)
    assert first.rollout.engine == "local"
    assert sorted(line.removeprefix("recipe: ").partition(";")[0] for line in said) == [
        'engine = "here" is now written engine = "local"',
        'key "ahead" is now called "max_off_policy_rollouts"',
        'key "draws" is now called "max_resamples"',
        'key "leaves" is now called "export_samples"',
    ]


def test_new_names_are_read_silently_and_are_what_is_written():
    recipe, _ = parse(RECIPE)
    again, said = parse(recipe.to_toml())
    assert again.stages == recipe.stages and not said
    assert not {"ahead", "leaves", "draws"} & {line.partition(" ")[0] for line in recipe.to_toml().splitlines()}


def test_an_override_wins_under_either_name():
    assert parse(RECIPE, "rl.max_off_policy_rollouts=0")[0].stage("rl").max_off_policy_rollouts == 0
    new = RECIPE.replace("ahead", "max_off_policy_rollouts")
    assert parse(new, "rl.ahead=0")[0].stage("rl").max_off_policy_rollouts == 0


def test_a_stage_may_change_under_the_new_name_what_the_stage_it_is_like_sets_under_the_old_one():
    assert parse(RECIPE + 'export_samples = "all"')[0].stage("more").export_samples == "all"


def test_both_names_in_one_table_are_refused():
    with pytest.raises(UserError, match=r'"rl": "ahead" is the old name of "max_off_policy_rollouts", and both'):
        parse(RECIPE.replace("ahead = 1", "ahead = 1\nmax_off_policy_rollouts = 1"))


def test_a_wrong_value_under_an_old_name_is_named():
    with pytest.raises(UserError, match=r'"rl" \(kind rl\): key "max_off_policy_rollouts" is 7'):
        parse(RECIPE.replace("ahead = 1", "ahead = 7"))


EVERY_KIND = """
name = "all"
seed = 7
[model]
preset = "tiny"
[[stage]]
kind = "corpus"
parts = { fables = "tinystories", countdown = "task:countdown" }
limits = { countdown = "1M" }
[[stage]]
kind = "pretrain"
mixture = { fables = 0.5, countdown = [["0", 0.5], ["1M", 0.2]] }
lr = [["0", 0.0], ["200K", 3e-3], ["8M", 3e-4]]
[[stage]]
kind = "extend"
corpus = "corpus"
mixture = { fables = 1.0 }
length = 512
lr = 1e-4
[[stage]]
kind = "longeval"
models = ["pretrain", "extend"]
corpus = "corpus"
[[stage]]
kind = "examples"
tasks = ["countdown"]
[[stage]]
kind = "sft"
from = "extend"
samples = ["examples"]
lr = 5e-4
lr_final = 5e-5
[[stage]]
kind = "rl"
tasks = ["countdown"]
accuracy_needs_format = true
ahead = 1
leaves = "correct"
draws = 3
[stage.rollout]
engine = "here"
[[stage]]
kind = "reject"
tasks = ["countdown"]
[[stage]]
kind = "reward-model"
aim = "helpful"
lr = 1e-4
[[stage]]
kind = "distill"
from = "sft"
teacher = "rl"
tasks = ["countdown"]
[[stage]]
kind = "eval"
models = ["sft", "rl"]
tasks = ["countdown"]
[[stage]]
kind = "import"
model = "some/folder"
"""
# 0.1.0 had no key for this: a right answer had to be in well-formed tags
FINGERPRINTS = {  # computed by version 0.1.0, without derived facts and inputs
    "corpus": "72f296a6f979dac2",
    "pretrain": "406bfa4e1419ab97",
    "extend": "10d0a1c1f6a6dacd",
    "longeval": "0909d38570d06e2e",
    "examples": "bb2abd8e13634dca",
    "sft": "ff436d21c509df15",
    "rl": "ed61daa02271b89b",
    "reject": "7c14959c5ca4567a",
    "reward-model": "730952f7de76576c",
    "distill": "6ace3f8455a98358",
    "eval": "957a005ef13c626a",
    "import": "427df731a85f7b4a",
}


OTHERWISE = {"sft": {"epochs": 2, "batch_rows": 8}}
"""What 0.1.0 recorded for a kind that now records something else; `Stage.same` knows that both mean the same."""


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_are_those_of_0_1_0(name):
    recipe, _ = parse(EVERY_KIND)
    config = recipe.stage(name)
    kind = stage.find_kind(config.kind)()
    now = kind.identity(config, recipe, {}, {})
    then = now
    if name in OTHERWISE:
        then = now | {"format": [*now["format"][:2], 1], "settings": now["settings"] | OTHERWISE[name]}
        assert then != now
    assert digest(then)[:16] == FINGERPRINTS[name]
    assert kind.same(config, then, now)


class OldConfig(StageConfig):
    """The settings of a kind under their old names."""

    count_to: int = 4
    """How many steps to take."""
    mode: str = "slow"
    """A word."""


class NewConfig(StageConfig):
    """The same settings under new names."""

    renamed: ClassVar = {"count_to": "steps"}
    renamed_values: ClassVar = {"mode": {"slow": "careful"}}

    steps: int = 4
    """How many steps to take."""
    mode: str = "careful"
    """A word."""


class Tally(stage.Stage):
    """Counts; stops half-way when asked to."""

    kind = "tally"
    stop_at = None

    def run(self, config, ctx):
        path = ctx.state / "count.json"
        begin = json.loads(path.read_text()) if path.exists() else 0
        for count in range(begin, getattr(config, "steps", None) or config.count_to):
            path.write_text(json.dumps(count + 1))
            if count + 1 == self.stop_at:
                ctx.interrupt()
        (ctx.dir / "made.json").write_text(path.read_text())
        return {"taken": json.loads(path.read_text()) - begin}


TALLY = 'name = "tally"\n[[stage]]\nkind = "tally"\ncount_to = 6\nmode = "slow"\n'


def run(tmp_path, text):
    (result,) = runner.run(parse(text)[0], tmp_path / "run")
    return result


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """Run the old recipe with the old settings class, then put the new class in its place."""

    def make(stop_at=None):
        monkeypatch.setitem(stage.KINDS, "tally", Tally)
        monkeypatch.setitem(STAGES, "tally", OldConfig)
        monkeypatch.setattr(Tally, "stop_at", stop_at)
        if stop_at is None:
            run(tmp_path, TALLY)
        else:
            with pytest.raises(Interrupted):
                run(tmp_path, TALLY)
        written = json.loads((tmp_path / "run" / "01-tally" / "stage.json").read_text())
        assert written["identity"]["settings"]["count_to"] == 6 and written["identity"]["settings"]["mode"] == "slow"
        monkeypatch.setattr(Tally, "stop_at", None)
        monkeypatch.setitem(STAGES, "tally", NewConfig)

    return make


@pytest.mark.parametrize("text", [TALLY, TALLY.replace("count_to", "steps").replace("slow", "careful")])
def test_a_finished_stage_of_an_old_run_is_skipped(tmp_path, old_run, text):
    old_run()
    assert run(tmp_path, text).status == "skipped"
    assert "steps = 6" in (tmp_path / "run" / "recipe.toml").read_text()


def test_an_interrupted_stage_of_an_old_run_goes_on(tmp_path, old_run):
    old_run(stop_at=4)
    result = run(tmp_path, (tmp_path / "run" / "recipe.toml").read_text())
    assert (result.status, result.summary) == ("done", {"taken": 2})


def test_a_changed_value_is_named_by_its_new_key(tmp_path, old_run, capsys):
    old_run()
    assert run(tmp_path, TALLY.replace("6", "7")).status == "done"
    assert "tally: steps 6 -> 7; the old one is moved to" in capsys.readouterr().err


def test_a_stage_of_an_old_run_can_be_reused(tmp_path, old_run):
    old_run()
    shutil.move(tmp_path / "run", tmp_path / "donor")
    (result,) = runner.run(parse(TALLY)[0], tmp_path / "run", reuse=tmp_path / "donor")
    assert result.status == "skipped"
