"""The command that runs a study."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError


def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The study: arms, seeds, figures, rules, controls.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Its folder. Default: runs/studies/NAME.")] = None,
    at_once: Annotated[
        int | None,
        typer.Option("--jobs", min=1, metavar="N", help="Runs in parallel. Default: one for each core."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Arms, runs, minutes, and the power of every rule; run nothing.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Run nothing: say what the runs so far say.")] = False,
    reuse: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Take the shared stages from this run; {seed} in it stands for the seed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run arms x seeds under a rule fixed beforehand, and say whether it holds, with intervals, controls and power.

    The same command goes on after a stop. Exit status 1: runs failed, or the time budget ended before all had run."""
    from bessemer.addons.study import page
    from bessemer.addons.study.file import Study
    from bessemer.addons.study.jobs import INTERRUPTED
    from bessemer.addons.study.report import StudyReport
    from bessemer.addons.study.study import BASE, StudyFolder, StudyJob, examine, minutes
    from bessemer.system import granted_cores

    loaded = Study.load(file)
    at_once = at_once or granted_cores()
    folder = StudyFolder(loaded, out or Path("runs/studies") / loaded.name, reuse)
    if show and not folder.runs():
        raise UserError(
            f"{folder.root} holds no runs of this study; run it without --show, or name its folder with --out"
        )
    examine(loaded)
    if dry_run:
        if why := folder.refusal():
            raise UserError(why)
        first = loaded.table.seeds[0]
        arms = [None] * bool(loaded.table.shared) + list(loaded.table.arm)
        took = {arm or BASE: minutes(loaded, StudyJob(arm, first)) for arm in arms}
        print(page.before(StudyReport(loaded, []), took, at_once))
        return
    with folder.held():
        try:
            whole = show or folder.run(at_once, lambda line: print(line, file=sys.stderr, flush=True))
        except KeyboardInterrupt:
            print("stopped; nothing is lost; run the same command again to continue", file=sys.stderr)
            sys.exit(INTERRUPTED)
        report = folder.write()
    print_json(report.facts()) if as_json else print(page.text(report))
    if not as_json:
        print(folder.root / "study.html")
    if not whole:
        print("the time budget ended it; run the same command again to continue", file=sys.stderr)
    if report.failed or not whole:
        sys.exit(1)
