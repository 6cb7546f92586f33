"""Commands on runs: run a recipe, follow it, write its report, evaluate its models; and the doctor."""

import shlex
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.common import AsJson, NoVerify, YesNo, app, print_json, recipes_like
from bessemer.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType


class ShotChoice(StrEnum):
    worked = "worked"
    direct = "direct"
    other_language = "other-language"
    fables = "fables"


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
    conformance: Annotated[
        bool,
        typer.Option("--conformance", help="Run nothing: compare the recipe with the papers', item by item."),
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
    if conformance:
        checking = {"dry-run": dry_run or None, "processes": processes, "world": world, "device": device}
        _refuse("--conformance", running | checking)
        _conformance(recipe, set_ or [], as_json)
        return
    if dry_run:
        _refuse("--dry-run", running)
        _dry_run(recipe, set_ or [], world, processes, device, as_json)
        return
    check_used("--dry-run", False, {"world": world, "device": device})
    from bessemer.config.builtin import run_of
    from bessemer.config.recipe import Recipe
    from bessemer.config.units import show_seconds
    from bessemer.pipeline.conformance import rows
    from bessemer.pipeline.processes import start
    from bessemer.pipeline.runner import run as run_recipe
    from bessemer.plan import feasible
    from bessemer.runs.context import Interrupted
    from bessemer.runs.directory import writing_models

    began = time.monotonic()
    loaded = Recipe.load(recipe, set_ or [])
    out = out or run_of(recipe)
    root = out or Path("runs") / loaded.name
    started = start(loaded, root, processes, check=lambda n: feasible.check(loaded, root, until, n))
    try:
        with started.running():
            if started.me:
                started.follow(loaded)
                return
            results = run_recipe(loaded, out, until, conformance=rows, reuse=reuse, processes=started)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    from bessemer.report import card  # here, since matplotlib takes long to import and most ranks never need it

    report = card.write(root)
    if as_json:
        stages = [
            {"name": result.name, "kind": result.kind, "status": result.status, "seconds": result.seconds,
             "summary": result.summary, "directory": str(result.folder)}
            for result in results
        ]  # fmt: skip
        print_json({"name": loaded.name, "directory": str(root), "report": str(report), "stages": stages})
        return
    if table := card.table(root):
        print(table)
    now, whole = time.monotonic() - began, sum(result.seconds for result in results)
    took = show_seconds(now) + (f", {show_seconds(whole)} with earlier work" if whole > now + 1 else "")
    print(f"{loaded.name}: {took}; report: {report}")
    if models := writing_models(root):
        others = [name for name, _ in models[:-1]]
        chat = f"bessemer chat {shlex.quote(str(root))}"
        which = f" (or {chat}/STAGE: {', '.join(others)})" if others else ""
        print(f"talk to {models[-1][0]}: {chat}{which}")
    files = [path.stat() for path in root.glob("*/state/**/*") if path.is_file()]
    sizes = {(file.st_dev, file.st_ino): file.st_size for file in files}  # kept checkpoints are hard links
    if (held := sum(sizes.values())) > 1e9 and until is None:  # every stage is finished: nothing will resume from them
        print(f"{held / 1e9:.1f} GB are checkpoints and the like, which only bessemer replay still uses; to free them:")
        print(f"rm -r {shlex.quote(str(root))}/*/state")


def _conformance(recipe: Path, overrides: list[str], as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from bessemer.config import places
    from bessemer.config.recipe import Recipe
    from bessemer.pipeline.conformance import rows
    from bessemer.runs.directory import CONFORMANCE_STATES, conformance_summary

    loaded = Recipe.load(recipe, overrides)
    with places.of_recipe(loaded.folder):
        found = rows(loaded)
    if as_json:
        print_json(found)
        return
    table = Table("", "item", "in the paper", "here", title=conformance_summary(found), title_justify="left")
    for row in sorted(found, key=lambda row: CONFORMANCE_STATES.index(row["state"])):
        table.add_row(*(Text(row[key]) for key in ("state", "item", "paper", "here")))
    print_table(table)


def _dry_run(
    recipe: Path, overrides: list[str], world: int | None, processes: int | None, device: str | None, as_json: bool
) -> None:
    from bessemer import probe
    from bessemer.cli import many
    from bessemer.config import places
    from bessemer.config.recipe import Recipe
    from bessemer.data.fetch import cache_dir
    from bessemer.pipeline import preflight
    from bessemer.plan import dry_run, feasible, plan_config
    from bessemer.plan.hardware import device as named

    loaded = Recipe.load(recipe, overrides)
    chosen = None if device is None else named(device)
    with places.of_recipe(loaded.folder):
        stages = preflight.examine(loaded, cache_dir(None), loaded.names())
        here, _ = many.decide(loaded, processes, probe.gpus())
        feasible.add(loaded, stages, world, chosen, here, lambda text: print(text, file=sys.stderr))
        layout = (
            dry_run.of_recipe(loaded, world or processes, device) if next(plan_config.begun(loaded), None) else None
        )
    faults = preflight.list_faults(stages)
    if as_json:
        print_json((layout.facts() if layout else {}) | {"stages": [stage.facts() for stage in stages]})
    else:
        texts = [faults, preflight.describe(stages), dry_run.describe(layout) if layout else "", faults]
        print(*filter(None, texts if faults else [*texts, "no fault found"]), sep="\n\n")
    if faults:
        sys.exit(2)


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="A run's directory, or its name under runs/; several are compared."),
    ],
    open_: Annotated[YesNo, typer.Option("--open", help="Open it in the browser.")] = YesNo.no,
) -> None:
    """Write a run's report card, or a comparison of several runs, as one HTML file."""
    from bessemer.report import card, compare
    from bessemer.runs.directory import run_dir

    roots = [run_dir(run) for run in runs]
    path = compare.write(roots) if len(roots) > 1 else card.write(roots[0])
    print(path)
    if open_ is YesNo.yes:
        typer.launch(str(path))


