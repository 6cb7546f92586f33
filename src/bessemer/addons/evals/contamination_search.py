"""The hook `contamination` of the stage "eval": searches the training data of its models for its problems."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.addons.evals import contamination
from bessemer.config.evaluation import EvalConfig
from bessemer.config.recipe import Recipe
from bessemer.pipeline.stage import find_kind
from bessemer.pipeline.stages.eval import ancestors
from bessemer.runs.context import StageContext
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import write_atomic

summary = contamination.summary


def search(config: EvalConfig, ctx: StageContext, problems: list[tasks.Problem]) -> dict[str, Any]:
    """`ContaminationSearch.result`. A finished search survives a kill."""
    path = ctx.state / "contamination.json"
    if path.exists():
        return json.loads(path.read_text())
    searched = contamination.ContaminationSearch(problems)
    for stage, texts in training_data(ctx.recipe, config.models, ctx.dir.parent, ctx.cache):
        searched.add_stage(stage, texts, config.searched_words)
        if ctx.stop:
            ctx.interrupt()
    result = searched.result()
    write_atomic(path, json.dumps(result))
    return result


def training_data(
    recipe: Recipe, names: Sequence[str], root: Path, cache: Path
) -> Iterator[tuple[str, Iterator[tasks.Problem | str]]]:
    """(stage, its training data) of every stage behind the models `names` of the run in `root`.

    The folders read here belong to inputs of inputs: their fingerprints are part of the models' own, so a change in
    them remakes the models and whatever reads this.
    """
    folders = {name: folder for _, name, folder in stage_folders(root)}
    for config in ancestors(recipe, names):
        stage = find_kind(config.kind)()
        yield config.name, stage.training_data(config, recipe, folders[config.name], cache)
