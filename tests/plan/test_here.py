"""`bessemer plan RECIPE --here`: rates measured on this machine, compared with a finished run."""

import json
from pathlib import Path

import pytest

from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.plan.estimate import estimate

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


def test_a_recipe_without_pre_training():
    with pytest.raises(UserError, match="--here measures pre-training"):
        estimate(Recipe.load(RECIPES / "r1-paper.toml"))
