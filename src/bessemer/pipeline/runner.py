"""Running a recipe: stage after stage, skipping what is done, resuming where a kill left off.

Each stage's identity (config, seed, model, inputs) is compared with what its folder records:
    same and complete, output intact      -> skipped
    same, incomplete                      -> entered again; the stage resumes from its own state/
    absent, but finished in a run to reuse -> copied from there (`Donor`)
    other, damaged, or made from an input that has changed since -> moved aside and run again
The first SIGINT or SIGTERM lets the stage save and stop; the second kills. With several processes, the first runs the
recipe and the others follow it (`processes`).
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bessemer import plugins
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_seconds
from bessemer.data.fetch import cache_dir
from bessemer.errors import UserError
from bessemer.pipeline import inputs as outside
from bessemer.pipeline import preflight
from bessemer.pipeline.planned import Planned, planned
from bessemer.pipeline.processes import Processes
from bessemer.pipeline.reuse import Donor
from bessemer.pipeline.stage import find_kind, run_stage
from bessemer.runs.context import Interrupted, StageContext, StopFlag, signals
from bessemer.runs.directory import (
    RunDir,
    damages,
    digest,
    read_done,
    stage_folders,
    write_done,
    write_stage_record,
)
from bessemer.runs.files import explained, is_temporary, read_json, write_atomic, write_json
from bessemer.runs.hooks import hooks
from bessemer.runs.metrics import Metrics, StageMetrics
from bessemer.runs.progress import RunProgress, shown
from bessemer.system import alive
from bessemer.train import checkpoint


@dataclass
class StageResult:
    """The outcome of one stage."""

    name: str
    kind: str
    status: str
    """"done" in this call, "skipped" because it was done before, or "waiting" after --until."""
    seconds: float
    summary: dict[str, Any]
    folder: Path


def run(
    recipe: Recipe,
    out: Path | None = None,
    until: str | None = None,
    cache: Path | None = None,
    progress: RunProgress | None = None,
    reuse: Path | None = None,
    processes: Processes | None = None,
    worth: float | None = None,
) -> list[StageResult]:
    """Runs `recipe` in `out` (default runs/NAME) up to and including the stage `until`; returns every stage's result.

    Raises UserError for errors that the user can fix, and Interrupted (its text says how to resume) after a stop
    signal. This is process 0 of `processes` (None: the only one). `worth`: seconds of work from which its rate is
    measured before the run; inf: nothing is measured, None: as the estimate chooses.
    """
    if until is not None:
        recipe.stage(until)
    beside = hooks()
    for hook in beside:
        hook.check(recipe)
    root, processes = out or Path("runs") / recipe.name, processes or Processes()
    donor = None if reuse is None else Donor(reuse)
    with ExitStack() as entered:
        entered.enter_context(places.of_recipe(recipe.folder, root / places.REVISIONS))
        kinds = {config.name: find_kind(config.kind)() for config in recipe.stages}
        derived = {config.name: preflight.resolve(config, recipe, cache_dir(cache)) for config in recipe.stages}
        progress = progress or shown(dict.fromkeys(kinds, 0.0), until)
        rundir = entered.enter_context(RunDir.open(root, recipe.name))
        entered.enter_context(explained(root))
        stop = entered.enter_context(signals(together=processes.n > 1))
        text = outside.with_folder(recipe, root).to_toml()
        if not (root / "recipe.toml").exists():  # makes the folder a run's before anything else is written there
            rundir.record_recipe(text)
        if donor is not None:
            donor.give_revisions(root)
        metrics = Metrics(root / "metrics.jsonl")
        try:
            plan = planned(recipe, kinds, derived, rundir.folder)
            preflight.check(recipe, cache_dir(cache), [item.name for item in plan if not item.done])
            rundir.record_recipe(text)  # now: if the check refuses a call, those of the run's last call stay
            _set_aside_stale(plan, rundir, metrics, progress)
            expected = _expected(plan, recipe, until, cache, progress, processes.n, worth)
            progress.expect(expected, root)
            if rundir.killed:
                progress.say(rundir.killed)
            intact = _check_outputs(plan, until, rundir, metrics, progress)
            if (describe := plugins.hook("overview")) is not None:
                progress.say(describe(plan, recipe, root, expected, until, processes.n))
            if (conformance := plugins.hook("conformance")) is not None:
                rows = json.dumps(conformance(recipe), ensure_ascii=False, indent=1)
                write_atomic(root / "conformance.json", rows + "\n")
            entered.enter_context(repeating(recipe, progress.say))
            for hook in beside:
                entered.enter_context(hook.around(root, recipe))
            return _run_all(
                plan, recipe, rundir, until, cache_dir(cache), metrics, progress, stop, donor, processes, intact
            )
        finally:
            processes.end()
            progress.close()
            metrics.close()


def _expected(
    plan: list[Planned], recipe: Recipe, until: str | None, cache: Path | None, progress: RunProgress,
    n_processes: int, worth: float | None,
) -> Any:  # fmt: skip
    """How long every stage will take, as the hook `estimate` has it; None without it."""
    last = len(plan) if until is None else recipe.names().index(until) + 1
    due = [item.config for item in plan[:last] if not item.done]
    estimate = plugins.hook("estimate")
    return estimate and estimate(recipe, due, cache_dir(cache), n_processes, progress.say, worth)


def repeating(recipe: Recipe, say: Callable[[str], None]) -> AbstractContextManager[object]:
    """Makes training steps repeat bit for bit inside, if the layout says so and this device needs it."""
    kept = plugins.hook("deterministic")
    return nullcontext() if kept is None else kept(recipe.layout.deterministic, say)


def _set_aside_stale(plan: list[Planned], rundir: RunDir, metrics: Metrics, progress: RunProgress) -> None:
    """Before anything runs, moves aside stages made with other settings and stages that the recipe no longer has."""
    names = {item.name for item in plan}
    for _, name, folder in stage_folders(rundir.root):
        if name not in names:
            aside = rundir.set_aside(folder, name, metrics)
            progress.say(f"{name}: the recipe no longer has this stage; moved to {aside}")
    for item in plan:
        if not item.folder.exists() or all(is_temporary(path) for path in item.folder.iterdir()):
            continue
        _set_aside_if_stale(item, rundir, metrics, progress)


def _set_aside_if_stale(item: Planned, rundir: RunDir, metrics: Metrics, progress: RunProgress) -> None:
    if why := item.stale():
        aside = rundir.set_aside(item.folder, item.name, metrics)
        progress.say(f"{item.name}: {why}; the old one is moved to {aside}")


def _is_abandoned(path: Path) -> bool:
    """A temporary in the run's folder that no other process is writing, as trackers, `report` and `why` do there."""
    pid = path.name.rpartition(".tmp-")[2]
    return is_temporary(path) and not (pid.isdigit() and int(pid) != os.getpid() and alive(int(pid)))


