"""Commands on a run: its report, its live page, its models packed, its trackers, a step replayed, why reward rose."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from bessemer.addons.families.options import YesNo
from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError

RunStage = Annotated[str, typer.Argument(metavar="RUN[/STAGE]", help="A run; add the stage if several are of kind rl.")]


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="A run's directory, or its name under runs/; several are compared."),
    ],
    open_: Annotated[YesNo, typer.Option("--open", help="Open it in the browser.")] = YesNo.no,
) -> None:
    """Write a run's report card, or a comparison of several runs, as one HTML file."""
    from bessemer.addons.watch import card, compare
    from bessemer.runs.directory import run_dir

    roots = [run_dir(run) for run in runs]
    path = compare.write(roots) if len(roots) > 1 else card.write(roots[0])
    print(path)
    if open_ is YesNo.yes:
        typer.launch(str(path))


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

    from bessemer import plugins

    if (serve := plugins.hook("live-page")) is None:
        raise UserError("the live page comes with the add-on serve, which is not here; install it")

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


def pack(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name under runs/.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The new directory.")],
    stage: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this stage's model; may be repeated. Default: all but imported ones."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", metavar="ID", help="Licence of the weights, such as mit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pack a run's models as files to publish: RUN-STAGE.tar with weights, tokenizer, card, evaluation and hashes."""
    from bessemer.addons.watch.pack import pack as pack_run
    from bessemer.runs.directory import run_dir

    written = pack_run(run_dir(run), folder, stage or [], licence)
    if as_json:
        print_json(written)
        return
    for one in written:
        print(f"{one['file']}: {one['bytes'] / 1e6:,.1f} MB, sha256 {one['sha256']}")


def track(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name under runs/.")],
    to: Annotated[str, typer.Option("--to", metavar="NAMES", help="tensorboard, wandb, mlflow, trackio, or several.")],
) -> None:
    """Send a run's metrics to experiment trackers that lack them. The recipe key trackers does this during the run."""
    from bessemer.addons.watch import trackers
    from bessemer.runs.directory import run_dir

    if failed := trackers.track(run_dir(run), [name.strip() for name in to.split(",")]):
        raise UserError("; ".join(failed))


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN[/STAGE]", help="A run; add the stage if several are of kind rl.")],
    step: Annotated[int, typer.Option(min=1, help="Optimizer step; all steps of its rollout are replayed.")],
    rollouts: Annotated[int, typer.Option(min=1, help="Rollouts to replay from there on.")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replay once more with this key changed; may be repeated."),
    ] = None,
    from_start: Annotated[
        bool,
        typer.Option(
            "--from-start",
            help="If no checkpoint before the step is kept: start at the stage's beginning, however long it takes.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replay an RL step of a run bit for bit: rollouts, rewards, gradients; then with a setting changed, side by side.
    The run itself is not touched."""
    from bessemer.addons.watch import replay as replays
    from bessemer.addons.watch import replay_text
    from bessemer.runs.context import Interrupted

    root, name = _stage_of(run)
    try:
        result = replays.replay(root, name, step, rollouts, set_ or [], from_start)
    except Interrupted:
        print("stopped; the run is as it was", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json(result.facts())
    else:
        print(replay_text.describe(result))
    if any(result.differences()):
        raise typer.Exit(1)


def why(
    run: RunStage,
    problems: Annotated[int, typer.Option(min=8, help="Held-out problems.")] = 64,
    samples: Annotated[int, typer.Option(min=4, help="Answers per problem and model.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Show why the reward of an RL stage rose: which ways of answering it chose, what each earned, what was new."""
    from bessemer.addons.watch import card
    from bessemer.addons.watch import why_stage as causes
    from bessemer.addons.watch import why_text as words

    root, name = _stage_of(run)
    stage, explanation = causes.explain(root, name, problems, samples)
    report = card.write(root)
    if as_json:
        print_json({"stage": stage} | explanation.facts())
    else:
        print(words.describe(stage, explanation))
        print(f"\n{report}")


def diagnose(
    logs: Annotated[
        list[Path],
        typer.Argument(metavar="LOG...", help="A log of TRL, verl, prime-rl, OpenRLHF or ours, or a run's folder."),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="METRIC=NAME", help="What the log calls a metric; may be repeated."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="PAGE", help="Write a page, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what the log of an RL run shows is going wrong, since which step, and what to look at next: TRL, verl,
    prime-rl, OpenRLHF, trackio, W&B's exports, ours. Exit code 0 no alarm, 1 alarms, 2 could not be read."""
    from bessemer.addons.diagnose.command import run

    if code := run(logs, metric or [], as_json, html):
        raise typer.Exit(code)


def _stage_of(run: str) -> tuple[Path, str | None]:
    """The run directory and the stage of RUN[/STAGE], where STAGE is a stage's name or that of its folder."""
    from bessemer.runs.directory import run_dir, stage_folders

    try:
        return run_dir(run), None
    except UserError:
        path = Path(run)
        with contextlib.suppress(UserError):
            root = run_dir(path.parent)
            named = {folder.name: name for _, name, folder in stage_folders(root)}
            return root, named.get(path.name, path.name)
        raise
