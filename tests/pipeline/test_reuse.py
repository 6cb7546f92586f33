"""`--reuse RUN`: which stages are reused and which are not, and that the two runs share no files afterwards."""

import os
from pathlib import Path

import pytest
import toy_stage  # noqa: F401 (registers the kinds)

from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline import runner
from bessemer.pipeline.stage import find_kind
from bessemer.runs.directory import digest


def run(toy, **kwargs):
    results = runner.run(Recipe.load(toy.path), toy.out, **kwargs)
    return {result.name: result.status for result in results}


def test_equal_stages_are_copied_and_the_others_run(toy, other_toy, capsys):
    run(toy)
    other_toy.write(second=22, name="variant")
    assert run(other_toy, reuse=toy.out) == {"first": "skipped", "second": "done", "compare": "done"}
    assert f"first: taken from {toy.out}" in capsys.readouterr().err
    assert len([line for line in other_toy.lines() if line["stage"] == "first"]) == 20
    mine = [line for line in toy.lines() if line["stage"] == "first"]
    assert mine == [line for line in other_toy.lines() if line["stage"] == "first"], "with their times"
    (toy.out / "01-first" / "model" / "config.json").write_text("changed later")
    assert set(run(other_toy).values()) == {"skipped"}, "the copy is a copy"


def test_all_of_an_equal_run_comes_over_and_is_the_same(toy, other_toy):
    run(toy)
    assert set(run(other_toy, reuse=toy.out).values()) == {"skipped"}
    assert other_toy.result() == toy.result()


def test_what_is_damaged_unfinished_or_of_other_inputs_is_not_taken(toy, other_toy):
    run(toy)
    (toy.out / "01-first" / "model" / "config.json").write_text("{}")
    (toy.out / "03-compare" / "done.json").unlink()
    found = run(other_toy, reuse=toy.out)
    assert found == {"first": "done", "second": "skipped", "compare": "done"}, "the same first came out again"


def test_inputs_that_came_out_differently_are_not_of_use(toy, other_toy, monkeypatch):
    run(toy)
    (toy.out / "01-first" / "done.json").unlink()
    monkeypatch.setattr("toy_stage.ROUNDING", "other")
    assert set(run(other_toy, reuse=toy.out).values()) == {"done"}


@pytest.mark.parametrize("again", [True, False])
def test_a_kill_while_copying_leaves_nothing_in_the_way(toy, other_toy, monkeypatch, again):
    run(toy)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner.os, "rename", killed)
        run(other_toy, reuse=toy.out)
    assert not (other_toy.out / "01-first").exists()
    assert set(run(other_toy, reuse=toy.out if again else None).values()) == {"skipped" if again else "done"}
    assert other_toy.result() == toy.result()
    assert not [name for name in os.listdir(other_toy.out) if "tmp" in name]


def test_a_folder_that_is_no_run_is_named(toy, tmp_path):
    with pytest.raises(UserError, match=f"--reuse {tmp_path}: not a run directory"):
        run(toy, reuse=tmp_path)
    assert not toy.out.exists()


def test_the_controls_can_take_their_base_from_the_run_they_are_controls_of():
    """The two recipes must define the base identically, or `--reuse runs/zero` would train it again."""
    recipes = Path(__file__).parents[2] / "recipes"
    known = []
    for name in ("zero", "controls"):
        recipe, found = Recipe.load(recipes / f"{name}.toml"), {}
        for settings in recipe.stages[:2]:
            kind = find_kind(settings.kind)()
            facts = kind.resolve(settings, recipe)
            found[settings.name] = digest(kind.identity(settings, recipe, facts, dict(found)))
        known.append(found)
    assert known[0] == known[1] and list(known[0]) == ["corpus", "base"]