def _run_all(
    plan: list[Planned], recipe: Recipe, rundir: RunDir, until: str | None, cache: Path, metrics: Metrics,
    progress: RunProgress, stop: StopFlag, donor: Donor | None, processes: Processes, intact: set[str],
) -> list[StageResult]:  # fmt: skip
    results: list[StageResult] = []
    digests: dict[str, str] = {}
    folders = {item.name: item.folder for item in plan}
    past_until = False
    for item in plan:
        if past_until:
            results.append(StageResult(item.name, item.config.kind, "waiting", 0.0, {}, item.folder))
            continue
        inputs = {name: digests[name] for name in item.sources}
        if any(result.status == "done" for result in results):
            intact = set()  # it may have been hours
        done = _finished(item, inputs, rundir, metrics, progress, item.name in intact)
        how = "already done"
        if done is None and donor is not None and not item.folder.exists():
            done, why = donor.give(item.name, item.folder, digest(item.identity), inputs, item.files, metrics)
            how = f"taken from {donor.root}"
            if why:
                progress.say(f"{item.name}: {why}; not taken from {donor.root}")
        status = "skipped" if done else "done"
        if done is None:
            how = "done"
            if stop:
                raise Interrupted(_how_to_go_on(recipe, rundir.root, item.name, "before"))
            # hashed again: a file may have changed since the run began, or while earlier stages ran
            item = replace(item, files=outside.read_by(item.config))
            if (item.folder / "state").exists():
                _set_aside_if_stale(item, rundir, metrics, progress)
            source, report = folders.get(item.config.source or ""), progress.begin(item.name)
            ctx = StageContext(
                name=item.name, dir=item.folder, inputs={name: folders[name] for name in item.sources},
                source=source, recipe=recipe, cache=cache, metrics=StageMetrics(metrics, item.name), progress=report,
                stop_flag=stop, runtime=processes.runtime(item.stage, source, recipe, report.say),
            )  # fmt: skip
            with ctx.runtime.working():
                done = _run_one(item, ctx, inputs, rundir)
        digests[item.name] = done["digest"]
        progress.end(item.name, done["seconds"])
        progress.say(f"{item.name}: {how} ({show_seconds(done['seconds'])}) {_facts(done['summary'])}".rstrip())
        kind, seconds, summary = item.config.kind, done["seconds"], done["summary"]
        results.append(StageResult(item.name, kind, status, seconds, summary, item.folder))
        past_until = item.name == until
    return results


