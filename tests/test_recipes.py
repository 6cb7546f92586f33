"""The package's recipes by name, a recipe of one's own, the schema for editors, and the wheel outside the clone."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import jsonschema
import pytest

from bessemer.addons.curate.config import Curation
from bessemer.addons.plan import recipe_schema
from bessemer.addons.plan.own_recipe import purpose, write_own
from bessemer.addons.plan.recipe_help import describe_keys
from bessemer.config import kinds
from bessemer.config.builtin import builtin_recipes, find_recipe
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig
from bessemer.errors import UserError
from bessemer.model.config import PRESETS, ModelConfig

ROOT = Path(__file__).parents[1]
NAMES = [*builtin_recipes()]


def test_every_recipe_of_the_repository_has_a_name():
    files = [*ROOT.glob("recipes/*.toml"), *ROOT.glob("examples/*.toml")]
    assert {file.stem for file in files} == {*NAMES, *builtin_recipes(data=True)}
    assert builtin_recipes(data=True).keys() == {"data"}
    for name in NAMES:
        assert os.path.samefile(find_recipe(name), next(file for file in files if file.stem == name))
        assert 10 < len(purpose(find_recipe(name))) < 160


def test_a_name_that_could_mean_two_things_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder is not a recipe
    assert Recipe.load("tiny").name == "tiny"
    (tmp_path / "tiny.toml").write_text('name = "mine"\n[[stage]]\nkind = "corpus"\nparts = { a = "fables-en" }\n')
    with pytest.raises(UserError, match=r"write \./tiny\.toml or builtin:tiny"):
        Recipe.load("tiny")
    assert Recipe.load("./tiny.toml").name == "mine"
    assert Recipe.load("builtin:tiny").name == "tiny"
    with pytest.raises(UserError, match='"zer": did you mean "zero"'):
        Recipe.load("zer")
    with pytest.raises(UserError, match='"tinny"; did you mean "tiny"'):
        Recipe.load("builtin:tinny")


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    assert write_own(path, "remainder") == [path, tmp_path / "remainder.py"]
    recipe = Recipe.load(path)
    assert recipe.name == "mine" and recipe.stages == Recipe.load("remainder").stages
    with pytest.raises(UserError, match=r"mine\.toml exists"):
        write_own(path, "tiny")
    with pytest.raises(UserError, match=r"remainder\.py exists"):
        write_own(tmp_path / "other.toml", "remainder")
    assert not (tmp_path / "other.toml").exists()
    for name in ("my recipe.toml", "mine", "mine.json"):
        with pytest.raises(UserError, match="whose stem has letters"):
            write_own(tmp_path / name, "tiny")
    with pytest.raises(UserError, match='no built-in recipe "tinny"'):
        write_own(tmp_path / "new.toml", "tinny")
    with pytest.raises(UserError, match="cannot be written"):
        write_own(tmp_path / "nowhere" / "new.toml", "tiny")


SCHEMA = recipe_schema.recipe_schema(ModelConfig, list(PRESETS))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def faults(text: str) -> list[str]:
    return ["/".join(map(str, fault.absolute_path)) for fault in VALIDATOR.iter_errors(tomllib.loads(text))]


def test_the_schema_is_a_valid_json_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_takes_every_recipe(name):
    assert faults(find_recipe(name).read_text("utf-8")) == []
    assert faults(Recipe.load(name).to_toml()) == []  # with all defaults written out, as in a run


GOOD = """
name = "good"
[model]
preset = "tiny"
dim = 64
[[stage]]
kind = "pretrain"
name = "base"
tokens = "1.5M"
lr = [["0", 0.0], ["1M", 1e-3, "cosine"]]
[[stage]]
kind = "rl"
tasks = ["countdown"]
lr = 1e-3
[[stage]]
name = "again"
like = "rl"
rollouts = 2
"""


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("GOOD", "GOOD", None),
        ('tasks = ["countdown"]', "", "stage/1"),  # required unless `like` is used
        ("rollouts = 2", "rollout = 2", None),  # a key of some kind: under `like` the schema does not know of which
        ("rollouts = 2", "roll = 2", "stage/2"),
        ("dim = 64", "dims = 64", "model"),
        ('"1.5M"', '"1.5Z"', "stage/0/tokens"),
        ('"1.5M"', '"1.5"', "stage/0/tokens"),
        ('"1.5M"', "1.5", "stage/0/tokens"),
        ('"1.5M"', '"1_500_000"', None),
        ('"1.5M"', '" 1.5E6 "', None),
        ('"1.5M"', '"1.0"', None),
        ('"1.5M"', "1.5e6", None),
        *(
            ('tokens = "1.5M"', f'tokens = "1.5M"\nsave_seconds = {good}', None)
            for good in ('"1h 30m"', '"90 s"', '"0.5"', "90", "1.5")
        ),
        *(
            ('tokens = "1.5M"', f'tokens = "1.5M"\nsave_seconds = {bad}', "stage/0/save_seconds")
            for bad in ('"x"', '"90s x"', '""', "-1")
        ),
        ('"1.5M"', "1e17", None),
        ('"1.5M"', '"1e+6"', None),
        ('"1.5M"', "0", "stage/0/tokens"),
        ('"1.5M"', str(2**63), "stage/0/tokens"),
        ("lr = 1e-3", "lr = -1", "stage/1/lr"),
        ("lr = 1e-3", 'lr = [["0", 1e-3], ["1M", -1e-3]]', "stage/1/lr"),
        ("lr = 1e-3", "lr = 1e-3\nheldout.every = 0", "stage/1/heldout/every"),
        ('name = "base"', 'name = "seed"', "stage/0/name"),
        ('name = "base"', 'name = "seeds"', None),
        ('name = "good"', 'name = "a/b"', "name"),
        ('name = "base"', 'name = "a/b"', "stage/0/name"),
        ('"cosine"', '"sine"', "stage/0/lr"),
        ("lr = 1e-3", 'lr = "fast"', "stage/1/lr"),
        ('kind = "rl"', 'kind = "rlhf"', "stage/1/kind"),
        ('kind = "rl"', "", "stage/1"),
        ("[model]", "[layout]\npp = 0\n[model]", "layout/pp"),
        ("[model]", "[models]", ""),
    ],
)
def test_the_schema_finds_what_is_wrong(old, new, where):
    recipe = GOOD.replace(old, new, 1)
    messages = faults(recipe)
    assert messages == [] if where is None else where in messages
    if where is None and new != "rollout = 2":
        Recipe.parse(recipe)
    if where is not None and not where.startswith("model"):
        with pytest.raises(UserError):
            Recipe.parse(recipe)


def test_the_schema_of_data_recipes():
    validator = jsonschema.Draft202012Validator(recipe_schema.schema_of("data", Curation))
    good = tomllib.loads(find_recipe("data", data=True).read_text("utf-8"))
    assert list(validator.iter_errors(good)) == []
    assert list(validator.iter_errors(good | {"sauce": []}))


class TallyConfig(StageConfig):
    up_to: int = 3
    """The number to count up to."""


def test_the_table_of_another_stage_has_help_and_a_schema(monkeypatch):
    monkeypatch.setitem(kinds.CORE, "tally", TallyConfig)
    assert "number to count up to" in describe_keys("tally", ModelConfig, list(PRESETS))
    schema = jsonschema.Draft202012Validator(recipe_schema.recipe_schema(ModelConfig, list(PRESETS)))
    for kind, key, right in (("tally", "up_to", True), ("tally", "tasks", False), ("own.py:Stage", "up_to", True)):
        assert schema.is_valid({"name": "x", "stage": [{"kind": kind, key: 3}]}) is right


def test_the_wheel_runs_outside_the_clone(tmp_path):
    """Built and installed as by pip, beside the libraries of this environment; the clone is not on its path."""
    tree = tmp_path / "tree"  # a copy, since the build leaves files behind
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("bessemer-*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(str(Path(pytest.__file__).parents[1]))
    install = ["-m", "pip", "--python", python, "install", "-q", "--ignore-installed", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *install], check=True, timeout=200)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}

    def bessemer(*words: str) -> str:
        done = subprocess.run(
            [python.parent / "bessemer", *words],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    facts = json.loads(bessemer("recipes", "--json"))
    assert facts.keys() == {*NAMES, "data"}
    assert all(Path(fact["file"]).is_relative_to(site) for fact in facts.values())
    assert bessemer("init", "mine.toml", "--from", "remainder") == "mine.toml\nremainder.py\n"
    assert "no fault found" in bessemer("run", "mine.toml", "--dry-run")
