"""Running a recipe: stage after stage, skipping what is done, going on where a kill left off.

For each stage: its identity (settings, seed, model, inputs) against what the folder records.
    same and complete, output intact      -> skipped
    same, incomplete                      -> entered again; the stage goes on from its own state/
    absent, but finished in a run to reuse -> copied from there (reuse.py)
    other, damaged, or made from an input that has changed since -> moved aside, and run anew
The first SIGINT or SIGTERM lets the stage save and stop; the second kills.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig, stage_refs
from bessemer.config.units import show_seconds
from bessemer.data.fetch import cache_dir
from bessemer.pipeline.reuse import Donor
from bessemer.pipeline.signals import signals
from bessemer.pipeline.stage import Stage, find_kind
from bessemer.runs import record
from bessemer.runs.context import Interrupted, StageContext, StopFlag
from bessemer.runs.directory import RunDir, stage_folders
from bessemer.runs.files import explained
from bessemer.runs.metrics import Metrics, StageMetrics
from bessemer.runs.progress import RunProgress

if TYPE_CHECKING:
    from bessemer.dist.ranks import Ranks


@dataclass
class StageResult:
    """What became of one stage."""

    name: str
    kind: str
    status: str
    """"done" in this call, "skipped" because it was done before, or "waiting" after --until."""
    seconds: float
    summary: dict[str, Any]
    folder: Path


@dataclass
class _Planned:
    """A stage with everything known about it before it runs."""

    settings: StageConfig
    stage: Stage
    folder: Path
    identity: dict[str, Any]
    sources: list[str]

    @property
    def name(self) -> str:
        return self.settings.name


def run(
    recipe: Recipe,
    out: Path | None = None,
    until: str | None = None,
    cache: Path | None = None,
    conformance: Callable[[Recipe], list[dict[str, Any]]] | None = None,
    progress: RunProgress | None = None,
    reuse: Path | None = None,
    ranks: "Ranks | None" = None,
) -> list[StageResult]:
    """Run `recipe` in `out` (default runs/NAME) up to and with the stage `until`; a result for each stage.

    Raises UserError for what the user can mend and Interrupted (its text says how to go on) after a stop signal.
    With `ranks` this is rank 0, which the others follow (`follow.py`).
    `conformance` gives the rows {item, section, paper, here, on} printed at the start and kept in conformance.json.
    """
    if until is not None:
        recipe.stage(until)
    root = out or Path("runs") / recipe.name
    donor = None if reuse is None else Donor(reuse)
    kinds = {settings.name: find_kind(settings.kind)() for settings in recipe.stages}
    derived = {settings.name: kinds[settings.name].resolve(settings, recipe) for settings in recipe.stages}
    estimates = {settings.name: kinds[settings.name].estimate(settings, recipe) for settings in recipe.stages}
    progress = progress or RunProgress(estimates)
    with RunDir.open(root, recipe.name) as rundir, explained(root), signals(together=ranks is not None) as stop:
        rundir.record_recipe(recipe.to_toml())
        metrics = Metrics(root / "metrics.jsonl")
        try:
            plan = _plan(recipe, rundir, kinds, derived)
            _set_aside_stale(plan, rundir, metrics, progress)
            if conformance is not None:
                _show_conformance(conformance(recipe), root, progress)
            return _run_all(plan, recipe, rundir, until, cache_dir(cache), metrics, progress, stop, donor, ranks)
        finally:
            if ranks is not None:
                ranks.order({"end": True})
            progress.close()
            metrics.close()


def _plan(
    recipe: Recipe, rundir: RunDir, kinds: dict[str, Stage], derived: dict[str, dict[str, Any]]
) -> list[_Planned]:
    planned: list[_Planned] = []
    fingerprints: dict[str, str] = {}
    for number, settings in enumerate(recipe.stages, start=1):
        sources = list(dict.fromkeys(name for _, name in stage_refs(settings)))
        stage, facts = kinds[settings.name], derived[settings.name]
        what = stage.identity(settings, recipe, facts, {name: fingerprints[name] for name in sources})
        fingerprints[settings.name] = record.digest(what)
        planned.append(_Planned(settings, stage, rundir.folder(number, settings.name), what, sources))
    return planned


def _set_aside_stale(plan: list[_Planned], rundir: RunDir, metrics: Metrics, progress: RunProgress) -> None:
    """Before anything runs, move aside what other settings made, and stages the recipe no longer has."""
    names = {item.name for item in plan}
    for _, name, folder in stage_folders(rundir.root):
        if name not in names:
            aside = rundir.set_aside(folder, name, metrics)
            progress.say(f"{name}: the recipe no longer has this stage; moved to {aside}")
    for item in plan:
        if not item.folder.exists() or all(_is_temporary(path) for path in item.folder.iterdir()):
            continue
        begun = record.read_json(item.folder / "stage.json")
        if begun is not None and begun.get("fingerprint") == record.digest(item.identity):
            continue
        why = "its record is missing"
        if begun:
            why = record.difference(begun["identity"], item.identity, item.settings.renamed)
        aside = rundir.set_aside(item.folder, item.name, metrics)
        progress.say(f"{item.name}: {why}; the old one is moved to {aside}")


def _is_temporary(path: Path) -> bool:
    """Left by `write_atomic` or `reuse` in a process that was killed; the lock says that nobody is writing it now."""
    return ".tmp-" in path.name


def _run_all(
    plan: list[_Planned], recipe: Recipe, rundir: RunDir, until: str | None, cache: Path, metrics: Metrics,
    progress: RunProgress, stop: StopFlag, donor: Donor | None, ranks: "Ranks | None",
) -> list[StageResult]:  # fmt: skip
    results: list[StageResult] = []
    digests: dict[str, str] = {}
    folders = {item.name: item.folder for item in plan}
    past_until = False
    for item in plan:
        if past_until:
            results.append(StageResult(item.name, item.settings.kind, "waiting", 0.0, {}, item.folder))
            continue
        inputs = {name: digests[name] for name in item.sources}
        done = _finished(item, inputs, rundir, metrics, progress)
        how = "already done"
        if done is None and donor is not None and not item.folder.exists():
            done = donor.give(item.folder, item.name, record.digest(item.identity), inputs, metrics)
            how = f"taken from {donor.root}"
        status = "skipped" if done else "done"
        if done is None:
            how = "done"
            if stop:
                raise Interrupted(_how_to_go_on(recipe, rundir.root, item.name, "before"))
            ctx = StageContext(
                name=item.name, dir=item.folder, inputs={name: folders[name] for name in item.sources},
                source=folders.get(item.settings.source or ""), recipe=recipe, cache=cache,
                metrics=StageMetrics(metrics, item.name), progress=progress.begin(item.name), stop_flag=stop,
                ranks=ranks if item.stage.across else None,
            )  # fmt: skip
            done = _run_one(item, ctx, inputs, rundir.root)
        digests[item.name] = done["digest"]
        progress.end(item.name, done["seconds"])
        progress.say(f"{item.name}: {how} ({show_seconds(done['seconds'])}) {_facts(done['summary'])}".rstrip())
        kind, seconds, summary = item.settings.kind, done["seconds"], done["summary"]
        results.append(StageResult(item.name, kind, status, seconds, summary, item.folder))
        past_until = item.name == until
    return results


def _finished(
    item: _Planned, inputs: dict[str, str], rundir: RunDir, metrics: Metrics, progress: RunProgress
) -> dict[str, Any] | None:
    """The record of a stage that need not run; None when it must, with what is in its way moved aside."""
    begun = record.read_json(item.folder / "stage.json")
    done = record.read_json(item.folder / "done.json")
    if begun is None:
        return None
    why = ""
    if begun.get("inputs") != inputs:
        changed = [name for name in inputs if begun.get("inputs", {}).get(name) != inputs[name]]
        why = f"the output of {' and '.join(changed)} is not the one it was made from"
    elif done is not None and (damaged := record.damage(item.folder, done)):
        why = damaged
    if why:
        aside = rundir.set_aside(item.folder, item.name, metrics)
        progress.say(f"{item.name}: {why}; the old one is moved to {aside} and the stage runs again")
        return None
    return done


def _run_one(item: _Planned, ctx: StageContext, inputs: dict[str, str], root: Path) -> dict[str, Any]:
    with explained(item.folder):
        ctx.dir.mkdir(exist_ok=True)
        for leftover in filter(_is_temporary, [*ctx.dir.iterdir(), *root.iterdir()]):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        record.write_begun(ctx.dir, item.identity, inputs)
        ctx.spent = (record.read_json(ctx.dir / "wall.json") or {}).get("seconds", 0.0)
        if not (ctx.dir / "state").exists():
            ctx.rewind(-1)  # nothing to go on from: the stage starts over, and so do its lines
        if ctx.ranks is not None:
            ctx.ranks.order(
                {"stage": ctx.name, "folder": str(ctx.dir), "inputs": {n: str(p) for n, p in ctx.inputs.items()},
                 "source": None if ctx.source is None else str(ctx.source), "spent": ctx.spent}
            )  # fmt: skip
        with _clock(ctx):
            try:
                summary = item.stage.run(item.settings, ctx)
            except Interrupted:
                raise Interrupted(_how_to_go_on(ctx.recipe, root, item.name, "in")) from None
        begun = record.read_json(ctx.dir / "stage.json")
        assert begun is not None
        return record.write_done(ctx.dir, begun, summary, ctx.elapsed())


@contextmanager
def _clock(ctx: StageContext) -> Iterator[None]:
    """Keep the stage's wall seconds on disk, so that restarts, even after kill -9, add up."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(2.0):
            try:
                record.write_json(ctx.dir / "wall.json", {"seconds": round(ctx.elapsed(), 3)})
            except OSError:  # a full disk is for the stage to meet; a clock that misses a second is no reason to stop
                continue

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()
        record.write_json(ctx.dir / "wall.json", {"seconds": round(ctx.elapsed(), 3)})


def _how_to_go_on(recipe: Recipe, root: Path, name: str, where: str) -> str:
    default = root == Path("runs") / recipe.name
    return f'stopped {where} stage "{name}", nothing is lost; go on with: bessemer run {root}/recipe.toml' + (
        "" if default else f" --out {root}"
    )


def _facts(summary: dict[str, Any]) -> str:
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in summary.items()
             if isinstance(value, int | float | str)]  # fmt: skip
    return ", ".join(shown)


def _show_conformance(rows: list[dict[str, Any]], root: Path, progress: RunProgress) -> None:
    record.write_atomic(root / "conformance.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    table = Table(title="the paper's recipe, here", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "item", "section", "paper", "here"):
        table.add_column(heading)
    for row in rows:
        mark = "on" if row["on"] else "off"
        table.add_row(*(Text(str(cell)) for cell in (mark, row["item"], row["section"], row["paper"], row["here"])))
    progress.say(table)
