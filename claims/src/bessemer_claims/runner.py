"""Runs jobs, several at a time, each in its own process with one core.

`python -m bessemer_claims.runner PART SHAPE ARM SEED TIER FOLDER` is the child: it runs the job's recipe, if it has
one, with the recipe runner, and measures. A finished job is not run again; an interrupted one resumes.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

from bessemer.errors import UserError
from bessemer_claims import registry, results
from bessemer_claims.runs import ArmJob, ArmResult, Tier, part

INTERRUPTED = 130
RUN = "run"
"""The run directory inside a job's directory, beside its result and its log."""


class Failed(NamedTuple):
    job: ArmJob
    why: str


def run(jobs: Sequence[ArmJob], tier: Tier, out: Path, at_once: int, say: Callable[[str], None]) -> list[Failed]:
    """Runs the jobs that are not finished, at most `at_once` at a time, and returns those that failed. Raises
    KeyboardInterrupt after a stop signal, once all jobs have saved."""
    waiting = [job for job in jobs if not done(job, out)]
    total, minutes = len(waiting), sum(job.minutes for job in waiting) / max(1, at_once)
    if total:
        say(f"{total} jobs, about {minutes:.0f} minutes, {at_once} at a time; {len(jobs) - total} are finished")
    running: dict[ArmJob, tuple[subprocess.Popen, float]] = {}
    failed: list[Failed] = []
    ended = 0
    with _stopping(running):
        while waiting or running:
            for job in list(waiting):
                if len(running) >= at_once:
                    break
                if any(job.donor == failure.job.name for failure in failed):
                    waiting.remove(job)
                    failed.append(Failed(job, f"{job.donor} failed"))
                elif job.donor is None or not any(job.donor == failure.name for failure in (*waiting, *running)):
                    waiting.remove(job)
                    running[job] = _start(job, tier, out), time.monotonic()
            for job, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                ended += 1
                took = (time.monotonic() - began) / 60
                if process.returncode:
                    failed.append(Failed(job, _last_line(out / job.name)))
                    say(f"[{ended}/{total}] {job.name}: failed: {failed[-1].why}")
                else:
                    say(f"[{ended}/{total}] {job.name}: {took:.1f} min {_summary(job, out)}".rstrip())
            time.sleep(0.2)
    return failed


def done(job: ArmJob, out: Path) -> bool:
    return results.of_job(job, out / job.name) is not None


def _summary(job: ArmJob, out: Path) -> str:
    result = results.read(out / job.name)
    if result is None:
        return ""
    if result.diverged:
        return f"diverged: {result.diverged}"
    return ", ".join(f"{name} {value:.4g}" for name, value in list(result.metrics.items())[:3])


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "no message") + f" ({folder / 'log.txt'})"


def _start(job: ArmJob, tier: Tier, out: Path) -> subprocess.Popen:
    folder = out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", __name__, job.part, job.shape, job.arm, str(job.seed), tier, str(out)]
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **alone},
            start_new_session=True,
        )


@contextmanager
def _stopping(running: dict[ArmJob, tuple[subprocess.Popen, float]]):
    """Lets the running jobs save and end when a stop signal arrives."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, _ in running.values():
            with suppress(ProcessLookupError):
                process.terminate()
        for process, _ in running.values():
            process.wait()


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


def machine() -> dict[str, Any]:
    """The machine and versions that numbers were made with."""
    import torch

    from bessemer import __version__
    from bessemer.addons.accelerate.kernels import library

    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return {
            "machine": name,
            "torch": torch.__version__,
            "bessemer": __version__,
            "kernels": library.status().instructions,
        }
    return {"machine": platform.machine(), "torch": torch.__version__, "bessemer": __version__}


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
