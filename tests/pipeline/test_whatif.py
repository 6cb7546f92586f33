"""`bessemer whatif`: a run with the change does what the command predicted."""

import json

import pytest
import toy_stage  # noqa: F401 (registers the kinds)

from bessemer.addons.plan.whatif import whatif
from bessemer.config.recipe import Recipe
from bessemer.pipeline import runner

DOES = {"kept": "skipped", "again": "done", "new": "done", "goes on": "done"}


def state(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "changes, fates",
    [
        ([], ["kept", "kept", "kept"]),
        (["second.steps=40"], ["kept", "again", "again"]),
        (["first.pause=0.001"], ["kept", "kept", "kept"]),
        (["second.seed=8"], ["kept", "again", "again"]),
        (["seed=8"], ["again", "again", "again"]),
    ],
)
def test_it_says_what_a_run_then_does_and_touches_nothing(toy, changes, fates):
    runner.run(Recipe.load(toy.path), toy.out)
    before = state(toy.out)
    recipe = Recipe.load(toy.path, changes)
    answer = whatif(recipe, toy.out)
    assert [one.fate for one in answer.stages] == fates and state(toy.out) == before
    results = runner.run(recipe, toy.out)
    assert [result.status for result in results] == [DOES[one.fate] for one in answer.stages]
    assert (answer.seconds > 0) == ("again" in fates)


def test_time_follows_what_the_run_took_and_the_work_that_is_added(toy):
    toy.write(steps=4, second=4)
    runner.run(Recipe.load(toy.path), toy.out, "second")
    done = toy.out / "02-second" / "done.json"
    record = json.loads(done.read_text())
    done.write_text(json.dumps(record | {"seconds": 70.0}))
    answer = whatif(Recipe.load(toy.path, ["second.seed=8"]), toy.out, usd=36.0)
    first, second, compare = answer.stages
    assert (first.fate, second.fate, compare.fate) == ("kept", "again", "new")
    assert second.seconds == pytest.approx(70.0) and second.before == 70.0
    assert answer.facts()["usd"] == pytest.approx(answer.seconds / 100) and answer.memory is None
    assert "second   again    about 1m 10s   seed 7 -> 8; took 1m 10s" in answer.describe()


def test_a_stage_that_goes_is_named_and_a_run_must_be_there(toy, call, tmp_path):
    runner.run(Recipe.load(toy.path), toy.out)
    text = toy.path.read_text()
    toy.path.write_text(text[: text.rindex("[[stage]]")])
    answer = whatif(Recipe.load(toy.path), toy.out)
    assert [(one.stage, one.fate) for one in answer.stages][-1] == ("compare", "dropped")
    status, _, err = call("whatif", "recipes/tiny.toml", "--run", tmp_path / "nothing")
    assert status == 2 and "is not a run directory" in err


def test_a_run_stands_for_its_recipe(toy, call):
    """`whatif`, `run` and a dry run take a run's directory, as the commands on models do."""
    runner.run(Recipe.load(toy.path, ["first.steps=5"]), toy.out)
    status, out, err = call("whatif", toy.out, "--set", "second.seed=8", "--json")
    assert status == 0, err
    assert [stage["fate"] for stage in json.loads(out)["stages"]] == ["kept", "again", "again"]
    status, out, err = call("run", toy.out, "--json")
    facts = json.loads(out)
    assert status == 0 and facts["directory"] == str(toy.out), "with the --set that it was made with, in its own place"
    assert {stage["status"] for stage in facts["stages"]} == {"skipped"}
