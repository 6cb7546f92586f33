"""The model that a user names: a model directory, a stage, a run, or a checkpoint with its tokenizer."""

from __future__ import annotations

import os
import shlex
import warnings
from pathlib import Path

from bessemer.config.kinds import stage_config
from bessemer.config.table import nearest
from bessemer.errors import UserError
from bessemer.runs.directory import available_runs, read_recipe, stage_folders, writing_models
from bessemer.runs.files import read_json


def model_dir(named: str | Path) -> Path:
    """The folder of the model that a user names: a model directory, a stage's folder, RUN/STAGE by the stage's name, or
    a run (the model of its recipe's `main`, otherwise its last finished one that writes text)."""
    for path in (Path(named), Path("runs") / named):
        if (path.parent / "recipe.toml").is_file() and not path.is_dir():
            stages = {name: folder for _, name, folder in stage_folders(path.parent)}
            if path.name not in stages:
                writing = [name for name, _ in writing_models(path.parent)]
                near = nearest(path.name, writing) if writing else "none has a model yet"
                raise UserError(f'the run {path.parent} has no stage "{path.name}"; {near}')
            path = stages[path.name]
        if (path / "config.json").is_file():
            return path
        if (path / "model" / "config.json").is_file():
            return path / "model"
        if (path / "recipe.toml").is_file():
            return _last_model(path)
    if str(named) and Path(named).is_dir():
        inside = sorted(path.name for path in Path(named).iterdir() if not path.name.startswith("."))[:6]
        raise UserError(f"no model in {named}: no config.json; it holds {', '.join(inside) or 'nothing'}")
    if Path(named).is_file():
        raise UserError(f"{named} is a file, not a model directory or a run; {available_runs()}")
    raise UserError(f"no model or run at {named or '(an empty name)'}; {available_runs()}")


def _last_model(root: Path) -> Path:
    stages = stage_folders(root)
    if writers := writing_models(root):
        name, folder = writers[-1]
        if (later := _meant(root)) not in (None, name):
            warnings.warn(f'stage "{later}" of {root} is not finished; this is the model of "{name}"', stacklevel=3)
        return folder / "model"
    listed = ", ".join(
        f"{folder.name} ({'no model' if read_json(folder / 'done.json') else 'unfinished'})" for _, _, folder in stages
    )
    run = shlex.quote(str(root))
    raise UserError(
        f"no finished model in {root}; its stages: {listed or 'none yet'}; "
        f"continue with: bessemer run {run}/recipe.toml --out {run}"
    )


def _meant(root: Path) -> str | None:
    """The stage whose model stands for a run once the run is finished; None if its recipe cannot be read."""
    try:
        recipe = read_recipe(root)
        tables = [table for table in recipe.get("stage", []) if stage_config(table.get("kind"), "").makes_model]
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, UserError):
        return None
    return recipe.get("main") or next((str(table.get("name")) for table in reversed(tables)), None)


def check_not_of_a_run(target: Path) -> None:
    """Raises UserError if `target` is in a stage's folder: only running a run may change it."""
    resolved = Path(os.path.realpath(target))
    for folder in (resolved, *resolved.parents):
        if (folder / "stage.json").is_file():
            raise UserError(
                f"{target} belongs to a run, in {folder}, which only bessemer run changes; name another place"
            )


def tokenizer_of_checkpoint(checkpoint: Path) -> Path | None:
    """The tokenizer of a checkpoint RUN/NN-STAGE/state/step-... or state/kept/step-...: its stage's, that of a model
    which the stage read, or the run's."""
    above = checkpoint.resolve().parents
    stage = next((folder for folder in above if (folder / "stage.json").is_file()), above[1])
    record = read_json(stage / "stage.json") or {}
    read, origin = record.get("inputs", {}), record.get("identity", {}).get("settings", {}).get("from")
    stages = sorted(stage_folders(stage.parent), key=lambda entry: entry[1] != origin)
    models = [folder / "model" for _, name, folder in stages if name in read]
    folders = [stage / "state" / "tokenizer", stage / "model", *models, *sorted(stage.parent.glob("*/tokenizer"))]
    return next((path for path in folders if (path / "tokenizer.json").is_file()), None)
