"""The recipes that come with the package, by name: `bessemer run tiny`.

They lie in two folders of the repository, `recipes` and `examples`. The package has links to them, a wheel copies.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from bessemer.config.table import nearest
from bessemer.errors import UserError

PACKAGE = Path(__file__).parents[1]
FOLDERS = ("recipes", "examples")
PREFIX = "builtin:"
"""Before a name that a file of the user's has, too."""


@cache
def builtin_recipes(data: bool = False) -> dict[str, Path]:
    """{name: file} of the training recipes, or of the data recipes."""
    files = (file for folder in FOLDERS for file in sorted((PACKAGE / folder).glob("*.toml")))
    return {file.stem: file for file in files if ("[[stage]]" not in file.read_text("utf-8")) == data}


def find_recipe(name: str | Path, data: bool = False) -> Path:
    """The file of a training recipe, or of a data recipe, which is named by its path or, where it comes with the
    package, by its name alone; or that of a run, named by its directory or by its name under runs/. UserError: there is
    none, or the name could mean a file here, too."""
    text = os.fspath(name)
    recipes = builtin_recipes(data)
    if text.startswith(PREFIX):
        inside = text.removeprefix(PREFIX)
        if inside not in recipes:
            raise UserError(f'no built-in recipe "{inside}"; {nearest(inside, list(recipes))}')
        return recipes[inside]
    path = Path(text)
    if text not in recipes:
        if not data and (run := run_of(text)) is not None:
            return run / RECIPE
        if path.suffix or path.exists() or len(path.parts) > 1:
            return path  # reading it raises the error, if there is one
        raise UserError(f'no recipe "{text}": {nearest(text, list(recipes))} (or the path of a file, such as my.toml)')
    if present := [file for file in (path, Path(f"{text}.toml")) if file.is_file()]:
        raise UserError(
            f"{text} is a built-in recipe, and {present[0]} lies here: write ./{present[0]} or {PREFIX}{text}"
        )
    return recipes[text]


RECIPE = "recipe.toml"
"""A run's own recipe, in its directory."""
RUN_FORMAT = 2
"""Raised when run directories of the version before cannot be continued."""
FORMAT_LINE = "# bessemer {}, run format {}\n"
"""First line of a run's own recipe: the version that wrote it, and its RUN_FORMAT."""


def check_run_format(run: Path) -> None:
    """UserError if a run has stages of another RUN_FORMAT."""
    if not (run / RECIPE).is_file() or not any(run.glob("[0-9]*-*/stage.json")):
        return
    with open(run / RECIPE, encoding="utf-8", errors="replace") as file:
        stated = re.fullmatch(FORMAT_LINE.format(r"(\S+)", r"(\d+)"), file.readline())
    if stated is not None and int(stated[2]) == RUN_FORMAT:
        return
    version = f"Bessemer {stated[1]} (run format {stated[2]})" if stated else "an earlier version of Bessemer"
    raise UserError(
        f"{run} was made by {version}, and this version (run format {RUN_FORMAT}) cannot continue it. Start anew with: "
        f"bessemer run RECIPE.toml --out {run}-new. The models in {run} still load, also as the start of a new run "
        '(a stage of kind "import")'
    )


def run_of(name: str | Path) -> Path | None:
    """The run directory that a path or a name under runs/ stands for; None if it is something else, such as the name of
    a built-in recipe."""
    if os.fspath(name) in builtin_recipes():
        return None
    return next((path for path in (Path(name), Path("runs") / name) if (path / RECIPE).is_file()), None)


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What a run may be called: it names a folder."""
