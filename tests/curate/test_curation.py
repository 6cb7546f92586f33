"""Data recipes: their mistakes are named together with the fix."""

from pathlib import Path

import pytest

from bessemer.addons.curate.data_recipe import load, plain
from bessemer.addons.plan.recipe_help import describe_keys
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig

SOURCE = 'name = "a"\nfrom = "fables-en"\ndomain = "english"'


def test_packaged_data_recipe_loads():
    settings = load(Path(__file__).parents[2] / "recipes" / "data.toml")
    assert plain(settings).sources[1].rules["min_words"] == 20
    assert "min_ended_lines" not in plain(settings).sources[2].rules


@pytest.mark.parametrize(
    ("sources", "more", "message"),
    [
        ([SOURCE + "\nfilter = 1"], "", 'unknown key "source.0.filter"; did you mean "filters"'),
        ([SOURCE, SOURCE], "", 'source "a" occurs twice'),
        ([SOURCE + '\nfilters = "best"'], "", "expected one of"),
        ([SOURCE + "\nrules = { min_word = 3 }"], "", "there is no rule 'min_word'; did you mean \"min_words\""),
        ([SOURCE + "\nrules = { min_words = true }"], "", "give its number"),
        ([SOURCE.replace('"a"', '"a/b"')], "", "names a folder"),
        ([SOURCE.replace('"english"', '"work"')], "", "no domain may be called"),
        ([SOURCE], 'fim_parts = ["code"]', 'fim_parts names "code", which is not a part'),
        ([SOURCE + '\nlongest = "much"'], "", "expected a number of bytes"),
        ([SOURCE + '\nbad = "ignore"'], "", "expected one of 'refuse' or 'skip'"),
        ([], "", '"source" is required'),
    ],
)
def test_mistakes_are_named(recipe, sources, more, message):
    with pytest.raises(UserError) as error:
        load(recipe(*sources, more=more))
    assert message in str(error.value)


def test_keys_can_be_set_from_the_command_line(recipe):
    path = recipe(SOURCE)
    settings = load(path, ["seed=9", "dedup.near=false", "a.bad=skip", "a.rules.min_words=7", "heldout=0.2"])
    assert (settings.seed, settings.dedup.near, settings.heldout) == (9, False, 0.2)
    assert settings.sources[0].bad == "skip"
    assert plain(settings).sources[0].rules == {"min_words": 7}
    with pytest.raises(UserError, match="no table or source is called b"):
        load(path, ["b.bad=skip"])
    for key in ("seed.a", "seed.a.b"):
        with pytest.raises(UserError, match="seed is not a table"):
            load(path, [f"{key}=1"])
    with pytest.raises(UserError, match="must read key=value"):
        load(path, ["seed"])
    with pytest.raises(UserError, match="no recipe at"):
        load(path.with_name("none.toml"))


def test_a_training_recipe_is_recognised():
    with pytest.raises(UserError, match=r"tiny\.toml.*bessemer run"):
        load(Path(__file__).parents[2] / "recipes" / "tiny.toml")


def test_every_key_is_explained():
    text = describe_keys("data", ModelConfig, [])
    for words in (
        "confidence (number",
        "source (tables)",
        "source.from (string, required)",
        "engine.unit_bytes (bytes",
        "dedup.threshold (number",
    ):
        assert words in text
    with pytest.raises(UserError, match=r'unknown kind "datta"; did you mean "data"\?'):
        describe_keys("datta", ModelConfig, [])