def _finished(
    item: Planned, inputs: dict[str, str], rundir: RunDir, metrics: Metrics, progress: RunProgress, intact: bool
) -> dict[str, Any] | None:
    """The record of a complete stage; None if the stage must run, after moving its outdated folder aside. `intact`: its
    output has just been checked."""
    record = read_json(item.folder / "stage.json")
    done = read_done(item.folder)
    if record is None:
        return None
    if done is None and (item.folder / "done.json").exists():
        progress.say(f"{item.name}: done.json is damaged; the stage is entered again")
    why = ""
    if record.get("inputs") != inputs:
        changed = [name for name in inputs if record.get("inputs", {}).get(name) != inputs[name]]
        why = f"the output of {' and '.join(changed)} is not the one it was made from"
    elif done is not None and not intact and (damaged := damages(item.folder, done)):
        _leave(item, damaged, rundir, metrics, progress)
        return None
    if why:
        aside = rundir.set_aside(item.folder, item.name, metrics)
        progress.say(f"{item.name}: {why}; the old one is moved to {aside} and the stage runs again")
        return None
    return done


def _check_outputs(
    plan: list[Planned], until: str | None, rundir: RunDir, metrics: Metrics, progress: RunProgress
) -> set[str]:
    """Before anything runs, sees to finished stages whose output is damaged, so that it is known which stages must run.
    Returns the names of those whose output is intact."""
    intact = set()
    for item in plan:
        if item.done and (done := read_done(item.folder)) is not None:
            if damaged := damages(item.folder, done):
                _leave(item, damaged, rundir, metrics, progress)
            else:
                intact.add(item.name)
        if item.name == until:
            break
    return intact


def _leave(item: Planned, damaged: dict[str, str], rundir: RunDir, metrics: Metrics, progress: RunProgress) -> None:
    """Makes a finished stage with damaged output unfinished. If only its models are damaged and a checkpoint is whole,
    it goes on from there, which writes them again; else it is moved aside and starts over."""
    why = next(iter(damaged.values()))
    models = all(name == "done.json" or name.split("/")[0] in ("model", "model-ema") for name in damaged)
    if models and (newest := checkpoint.newest_whole(item.folder / "state")) is not None:
        (item.folder / "done.json").unlink()
        progress.say(f"{item.name}: {why}; it is written again from the checkpoint {newest.name}")
        return
    aside = rundir.set_aside(item.folder, item.name, metrics)
    progress.say(f"{item.name}: {why}; the old one is moved to {aside} and the stage runs again")


