"""Runs jobs, several at a time, each in its own process with one core.

`python -m bessemer_claims.runner PART SHAPE ARM SEED TIER FOLDER` is the child: it runs the job's recipe, if it has
one, with the recipe runner, and measures. A finished job is not run again; an interrupted one resumes.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from bessemer.addons.study.jobs import INTERRUPTED, Failed, Process, begin, python
from bessemer.addons.study.jobs import run as run_jobs
from bessemer.addons.study.machine import machine
from bessemer.errors import UserError
from bessemer_claims import registry, results
from bessemer_claims.runs import ArmJob, ArmResult, Tier, part

RUN = "run"
"""The run directory inside a job's directory, beside its result and its log."""


def run(
    jobs: Sequence[ArmJob], tier: Tier, out: Path, at_once: int, say: Callable[[str], None]
) -> list[Failed[ArmJob]]:
    """Runs the jobs that are not finished, at most `at_once` at a time, and returns those that failed. Raises
    KeyboardInterrupt after a stop signal, once all jobs have saved."""
    waiting = [job for job in jobs if not done(job, out)]
    total, minutes = len(waiting), sum(job.minutes for job in waiting) / max(1, at_once)
    if total:
        say(f"{total} jobs, about {minutes:.0f} minutes, {at_once} at a time; {len(jobs) - total} are finished")
    count = itertools.count(1)

    def start(job: ArmJob) -> Process:
        return begin(python(__name__, job.part, job.shape, job.arm, str(job.seed), tier, str(out)), out / job.name, 1)

    def ended(job: ArmJob, why: str, seconds: float) -> None:
        said = f"failed: {why}" if why else f"{seconds / 60:.1f} min {_summary(job, out)}".rstrip()
        say(f"[{next(count)}/{total}] {job.name}: {said}")

    return run_jobs(waiting, start, lambda job: out / job.name, at_once, ended)


def done(job: ArmJob, out: Path) -> bool:
    return results.of_job(job, out / job.name) is not None


def _summary(job: ArmJob, out: Path) -> str:
    result = results.read(out / job.name)
    if result is None:
        return ""
    if result.diverged:
        return f"diverged: {result.diverged}"
    return ", ".join(f"{name} {value:.4g}" for name, value in list(result.metrics.items())[:3])


# --- the child -------------------------------------------------------------------------------------------------------


def run_job(job: ArmJob, out: Path, command: str = "") -> ArmResult:
    """Runs one job in this process, and writes and returns its result; `command` is recorded in it."""
    from bessemer.pipeline import runner

    folder = out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    began, diverged = time.monotonic(), ""
    metrics: dict[str, float] = {}
    try:
        if job.recipe is not None:
            reuse = None if job.donor is None else out / job.donor / RUN
            runner.run(job.recipe(), folder / RUN, reuse=reuse, worth=math.inf)  # nobody waits for it
        metrics = {name: _short(value) for name, value in part(job.part).measure(job, folder / RUN).items()}
    except UserError as error:
        if "does not recover" not in str(error):  # train.guard: a run that diverges is a result
            raise
        diverged = str(error)
    facts = {"minutes": round((time.monotonic() - began) / 60, 2), "command": command, **machine()}
    result = ArmResult(
        job.part, job.arm, job.seed, job.shape, job.digest, registry.rules_hash(), metrics, diverged, facts
    )
    results.write(folder, result)
    return result


def _short(value: float) -> float:
    return float(f"{value:.7g}")


def main(arguments: Sequence[str]) -> int:
    from bessemer.runs.context import Interrupted

    name, shape, arm, seed, tier, out = arguments
    jobs = part(name).jobs(cast(Tier, tier), max(1, int(seed)))
    [job] = [arm_job for arm_job in jobs if (arm_job.shape, arm_job.arm, arm_job.seed) == (shape, arm, int(seed))]
    try:
        run_job(job, Path(out), shlex.join(["python", "-m", "bessemer_claims.runner", *arguments[:-1], "runs/claims"]))
    except Interrupted:
        return INTERRUPTED
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
