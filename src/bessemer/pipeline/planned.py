"""The stages of a recipe as a run would execute them: what identifies each, and how that compares with its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig, stage_refs
from bessemer.pipeline import inputs as outside
from bessemer.pipeline.stage import Stage
from bessemer.runs.directory import difference, digest, read_done
from bessemer.runs.files import read_json


@dataclass
class Planned:
    """A stage, with everything that is known before it runs."""

    config: StageConfig
    stage: Stage[Any]
    folder: Path
    identity: dict[str, Any]
    sources: list[str]
    files: outside.Files
    """What it reads from outside the run, as it was when this run began."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def done(self) -> bool:
        """Whether the folder holds the complete output of this very stage."""
        done = read_done(self.folder)
        same = done is not None and done["fingerprint"] == digest(self.identity)
        return same and not outside.changed(read_json(self.folder / "stage.json"), self.files)

    def stale(self) -> str:
        """Why this stage did not make what the folder holds; "" if it did."""
        record = read_json(self.folder / "stage.json")
        if not record:
            return "its record is missing"
        if record.get("fingerprint") != digest(self.identity):
            return difference(record["identity"], self.identity)
        why = outside.changed(record, self.files)
        return f"{why}; the stage runs again" if why else ""


def planned(
    recipe: Recipe, kinds: dict[str, Stage[Any]], derived: dict[str, dict[str, Any]],
    folder_of: Callable[[int, str], Path],
) -> list[Planned]:  # fmt: skip
    """The stages in order; `folder_of` gives the folder of the n-th (from 1) by its name."""
    found: list[Planned] = []
    fingerprints: dict[str, str] = {}
    for number, config in enumerate(recipe.stages, start=1):
        sources = list(dict.fromkeys(name for _, name in stage_refs(config)))
        stage, facts = kinds[config.name], derived[config.name]
        what = stage.identity(config, recipe, facts, {name: fingerprints[name] for name in sources})
        fingerprints[config.name] = digest(what)
        folder = folder_of(number, config.name)
        found.append(Planned(config, stage, folder, what, sources, outside.read_by(config)))
    return found