def _run_one(item: Planned, ctx: StageContext, inputs: dict[str, str], rundir: RunDir) -> dict[str, Any]:
    root = rundir.root
    with explained(item.folder):
        ctx.dir.mkdir(exist_ok=True)
        for leftover in [*filter(is_temporary, ctx.dir.rglob("*")), *filter(_is_abandoned, root.iterdir())]:
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        began = time.time()
        write_stage_record(ctx.dir, item.identity, inputs, item.files, began)
        before = read_json(ctx.dir / "wall.json") or {}
        ctx.spent, ctx.cpu_spent = before.get("seconds", 0.0), before.get("cpu_seconds", 0.0)
        if not (ctx.dir / "state").exists():
            ctx.rewind(-1)  # no state to resume from: the stage starts over, and so do its lines
        ctx.runtime.announce(
            {"stage": ctx.name, "folder": str(ctx.dir), "inputs": {n: str(p) for n, p in ctx.inputs.items()},
             "source": None if ctx.source is None else str(ctx.source), "spent": ctx.spent}
        )  # fmt: skip
        with _clock(ctx, rundir):
            try:
                with computing(item.name):
                    summary = run_stage(item.config, ctx)
            except Interrupted:
                raise Interrupted(_how_to_go_on(ctx.recipe, root, item.name, "in")) from None
        rundir.check()
        pinned = {name: commit for name, commit in outside.read_by(item.config).items() if name.startswith(places.HUB)}
        write_stage_record(ctx.dir, item.identity, inputs, item.files | pinned, began)
        checkpoint.settle(ctx.dir / "state")
        record = read_json(ctx.dir / "stage.json")
        assert record is not None
        return write_done(ctx.dir, record, summary, ctx.elapsed(), ctx.cpu())


@contextmanager
def _clock(ctx: StageContext, rundir: RunDir) -> Iterator[None]:
    """Keeps the stage's wall-clock seconds on disk, so that they add up across restarts, even after kill -9; and
    watches whether the run directory is still ours."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(2.0):
            try:
                rundir.check()
                _write_wall(ctx)
            except UserError as fault:
                ctx.stop_flag.fault = fault
                return
            except OSError:  # the stage reports a full disk itself; a missed tick of the clock must not stop it
                continue

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()
        if ctx.stop_flag.fault is None:
            with suppress(FileNotFoundError):  # the folder has vanished, which the stage or the next check reports
                _write_wall(ctx)


def _write_wall(ctx: StageContext) -> None:
    write_json(ctx.dir / "wall.json", {"seconds": round(ctx.elapsed(), 3), "cpu_seconds": round(ctx.cpu(), 3)})


def _how_to_go_on(recipe: Recipe, root: Path, name: str, where: str) -> str:
    default, run = root == Path("runs") / recipe.name, shlex.quote(str(root))
    return f'stopped {where} stage "{name}"; nothing is lost; continue with: bessemer run {run}/recipe.toml' + (
        "" if default else f" --out {run}"
    )


@contextmanager
def computing(stage: str) -> Iterator[None]:
    """Turns a GPU that fails or runs out of memory into a UserError, as training steps do themselves. At the end frees
    everything the stage had: a trainer is part of reference cycles, so Python would otherwise free its weights and end
    its worker processes in the middle of the next stage."""
    gc.freeze()  # what was there before need not be searched: saves 0.1 s with all modules imported
    try:
        yield
    except RuntimeError as error:
        explain = plugins.hook("explain-error")
        if explain is not None and (fault := explain(error, stage)) is not None:
            raise fault from error
        raise
    finally:
        gc.collect()
        gc.unfreeze()


def _facts(summary: dict[str, Any]) -> str:
    known = {key.replace("_", " "): value for key, value in summary.items() if isinstance(value, int | float | str)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in known.items()
    )
