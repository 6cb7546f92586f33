"""`bessemer claims` and `bessemer audit`: published claims about DeepSeek-V3 and R1, each with its evidence."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.addons.plan.commands import write_page
from bessemer.cli.common import AsJson, print_json
from bessemer.errors import UserError
from bessemer_claims import PARTS, Part

if TYPE_CHECKING:
    from bessemer_claims.cards import Results
    from bessemer_claims.runs import ArmJob, Tier

RUNS = Path("runs/claims")


def claims(
    only: Annotated[str | None, typer.Option(metavar="IDS", help="Only claims such as L6,M7, and their runs.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smallest runs: 15 minutes on two cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All runs, every seed: a night. Can be resumed.")] = False,
    part: Annotated[Part | None, typer.Option(help="Only the runs of one part; none: run nothing.")] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Seeds of every arm. Default: one; with --full three to five."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their minutes; run nothing.")] = False,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs in parallel, one core each.")] = 2,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the runs.")] = RUNS,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also add the runs' results to DIR, in the form of the committed ones."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the claims and their ids; compute nothing.")] = False,
    rules: Annotated[
        bool, typer.Option("--rules", help="Verdicts under rules 1 beside the answers under rules 2; runs nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page to write. Default: claims.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the claims of an account of DeepSeek-R1 by small runs, by calculation or by audit, on one page.

    Without --quick or --full the runs take one to three hours, with one seed. Finished runs are not repeated, and
    the committed results count. Exit status 1: arithmetic contradicts a published figure, two runs that
    differ by chance alone differ too much, or a run failed."""
    from bessemer_claims import registry

    if quick and full:
        raise UserError("--quick and --full are two tiers; leave one of them out")
    idle = "--list" if list_ else "--dry-run" if dry_run else "--rules" if rules else ""
    for option, value, other, which in (
        ("--only", only, list_ and "--list", "lists all claims"),
        ("--out", out, idle or (as_json and "--json") or (only is not None and "--only"), "writes no page"),
        ("--save", save, idle, "runs nothing"),
        (
            "--seeds",
            seeds,
            (list_ and "--list") or (rules and "--rules") or (part == "none" and "--part none"),
            "runs nothing",
        ),
    ):
        if value is not None and other:
            raise UserError(f"{option} has no effect with {other}, which {which}; leave one of them out")
    if list_:
        entries = registry.claims()
        print_json({name: claim.model_dump() for name, claim in entries.items()}) if as_json else print(
            registry.listing()
        )
        return
    names = list(registry.claims()) if only is None else registry.chosen(only.split(","))
    if rules:
        _compared(names, as_json)
        return
    tier: Tier = "quick" if quick else "full" if full else "default"
    planned = _planned(tier, part, None if only is None else names, seeds)
    if dry_run:
        _dry_run(planned, runs, jobs, as_json)
        return
    wrong = _run(planned, tier, runs, jobs)
    results, again, apart = _evidence(names, tier, runs, save)
    from bessemer_claims import cards

    written = cards.make(names, results, again)
    if as_json:
        print_json({"rules": registry.rules_hash(), "claims": [card.facts() for card in written]})
    else:
        print(cards.describe(written))
    if not as_json and only is None:
        from bessemer_claims import page

        path = out or Path("claims.html")
        write_page(path, page.document(written, date.today()))
        print(path)
    unequal = [f"{card.name} ({label})" for card in written for label in card.wrong_equalities]
    wrong += [f"arithmetic does not give: {'; '.join(unequal)}"] * bool(unequal) + apart
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


