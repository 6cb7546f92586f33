"""Kinds of stages that come from outside the package: their tables, help, schema and errors."""

import json
import re
import subprocess
import sys
from importlib import invalidate_caches
from pathlib import Path

import pytest

from bessemer import plugins
from bessemer.config import kinds, places
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline import runner
from bessemer.pipeline.stage import find_kind
from bessemer.runs.context import Interrupted
from bessemer.runs.files import conversation_texts

COUNTING = """
from bessemer.config.table import StageConfig
from bessemer.pipeline.stage import Stage

class CountConfig(StageConfig):
    up_to: int = 3
    \"\"\"The number to count up to.\"\"\"

class Count(Stage[CountConfig]):
    def run(self, config, ctx):
        (ctx.dir / "made.txt").write_text(str(config.up_to))
        return {"counted": config.up_to}

class Nothing:
    pass
"""


@pytest.fixture
def counting(tmp_path):
    (tmp_path / "counting.py").write_text(COUNTING)

    def recipe(keys, name="Count"):
        path = tmp_path / "recipe.toml"
        path.write_text(f'name = "own"\n[[stage]]\nkind = "counting.py:{name}"\n{keys}\n')
        return path

    return recipe


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that brings a stage with its table, and a recipe of its own."""
    (tmp_path / "counting_addon.py").write_text(
        COUNTING + "from bessemer.config.table import ConfigTable\nclass Note(ConfigTable):\n    text: str\n"
    )
    about = tmp_path / "counting_addon-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: counting-addon\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[bessemer.stages]\ntally = counting_addon:Count\n"
        "[bessemer.tables]\ntally = counting_addon:CountConfig\nnote = counting_addon:Note\n"
        "gone = not_installed_addon:Config\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugins._entry_points.cache_clear()
    yield
    plugins._entry_points.cache_clear()
    sys.modules.pop("counting_addon", None)


def test_a_stage_in_a_file_has_the_table_that_its_class_names(counting, tmp_path):
    recipe = Recipe.load(counting("up_to = 5"))
    assert recipe.names() == ["Count"]
    (result,) = runner.run(recipe, tmp_path / "run")
    assert (result.folder / "made.txt").read_text() == "5" and result.summary == {"counted": 5}
    assert runner.run(Recipe.load(tmp_path / "run" / "recipe.toml"), tmp_path / "run")[0].status == "skipped"


@pytest.mark.parametrize(
    ("keys", "name", "words"),
    [
        ("up_too = 5", "Count", ["recipe.toml", '"up_too"', 'did you mean "up_to"']),
        ('up_to = "5"', "Count", ['"up_to"', "a whole number"]),
        ("", "Counted", ["counting.py", "Counted", "did you mean Count"]),
        ("", "Nothing", ["counting.py:Nothing", "Stage"]),
    ],
)
def test_a_mistake_in_a_stage_of_one_s_own_is_one_line_that_names_it(counting, keys, name, words):
    with pytest.raises(UserError) as error:
        Recipe.load(counting(keys, name))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_package_s_tables_are_known(package):
    assert "tally" in kinds.stage_tables() and "note" in kinds.recipe_tables()
    stage = '[[stage]]\nkind = "{}"\n'
    assert Recipe.parse('name = "x"\n' + stage.format("tally"), ["tally.up_to=7"]).stage("tally").up_to == 7
    with pytest.raises(UserError, match='did you mean "tally"'):
        Recipe.parse('name = "x"\n' + stage.format("tallly"))
    with pytest.raises(UserError, match="not_installed_addon, which is not here"):
        Recipe.parse('name = "x"\n' + stage.format("gone"))


@pytest.mark.parametrize("kind", ["counting.py:Count", "counting_module:Count"])
def test_a_stage_runs_again_when_its_file_has_changed(tmp_path, monkeypatch, kind):
    monkeypatch.syspath_prepend(tmp_path)
    path, file = tmp_path / "recipe.toml", tmp_path / f"{kind.partition(':')[0].removesuffix('.py')}.py"
    path.write_text(f'name = "own"\n[[stage]]\nkind = "{kind}"\nname = "count"\nup_to = 5\n')
    for code, status, made in (("5", "done", "5"), ("5", "skipped", "5"), ("5 + 1", "done", "6")):
        file.write_text(COUNTING.replace("config.up_to))", f"{code}))"))
        sys.modules.pop("counting_module", None)
        invalidate_caches()
        (result,) = runner.run(Recipe.load(path), tmp_path / "run")
        assert result.status == status and (result.folder / "made.txt").read_text() == made


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("return [][0]", ["counting.py, line 13", "IndexError"]),
        ("return 7", ["counting.py", "line 9", "run returned int", "dictionary"]),
    ],
)
def test_what_a_stage_of_one_s_own_does_wrong_is_one_line_and_its_state_stays(counting, tmp_path, line, words):
    path = counting("")
    source = COUNTING.replace(
        "def run(self, config, ctx):", "def run(self, config, ctx):\n        (ctx.state / 'kept').touch()"
    )
    (tmp_path / "counting.py").write_text(source.replace('return {"counted": config.up_to}', line))
    with pytest.raises(UserError) as error:
        runner.run(Recipe.load(path), tmp_path / "run")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert (tmp_path / "run" / "01-Count" / "state" / "kept").exists()


def test_a_stage_of_one_s_own_may_stop(counting, tmp_path):
    path = counting("")
    (tmp_path / "counting.py").write_text(COUNTING.replace("return {", "ctx.interrupt()\n        return {"))
    with pytest.raises(Interrupted, match="Count"):
        runner.run(Recipe.load(path), tmp_path / "run")


@pytest.mark.slow
def test_a_stage_of_one_s_own_runs_on_all_ranks(counting, tmp_path):
    path = counting("")
    told = "(ctx.dir / f'rank-{ctx.runtime.me}').write_text(str(ctx.once(lambda: ctx.runtime.me)))"
    source = COUNTING.replace("(StageConfig):", "(StageConfig):\n    starts_from = False").replace(
        "class Count(Stage[CountConfig]):", "class Count(Stage[CountConfig]):\n    distributed = True"
    )
    (tmp_path / "counting.py").write_text(source.replace("return {", f"{told}\n        return {{"))
    command = [sys.executable, "-m", "bessemer", "run", path, "--processes", "2", "--out", tmp_path / "run"]
    subprocess.run(command, check=True, capture_output=True)
    assert [(tmp_path / "run" / "01-Count" / f"rank-{rank}").read_text() for rank in (0, 1)] == ["0", "0"]


def test_the_guide_s_stage_runs_and_sft_reads_it(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    (tmp_path / "longest.py").write_text(re.search(r"```python\n(# longest.py\n.*?)```", guide, re.DOTALL)[1])
    talks = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!" * n}] for n in (1, 3, 2)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    stages = '[[stage]]\nkind = "longest.py:Longest"\ndata = "talks.jsonl"\nkeep = 2\n'
    (tmp_path / "recipe.toml").write_text(f'name = "own"\n{stages}')
    (result,) = runner.run(Recipe.load(tmp_path / "recipe.toml"), tmp_path / "run")
    assert result.summary == {"conversations": 2}
    assert [len(text) for text in conversation_texts(result.folder)] == [5, 4]
    tuned = '[[stage]]\nkind = "import"\nmodel = "."\n'
    tuned += '[[stage]]\nkind = "sft"\nlr = 1e-3\nlr_final = 1e-4\nsamples = ["Longest"]\n'
    (tmp_path / "recipe.toml").write_text(f'name = "own"\n{stages}{tuned}')
    recipe = Recipe.load(tmp_path / "recipe.toml")
    with places.of_recipe(tmp_path):
        find_kind("sft")().resolve(recipe.stage("sft"), recipe)
