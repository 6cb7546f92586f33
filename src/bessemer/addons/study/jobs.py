"""Runs jobs, several at a time, each in a process of its own with its share of the cores, its output in its folder's
log. A job with a donor starts after it. Which jobs are finished is their owner's to say: a second call goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

INTERRUPTED = 130
LOG = "log.txt"
_PID = "process"


class QueuedJob(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def donor(self) -> str | None:
        """The job that must have finished before it starts."""
        ...


AnyJob = TypeVar("AnyJob", bound=QueuedJob)


class Failed(NamedTuple, Generic[AnyJob]):
    job: AnyJob
    why: str


class Process(Protocol):
    """What is asked of a running job."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


def run(
    jobs: Sequence[AnyJob], start: Callable[[AnyJob], Process], folder: Callable[[AnyJob], Path], at_once: int,
    ended: Callable[[AnyJob, str, float], None], more: Callable[[], bool] = lambda: True,
) -> list[Failed[AnyJob]]:  # fmt: skip
    """Runs the jobs, at most `at_once` at a time, and returns those that failed. `ended` hears of every job that has
    run: why it failed, or "", and its seconds. No job starts any more once `more` is false. Raises KeyboardInterrupt
    after a stop signal, once all jobs have saved."""
    waiting = list(jobs)
    running: dict[AnyJob, tuple[Process, float]] = {}
    failed: list[Failed[AnyJob]] = []
    with _stopping(running):
        while running or (waiting and more()):
            for job in list(waiting) if more() else ():
                if len(running) >= at_once:
                    break
                if any(job.donor == failure.job.name for failure in failed):
                    waiting.remove(job)
                    failed.append(Failed(job, f"{job.donor} failed"))
                elif job.donor is None or not any(job.donor == other.name for other in (*waiting, *running)):
                    waiting.remove(job)
                    running[job] = start(job), time.monotonic()
            for job, (process, began) in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[job]
                why = _why(folder(job), status) if status else ""
                if why:
                    failed.append(Failed(job, why))
                ended(job, why, time.monotonic() - began)
            time.sleep(0.2)
    return failed


def begin(
    command: Sequence[str], folder: Path, threads: int, where: Path | None = None, more: Mapping[str, str] | None = None
) -> Process:
    """Starts a job's process, with `threads` cores and the environment variables in `more`. One that an earlier call
    has started and that still runs, since that call was killed, is waited for instead."""
    folder.mkdir(parents=True, exist_ok=True)
    if (left := Adopted.of(folder)) is not None:
        return left
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    own = dict.fromkeys(names, str(threads)) | {"PYTHONHASHSEED": "0"} | dict(more or {})
    with open(folder / LOG, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=where, env={**os.environ, **own},
            start_new_session=True,
        )  # fmt: skip
    (folder / _PID).write_text(str(process.pid))
    return process


class Adopted:
    """A process that is not a child of this one: it ends with status 0, and its results tell how."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @classmethod
    def of(cls, folder: Path) -> Adopted | None:
        try:
            pid = int((folder / _PID).read_text())
        except (OSError, ValueError):
            return None
        return cls(pid) if _runs(pid, folder) else None

    def poll(self) -> int | None:
        return None if _exists(self.pid) else 0

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.2)
        return 0


def _exists(pid: int) -> bool:
    from bessemer.system import alive

    with suppress(OSError, IndexError):  # an orphan that nobody has waited for has ended, too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return alive(pid)


def _runs(pid: int, folder: Path) -> bool:
    """Whether this number is still that of the folder's process: that process writes to the folder's log."""
    if not _exists(pid):
        return False
    with suppress(OSError):
        return Path(f"/proc/{pid}/fd/1").resolve() == (folder / LOG).resolve()
    return not Path("/proc").is_dir()


def last_line(folder: Path) -> str:
    """The last line that a job has written, and where the others are."""
    with suppress(OSError):
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "no message") + f" ({folder / LOG})"
    return "no message"


def _why(folder: Path, status: int) -> str:
    killed = f"killed by signal {-status}; " if status < 0 else ""
    return killed + last_line(folder)


@contextmanager
def _stopping(running: Mapping[AnyJob, tuple[Process, float]]) -> Iterator[None]:
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


def python(module: str, *arguments: str) -> list[str]:
    """A command that runs a module with this Python."""
    return [sys.executable, "-P", "-m", module, *arguments]
