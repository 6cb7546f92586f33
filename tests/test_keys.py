"""Keys that no recipe sets: their number falls, and a new key is noticed."""

import importlib.util
from pathlib import Path

from bessemer.config.kinds import CORE
from bessemer.config.table import StageConfig

spec = importlib.util.spec_from_file_location("keys", Path(__file__).parents[1] / "tools" / "keys.py")
keys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(keys)


def test_few_keys_are_in_no_recipe(monkeypatch):
    total, unset = keys.count()
    assert len(unset) <= keys.MOST, "a new key needs a recipe that uses it"

    class NewConfig(StageConfig):
        nobody_sets_this: int = 1
        """New."""

    NewConfig.__module__ = "bessemer.config.new"  # a user's own table is not counted
    monkeypatch.setitem(CORE, "new", NewConfig)
    assert set(keys.count()[1]) - set(unset) == {("NewConfig", "nobody_sets_this")} and len(keys.count()[0]) > len(
        total
    )


def test_a_key_is_set_in_a_table_inline_in_a_list_of_overrides_or_as_a_table():
    for text in (
        "lr = 3e-4",
        "judge = { lr = 1 }",
        "[stage.lr]",
        "[[lr]]",
        "lr=3",
        "rl.lr = 3",
        "  lr.first = 3",
        'x = 1\n"lr" = 2',
        "# lr = 1",
    ):
        assert keys.is_set("rl.lr", text), text
    for text in ("clr = 3", "the lr of a step", 'note = "lr"', "lr_final = 3", "lr_final.lrs = 3", "[stage.lr_final]"):
        assert not keys.is_set("rl.lr", text), text
