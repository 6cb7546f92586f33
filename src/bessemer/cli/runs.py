"""The command that runs a recipe, and what commands on runs share."""

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.common import AsJson, app, print_json, recipes_like
from bessemer.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType


@app.command()
def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe: a file, the name of a built-in one, such as tiny, or a run, which then goes on.",
            autocompletion=recipes_like,
        ),
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory. Default: runs/NAME.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    reuse: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Copy finished stages from this run if they would be identical.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Run nothing: check every stage and the files it reads, and lay out the pre-training."
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            "--gpus",
            min=1,
            metavar="N",
            help="Processes on this machine. Default: one for each GPU that the recipe can use, or as its layout says.",
        ),
    ] = None,
    world: Annotated[int | None, typer.Option(min=1, metavar="N", help="With --dry-run: number of ranks.")] = None,
    device: Annotated[
        str | None, typer.Option(help="With --dry-run: check whether it fits on this device, such as H800.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe; finished stages are skipped, an interrupted stage continues."""
    running = {"out": out, "until": until, "reuse": reuse}
    if dry_run:
        _refuse("--dry-run", running)
    else:
        check_used("--dry-run", False, {"world": world, "device": device})
    from bessemer import plugins

    if dry_run:
        if (examine := plugins.hook("dry-run")) is None:
            raise UserError("--dry-run comes with the add-on plan, which is not here; install bessemer whole")
        examine(recipe, set_ or [], world, processes, device, as_json)
        return
    from bessemer.config.builtin import run_of
    from bessemer.config.recipe import Recipe
    from bessemer.config.units import show_seconds
    from bessemer.pipeline.processes import start
    from bessemer.pipeline.runner import run as run_recipe
    from bessemer.runs.context import Interrupted
    from bessemer.runs.directory import writing_models

    began = time.monotonic()
    loaded = Recipe.load(recipe, set_ or [])
    out = out or run_of(recipe)
    root = out or Path("runs") / loaded.name

    def check(n: int) -> None:
        if (refuse := plugins.hook("check-memory")) is not None:
            refuse(loaded, root, until, n)

    started = start(loaded, root, processes, check=check)
    try:
        with started.running():
            if started.me:
                started.follow(loaded)
                return
            results = run_recipe(loaded, out, until, reuse=reuse, processes=started)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    summary = plugins.hook("summary")  # not before: matplotlib takes long to import, and most ranks never need it
    report, table = (None, "") if summary is None else summary(root)
    if as_json:
        stages = [
            {"name": result.name, "kind": result.kind, "status": result.status, "seconds": result.seconds,
             "summary": result.summary, "directory": str(result.folder)}
            for result in results
        ]  # fmt: skip
        print_json({"name": loaded.name, "directory": str(root), "report": report and str(report), "stages": stages})
        return
    if table:
        print(table)
    now, total = time.monotonic() - began, sum(result.seconds for result in results)
    took = show_seconds(now) + (f", {show_seconds(total)} with earlier work" if total > now + 1 else "")
    print(f"{loaded.name}: {took}" + (f"; report: {report}" if report else ""))
    if models := writing_models(root):
        earlier = [name for name, _ in models[:-1]]
        chat = f"bessemer chat {shlex.quote(str(root))}"
        which = f" (or {chat}/STAGE: {', '.join(earlier)})" if earlier else ""
        print(f"talk to {models[-1][0]}: {chat}{which}")
    files = [path.stat() for path in root.glob("*/state/**/*") if path.is_file()]
    sizes = {(file.st_dev, file.st_ino): file.st_size for file in files}  # kept checkpoints are hard links
    stored = sum(sizes.values())
    if stored > 1e9 and until is None:  # every stage is finished: nothing will resume from them
        print(
            f"{stored / 1e9:.1f} GB are checkpoints and the like, which only bessemer replay still uses; to free them:"
        )
        print(f"rm -r {shlex.quote(str(root))}/*/state")


def print_table(table: "RenderableType") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)


def chosen(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(beside: str, options: dict[str, Any]) -> None:
    """Raises UserError for options without effect beside another."""
    if refused := chosen(options):
        raise UserError(f"--{next(iter(refused))} has no effect with {beside}, which runs nothing; leave it out")


def check_used(what_for: str, used: object, options: dict[str, Any]) -> None:
    """Raises UserError for options that have no effect."""
    if not used and (unused := chosen(options)):
        name = next(iter(unused)).replace("max_new_tokens", "max_tokens").replace("_", "-")
        raise UserError(f"--{name} has no effect without {what_for}; add {what_for}, or leave it out")