@app.command()
def watch(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="A run's directory, or its name under runs/; several are overlaid."),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8100,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it in the browser.")] = True,
) -> None:
    """Follow runs on a live page: curves, expert loads, rollouts, alarms, planned against measured time. It only reads
    the directories, so the runs may be finished, in progress, or on a mounted disk."""
    import os
    import webbrowser

    from bessemer.serve.watch import watch as serve

    def ready(address: str) -> None:
        print(f"bessemer watch: {address}  Ctrl-C stops", flush=True)
        # without a screen, a text browser would take over the terminal
        if (
            browser
            and sys.stdout.isatty()
            and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ})
        ):
            webbrowser.open(address)

    serve(runs, port=port, ready=ready)


@app.command()
def track(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name under runs/.")],
    to: Annotated[str, typer.Option("--to", metavar="NAMES", help="tensorboard, wandb, mlflow, trackio, or several.")],
) -> None:
    """Send a run's metrics to experiment trackers that lack them. The recipe key trackers does this during the run."""
    from bessemer.runs import trackers
    from bessemer.runs.directory import run_dir

    if failed := trackers.track(run_dir(run), [name.strip() for name in to.split(",")]):
        raise UserError("; ".join(failed))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--folder", help="Where runs would be stored.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Measure this machine: what it can run, and what will be slow on it. Under torchrun, all machines are
    measured together: which rank is where, and how fast they reach each other."""
    from bessemer.cli import doctor as machine
    from bessemer.cli import many

    if (facts := many.examine(folder) if many.started() else machine.examine(folder)) is None:
        return
    if as_json:
        print_json(facts)
    else:
        print(machine.describe(facts))


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model directory, or a run: its main model, by default the last."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task, such as countdown; may be repeated.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Published evaluations and their sampling: r1. Can be resumed.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="Evaluations of the suite. Default: all.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|NAME=PATH|hf://",
            help="Data of the suite: a folder of NAME.jsonl, .csv or .parquet; for one evaluation, a path or an hf:// "
            "address; hf://: the public data sets. May be repeated. Default: data/evals.",
        ),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Score these answers, a file or a folder of NAME.jsonl, instead of a model's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the suite's answers. Default: evals/SUITE/MODEL.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers per problem. Default: 8, or the suite's.")] = None,
    problems: Annotated[
        int | None, typer.Option(min=1, help="Held-out problems per task. Default: 100, or all of the suite's.")
    ] = None,
    skip: Annotated[
        int | None, typer.Option(min=0, help="Leave out the first held-out problems of each task. Default: 0.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="k of pass@k and maj@k. Default: all answers.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Default: 1, or the suite's; 0 picks the most likely token.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Nucleus threshold. Default: 1, or the suite's.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per answer. Default: 200, or the suite's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same answers. Default: 0.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Worked examples before the question. Default: 0.")] = None,
    shot_kind: Annotated[
        ShotChoice | None, typer.Option(help="What the examples are; the others are controls. Default: worked.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(metavar="TEXT", help="Text before every question.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASK[,TASK]", help="Tasks of lm-eval, after those of --task.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of your own lm-eval tasks; their code is run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per lm-eval task. Default: all.")] = None,
    chat: Annotated[YesNo | None, typer.Option(help="Ask lm-eval's questions in the model's chat template.")] = None,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model: pass@1, pass@k and maj@k on held-out problems, published evaluations, and lm-eval's tasks."""
    from bessemer.runs.directory import model_dir

    ours = {"samples": samples, "problems": problems, "k": k, "temperature": temperature, "top_p": top_p,
            "max_new_tokens": max_tokens, "seed": seed}  # fmt: skip
    before = {"count": shots, "kind": shot_kind and shot_kind.value, "prefix": prefix}
    theirs = {"include": include, "limit": limit, "chat": None if chat is None else chat is YesNo.yes}
    of_suite = {"only": only, "data": data, "answers": answers, "out": out}
    check_used("--task", task or suite, ours)
    check_used("--task", task, {"skip": skip, "shots": shots, "shot_kind": shot_kind, "prefix": prefix})
    check_used("--shots", shots, {"shot_kind": shot_kind})
    check_used("--lm-eval", lm_eval, theirs)
    check_used("--suite", suite, of_suite)
    if lm_eval is not None and not _names(lm_eval):
        raise UserError("--lm-eval names no task; write names with commas between them, such as arc_easy,gsm8k")
    if not task and not lm_eval and not suite:
        raise UserError("nothing to evaluate on: name a task with --task (bessemer eval MODEL --task countdown)")
    if (model is None) == (answers is None):
        raise UserError("name either a model, or a file of answers with --answers")
    check_used("MODEL", model, {name: value for name, value in ours.items() if name not in ("problems", "k")})
    folder, rows = None if model is None else model_dir(model), []
    from bessemer.eval import evaluate as evaluation

    if suite:
        if task or lm_eval or k:
            raise UserError("--suite cannot be combined with --task, --lm-eval or --k; make two calls")
        from bessemer.eval import suite_run

        result = suite_run.evaluate_suite(folder, suite=suite, **chosen(ours | of_suite | {"only": _names(only)}))
        if as_json:
            print_json(result)
        else:
            print_table(evaluation.suite_table(result["rows"]))
        return
    assert folder is not None, "only a suite is scored without a model"
    if task:
        from bessemer.eval.shots import Shots

        rows += evaluation.evaluate(folder, names=task, shots=Shots(**chosen(before)), **chosen(ours | {"skip": skip}))
    if lm_eval:
        rows += evaluation.evaluate_lm_eval(folder, names=_names(lm_eval), **chosen(theirs))
    if as_json:
        print_json({"model": str(folder), "rows": rows})
        return
    print_table(evaluation.table(rows))


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def print_table(table: "RenderableType") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)


def chosen(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(beside: str, options: dict[str, Any]) -> None:
    """Raises UserError for options without effect beside another."""
    if given := chosen(options):
        raise UserError(f"--{next(iter(given))} has no effect with {beside}, which runs nothing; leave it out")


def check_used(what_for: str, used: object, options: dict[str, Any]) -> None:
    """Raises UserError for options that have no effect."""
    if not used and (given := chosen(options)):
        name = next(iter(given)).replace("max_new_tokens", "max_tokens").replace("_", "-")
        raise UserError(f"--{name} has no effect without {what_for}; add {what_for}, or leave it out")
