"""What a model learnt from: the stages before it, and the texts and problems that they showed it.

A stage says what it shows by `Stage.shown`. The folders read here belong to inputs of inputs: their fingerprints are
part of the models' own, so whatever changes in them redoes the models, and with them whatever reads this.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bessemer.config.table import StageConfig, stage_refs
from bessemer.pipeline.stage import find_kind
from bessemer.runs.directory import stage_folders
from bessemer.tasks import Problem


def ancestors(recipe: Any, names: Sequence[str]) -> list[StageConfig]:
    """The stages that `names` came from, themselves included, in the order of the recipe."""
    wanted, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += [other for _, other in stage_refs(recipe.stage(name))]
    return [stage for stage in recipe.stages if stage.name in wanted]


def shown(recipe: Any, names: Sequence[str], root: Path, cache: Path) -> Iterator[tuple[str, Iterator[Problem | str]]]:
    """(stage, what it showed) of every stage behind the models `names` of the run in `root`."""
    folders = {name: folder for _, name, folder in stage_folders(root)}
    for settings in ancestors(recipe, names):
        stage = find_kind(settings.kind)()
        yield settings.name, stage.shown(settings, recipe, folders[settings.name], cache)
