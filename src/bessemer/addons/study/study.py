"""Running a study: a folder with a run for every arm and seed, and what they say.

    OUT/{fixed.json, study.json, study.html, base-SEED/, ARM-SEED/{run/, result.json, log.txt}}

`fixed.json` is written before the first run. A file with other rules, arms or seeds is refused once there are runs. A
run that was stopped goes on; one that failed is tried again, and its attempts are counted.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer import __version__, plugins
from bessemer.addons.study import figures, jobs
from bessemer.addons.study.file import Study
from bessemer.addons.study.page import document
from bessemer.addons.study.report import StudyReport
from bessemer.config import places
from bessemer.data.fetch import cache_dir
from bessemer.errors import UserError
from bessemer.pipeline import preflight
from bessemer.runs.directory import difference
from bessemer.runs.files import read_json, write_atomic, write_json
from bessemer.system import claim, granted_cores

FIXED, RESULT, FACTS = "fixed.json", "result.json", "study.json"
RUN, BASE = "run", "base"


@dataclass(frozen=True)
class StudyJob:
    """A run of an arm, or of the shared stages (arm None), with one seed."""

    arm: str | None
    seed: int
    donor: str | None = None

    @property
    def name(self) -> str:
        return f"{self.arm or BASE}-{self.seed}"


def planned(study: Study) -> list[StudyJob]:
    """All jobs in the order of their start: all arms of a seed before the next seed."""
    planned: list[StudyJob] = []
    for seed in study.table.seeds:
        base = [StudyJob(None, seed)] if study.table.shared else []
        planned += base + [StudyJob(arm, seed, base[0].name if base else None) for arm in study.table.arm]
    return planned


class StudyFolder:
    """The folder of a study."""

    def __init__(self, study: Study, root: Path, reuse: str | None = None) -> None:
        """`reuse`: a run with the shared stages, in which {seed} stands for the seed."""
        self.study, self.root, self.reuse = study, root.absolute(), reuse

    def folder(self, job: StudyJob) -> Path:
        return self.root / job.name

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder for this process alone, after what the study follows from has been recorded in it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".lock", "a+") as lock:
            lock.seek(0)
            if not claim(lock, holder := lock.read().strip()):
                raise UserError(f"{self.root} is in use by another study (process {holder}); wait for it, or stop it")
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self.fix()
            yield
            lock.truncate(0)

    def refusal(self) -> str:
        """Why this file cannot go on with the runs in the folder; "" if it can."""
        before = read_json(self.root / FIXED)
        if before is None or before["hash"] == self.study.hash or not self.runs():
            return ""
        changed = difference(before["fixed"], self.study.fixed)
        return (
            f"{self.study.path} is not the file that the runs in {self.root} began with ({changed}; "
            f"{before['hash'][:16]} -> {self.study.hash[:16]}): a rule is fixed before its results. "
            "Change it back, or give the new study a folder of its own with --out"
        )

    def runs(self) -> int:
        """How many runs have begun."""
        return sum(path.is_dir() for path in self.root.glob("*-*"))

    def fix(self) -> None:
        if why := self.refusal():
            raise UserError(why)
        if (read_json(self.root / FIXED) or {}).get("hash") != self.study.hash:
            began = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            fixed = {"hash": self.study.hash, "time": began, "bessemer": __version__, "fixed": self.study.fixed}
            write_json(self.root / FIXED, fixed)

    def result(self, job: StudyJob) -> dict[str, Any] | None:
        return read_json(self.folder(job) / RESULT)

    def done(self, job: StudyJob) -> bool:
        result = self.result(job)
        return result is not None and not result["failed"]

    def waiting(self) -> list[StudyJob]:
        return [job for job in planned(self.study) if not self.done(job)]

    def command(self, job: StudyJob) -> list[str]:
        study, run = self.study, self.folder(job) / RUN
        base = None if job.donor is None else self.root / job.donor / RUN
        arm = None if job.arm is None else study.table.arm[job.arm]
        if arm is not None and arm.command:
            named = {"seed": job.seed, "out": run, "base": base or "", "here": study.here}
            return [_filled(part, named) for part in arm.command]
        command = jobs.python("bessemer", "run", str(study.file_of(job.arm).absolute()), "--out", str(run))
        for change in study.settings(job.arm, job.seed):
            command += ["--set", change]
        if job.arm is None:
            command += ["--until", str(study.table.shared)]
            base = None if self.reuse is None else Path(self.reuse.replace("{seed}", str(job.seed)))
        return command + (["--reuse", str(base)] if base is not None and (base / "recipe.toml").is_file() else [])

    def run(self, at_once: int, say: Callable[[str], None]) -> bool:
        """Runs what is missing; False if the time budget ended it. Raises KeyboardInterrupt once all jobs have saved
        after a stop signal."""
        waiting, began = self.waiting(), time.monotonic()
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, granted_cores() // at_once)
        count = len(waiting)
        say(f"{count} of {len(planned(self.study))} runs to go, {at_once} at a time; rule {self.study.hash[:16]}")

        def start(job: StudyJob) -> jobs.Process:
            folder = self.folder(job)
            (folder / RUN).mkdir(parents=True, exist_ok=True)
            where = self.study.here if job.arm and self.study.table.arm[job.arm].command else None
            process = jobs.begin(self.command(job), folder, threads, where)
            if isinstance(process, jobs.Adopted):
                say(f"{job.name}: still running since an earlier call (process {process.pid}); waiting for it")
            return process

        def ended(job: StudyJob, why: str, seconds: float) -> None:
            result = self._record(job, why, seconds)
            said = result["failed"] or ", ".join(f"{name} {value:.4g}" for name, value in result["figures"].items())
            state = "failed: " if result["failed"] else ""
            say(f"{job.name}: {state}{said or 'done'} ({seconds / 60:.1f} min)")
            self.write()

        budget = self.study.table.minutes
        over = math.inf if budget is None else began + 60 * budget
        failed = jobs.run(waiting, start, self.folder, at_once, ended, lambda: time.monotonic() < over)
        for job, why in failed:
            if self.result(job) is None:  # its donor failed
                write_json(self.folder(job) / RESULT, self._facts(job, {}, why, 0.0))
        return all(self.result(job) is not None for job in waiting)

    def _record(self, job: StudyJob, why: str, seconds: float) -> dict[str, Any]:
        found: dict[str, float] = {}
        if not why and job.arm is not None:
            try:
                found = figures.of_run(self.study, job.arm, self.folder(job) / RUN)
            except UserError as error:
                why = str(error)
        result = self._facts(job, found, why, seconds)
        write_json(self.folder(job) / RESULT, result)
        return result

    def _facts(self, job: StudyJob, found: dict[str, float], why: str, seconds: float) -> dict[str, Any]:
        before = self.result(job) or {}
        return {
            "arm": job.arm, "seed": job.seed, "figures": found, "failed": why,
            "attempts": before.get("attempts", 0) + 1, "seconds": round(before.get("seconds", 0.0) + seconds, 1),
            "command": shlex.join(self.command(job)),
        }  # fmt: skip

    def report(self) -> StudyReport:
        """What the runs so far say."""
        results = [result for job in planned(self.study) if job.arm and (result := self.result(job)) is not None]
        return StudyReport(self.study, results)

    def write(self) -> StudyReport:
        """study.json and study.html."""
        report = self.report()
        write_json(self.root / FACTS, report.facts())
        write_atomic(self.root / "study.html", document(report))
        return report


def minutes(study: Study, job: StudyJob) -> float | None:
    """Expected minutes of a job on one core, as the planner guesses them; None if nothing here tells."""
    if job.arm is not None and study.table.arm[job.arm].command:
        return study.table.arm[job.arm].minutes
    if (estimate := plugins.hook("estimate")) is None:
        return None
    recipe = study.recipe(job.arm, job.seed)
    shared = study.shared(recipe)
    due = shared if job.arm is None else recipe.stages[len(shared) :]
    with places.of_recipe(recipe.folder):
        expected = estimate(recipe, due, cache_dir(None), 1, lambda text: None, math.inf)
    return sum(expected.stages[stage.name].seconds for stage in due) / 60


def examine(study: Study) -> None:
    """UserError for a stage of an arm that cannot run."""
    for name, arm in study.table.arm.items():
        if not arm.command:
            recipe = study.recipe(name, study.table.seeds[0])
            with places.of_recipe(recipe.folder):
                for stage in recipe.stages:
                    try:
                        preflight.resolve(stage, recipe, cache_dir(None))
                    except UserError as error:
                        raise UserError(f"{study.path}: arm {name}: {error}") from None


def _filled(part: str, named: Mapping[str, object]) -> str:
    if part == "python":
        return sys.executable
    for key, value in named.items():
        part = part.replace(f"{{{key}}}", str(value))
    return part
