"""Pre-training in FP8 as a stage: it learns, resumes bit for bit after a kill, and is listed as FP8 in conformance."""

import json
import math
from pathlib import Path

import pytest
import rl_stage
import stages_run
import torch

import bessemer
from bessemer.addons.accelerate.precision.fp8_layers import RECIPE
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline.stage import find_kind

FP8 = '\nfp8 = "paper"\nmoments = "bfloat16"\ntokens = "12K"\n'


def recipe_in(folder: Path) -> Path:
    """The corpus and pre-training stages of the smallest recipe, in FP8."""
    path = stages_run.write_recipe(folder)
    text = path.read_text().replace('\ntokens = "80K"\n', FP8)
    path.write_text(text[: text.index('[[stage]]\nkind = "rl"')])
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    results = stages_run.run(recipe_in(folder), folder / "run")
    return folder / "run", results


def losses(out: Path) -> list[float]:
    lines = [json.loads(line)["values"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [values["train/loss"] for values in lines if "train/loss" in values]


def test_it_learns_and_leaves_a_plain_model(whole):
    out, results = whole
    assert results["pretrain"].status == "done"
    first, last = losses(out)[0], losses(out)[-1]
    assert last < 0.7 * first
    model = bessemer.load(out / "02-pretrain" / "model")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    rows = {row["item"]: (row["here"], row["state"]) for row in json.loads((out / "conformance.json").read_text())}
    assert rows["FP8 training"] == ("paper", "as published")
    assert rows["Moments of the optimizer in BF16"] == ("bfloat16", "as published")


def test_killed_it_ends_the_same_bit_for_bit(whole, tmp_path):
    path = recipe_in(tmp_path)
    stages_run.killed(path, tmp_path / "run", "pretrain", 12)
    stages_run.run(path, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole[0])
    names = [out / "02-pretrain" / "model" / "model.safetensors" for out in (whole[0], tmp_path / "run")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_the_formats_are_part_of_a_stage_s_identity(tmp_path):
    """Another format of the products or of the moments remakes the model."""
    recipe = Recipe.load(stages_run.write_recipe(tmp_path))
    settings = recipe.stage("pretrain")

    def settings_of(**changes):
        changed = settings.model_copy(update=changes)
        return find_kind("pretrain")().identity(changed, recipe, {}, {})["settings"]

    assert (settings_of()["fp8"], settings_of()["moments"]) == ("off", "float32")
    assert settings_of(fp8="paper") == settings_of() | {"fp8": "paper"}
    assert settings_of(moments="bfloat16") == settings_of() | {"moments": "bfloat16"}


def test_fp8_and_compiled_layers_do_not_go_together(tmp_path):
    path = recipe_in(tmp_path)
    path.write_text(path.read_text().replace('compile = "off"', 'compile = "on"'))
    with pytest.raises(UserError, match=r'compile = "on" and fp8 .*compile = "off"'):
        stages_run.run(path, tmp_path / "run")


@pytest.mark.parametrize(("change", "said"), [("precision=bfloat16", "bfloat16"), ('fp8="paper"', "FP8 (paper)")])
def test_rl_in_a_format_of_its_own(tmp_path, capsys, change, said):
    """The policy samples and trains in this format, and its weights have the dtype that goes with it."""
    base = rl_stage.write_base(tmp_path / "base")
    plain, other = (
        rl_stage.Stage(base, tmp_path / name, rl_stage.COIN, "rollouts=1", *changes)
        for name, changes in (("plain", ()), ("other", (change,)))
    )
    plain.run()
    loop = other.run()
    assert said in capsys.readouterr().err
    dtype = loop.trainer.model.embed.weight.dtype
    assert dtype == (torch.bfloat16 if "bfloat16" in change else torch.float32)
    assert all(getattr(layer, RECIPE, None) is not None for layer in loop.trainer.model.layers) == ("fp8" in change)
    assert plain.values("rl/grad_norm") != other.values("rl/grad_norm")
    assert all(math.isfinite(value) and value > 0 for value in other.values("rl/grad_norm"))
