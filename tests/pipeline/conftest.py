"""A small recipe and a way to run it in its own process, so that tests can kill it."""

import json
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import stages_run
import toy_stage
from forks import Fork

from bessemer.pipeline.runner import StageResult

RECIPE = """
name = "toy"
seed = {seed}
[[stage]]
kind = "count"
name = "first"
steps = {steps}
pause = {pause}
[[stage]]
kind = "count"
name = "second"
steps = {second}
pause = {pause}
fill_disk = {fill}
[[stage]]
kind = "compare"
models = ["first", "second"]
"""


class Toy:
    """A recipe file and its run directory."""

    def __init__(self, folder: Path) -> None:
        self.path, self.out = folder / "toy.toml", folder / "run"
        self.write()

    def write(self, seed=7, steps=20, second=20, pause=0.0, fill="false", name="toy") -> None:
        text = RECIPE.format(seed=seed, steps=steps, second=second, pause=pause, fill=fill)
        self.path.write_text(text.replace('"toy"', f'"{name}"', 1))

    def start(self, *until: str) -> Fork:
        return Fork(lambda: toy_stage.main(str(self.path), str(self.out), *until))

    def run(self, *until: str) -> tuple[int, dict[str, str], str]:
        """(exit status, status of each stage, standard error)."""
        process = self.start(*until)
        out, output = process.communicate(timeout=60)
        return process.returncode, json.loads(out) if out.strip() else {}, output

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def wait_for(self, condition, seconds=20.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "waited in vain"
            time.sleep(0.01)

    def result(self) -> dict[str, bytes]:
        """Every file of a run that must not depend on how often the run was killed."""
        kept = [path for path in self.out.rglob("*") if path.is_file() and path.parent.name != "state"]
        kept = [path for path in kept if path.suffix != ".json" or path.parent.name == "model"]
        files = {str(path.relative_to(self.out)): path.read_bytes() for path in kept if path.name != ".lock"}
        plain = [{key: line[key] for key in ("stage", "step", "tokens", "values")} for line in self.lines()]
        return files | {"metrics.jsonl": json.dumps(plain).encode()}


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


@pytest.fixture
def other_toy(tmp_path):
    (tmp_path / "other").mkdir()
    return Toy(tmp_path / "other")


class SmallRun(NamedTuple):
    """Tests leave it as it is and go on from copies (`stages_run.copy_without`)."""

    recipe: Path
    folder: Path
    """Of the recipe's text, and of the run in `run`."""
    results: dict[str, StageResult]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The small recipe (stages_run.py) and its finished run, made once for all files."""
    folder = tmp_path_factory.mktemp("small")
    recipe = stages_run.write_recipe(folder)
    return SmallRun(recipe, folder, stages_run.run(recipe, folder / "run"))