def audit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The published run: deepseek-v3.")],
    draws: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Draw the planner's uncertain inputs N times, such as 400, and say how likely the published cost is.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --draws: their seed. Default: 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare published figures with the planner's predictions, and say whether they can be true."""
    if draws is not None:
        from bessemer_claims.credibility import credibility

        views = credibility(name, draws, seed or 0)
        print_json(views.facts()) if as_json else print(views.describe())
        return
    if seed is not None:
        raise UserError("--seed has no effect without --draws; leave it out")
    from bessemer_claims import audit as audits

    lines = audits.audit(name)
    print_json([line.facts() for line in lines]) if as_json else print(audits.describe(lines))


def _planned(tier: Tier, part: Part | None, names: list[str] | None, seeds: int | None) -> list[ArmJob]:
    from bessemer_claims import runs as all_runs

    parts = PARTS if part is None else () if part is Part.none else (part.value,)
    return all_runs.planned(tier, parts, names, seeds)


def _compared(names: list[str], as_json: bool) -> None:
    """Prints verdicts under both rules, from the committed results."""
    from bessemer_claims import both_rules, cards, results, runs

    made = cards.make(names, runs.best(results.committed().results))
    print_json([card.facts() for card in made]) if as_json else print(both_rules.compared(made), end="")


def _dry_run(planned: list[ArmJob], folder: Path, at_once: int, as_json: bool) -> None:
    from bessemer_claims import runner

    minutes_left = sum(job.minutes for job in planned if not runner.done(job, folder))
    if as_json:
        jobs = [
            {"name": job.name, "arm": job.arm, "seed": job.seed, "minutes": job.minutes, "about": job.about,
             "finished": runner.done(job, folder)}
            for job in planned
        ]  # fmt: skip
        print_json({"jobs": jobs, "minutes": minutes_left / at_once})
        return
    arms: dict[tuple[str, str, str], list[ArmJob]] = {}
    for job in planned:
        arms.setdefault((job.part, job.shape, job.arm), []).append(job)
    print(f"{'part':<9} {'size':<10} {'arm':<17} {'to run':>7} {'one core':>10}  what it is")
    for (part, shape, arm), seeds in arms.items():
        waiting = [job for job in seeds if not runner.done(job, folder)]
        minutes = f"{sum(job.minutes for job in waiting):.1f} min" if waiting else "finished"
        some = f"{len(waiting)} of {len(seeds)}"
        print(f"{part:<9} {shape:<10} {arm:<17} {some:>7} {minutes:>10}  {seeds[0].about}")
    finished = sum(runner.done(job, folder) for job in planned)
    remainder = f"the rest takes about {minutes_left / at_once:.0f} minutes, {at_once} at a time"
    print(f"{len(planned)} runs, {finished} of them finished in {folder}; {remainder}")


def _run(planned: list[ArmJob], tier: Tier, folder: Path, at_once: int) -> list[str]:
    """Runs what is missing; returns a sentence for each failed job."""
    if not planned:
        return []
    from bessemer_claims import runner

    try:
        failed = runner.run(planned, tier, folder, at_once, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("stopped; nothing is lost; run the same command again to continue", file=sys.stderr)
        sys.exit(runner.INTERRUPTED)
    return [f"{job.name} failed: {why}" for job, why in failed]


def _evidence(names: list[str], tier: Tier, folder: Path, save: Path | None) -> tuple[Results, Results, list[str]]:
    """The results that judge the cards, those of this tier's own runs beside them, and the A/A tests that failed."""
    from bessemer_claims import results, runs

    stored, own = results.committed(), results.finished(folder)
    for sentence in stored.left_out + own.left_out:
        print(sentence, file=sys.stderr)
    if diverged := [f"{result.arm} seed {result.seed}" for result in own.results if result.diverged]:
        print(f"did not survive, which is a result: {', '.join(diverged)}", file=sys.stderr)
    if lacking := runs.missing([*stored.results, *own.results], names):
        named = "; ".join(f"{arm} ({', '.join(claims)})" for arm, claims in lacking.items())
        print(f"no runs yet, and the cards that lack them: {named}", file=sys.stderr)
    if save is not None:
        for path in results.save(own.results, save):
            print(path, file=sys.stderr)
    return results.evidence(tier, stored.results, own.results)
