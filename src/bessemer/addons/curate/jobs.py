"""Jobs, and the worker processes that run them.

A job writes one folder, atomically, and records its identity in facts.json: a hash of everything that its output
depends on, including the identities of the jobs before it. A folder whose facts.json holds the current identity is
complete. So a killed build reruns only the missing jobs, and a build whose inputs or settings changed reruns what
depends on them.

A runner's `run(jobs)` yields (job, facts) as jobs finish, in any order; their output does not depend on the runner.
When a worker is killed (by the system, when memory runs out), every running job is retried alone, so that the job that
kills its worker can be named. Workers end with their parent, however it ends. `pipeline/curation` adds a runner for
Ray."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bessemer.errors import UserError
from bessemer.system import peak_memory

FACTS = "facts.json"
STEPS = "bessemer.addons.curate.steps"


class Job(NamedTuple):
    """`steps.STEP(folder, **arguments)` writes to `folder` and returns facts about its output."""

    step: str
    title: str
    """What the job works on, for messages."""
    folder: Path
    identity: str
    arguments: dict[str, Any]
    weight: int = 1
    """The job's share of the step's work, in that step's units."""


def facts_of(job: Job) -> dict[str, Any] | None:
    """The facts of a finished job; None if it has not finished or asked to be retried."""
    try:
        facts = json.loads((job.folder / FACTS).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return facts if facts.get("identity") == job.identity and facts.get("complete", True) else None


def perform(job: Job) -> dict[str, Any]:
    """Run a job in this process."""
    began, worked = time.monotonic(), time.process_time()
    scratch = job.folder.with_name(f".{job.folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed worker
    scratch.mkdir(parents=True)
    facts = getattr(importlib.import_module(STEPS), job.step)(scratch, **job.arguments)
    facts |= {
        "identity": job.identity,
        "seconds": round(time.monotonic() - began, 3),
        "cpu_seconds": round(time.process_time() - worked, 3),
        "memory": peak_memory(),
    }
    with (scratch / FACTS).open("w", encoding="utf-8") as file:
        json.dump(facts, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(job.folder, ignore_errors=True)
    os.replace(scratch, job.folder)
    return facts


Done = tuple[Job, dict[str, Any]]


class JobRunner(Protocol):
    """Runs jobs, up to `workers` at a time."""

    workers: int

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]: ...

    def close(self) -> None: ...


class InProcess:
    """Runs all jobs in this process, one after another."""

    workers = 1

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        for job in jobs:
            yield job, perform(job)

    def close(self) -> None:
        pass


class ProcessPool:
    """Runs jobs in `workers` spawned processes. Forking is unsafe here: this process already has threads."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        pending = list(reversed(jobs))
        suspects: list[Job] = []
        while pending or suspects:
            if not suspects:
                yield from self._in_parallel(pending, suspects)
                continue
            job = suspects[-1]
            try:
                done = self._submit(job).result()
            except BrokenProcessPool:
                self.close()
                raise UserError(_killed(job)) from None
            suspects.pop()
            yield job, done

    def _in_parallel(self, pending: list[Job], suspects: list[Job]) -> Iterator[Done]:
        """Run the `pending` jobs. If a worker dies, stop and put the jobs that were running into `suspects`."""
        running: dict[Future[dict[str, Any]], Job] = {}
        try:
            while pending or running:
                while pending and len(running) < self.workers:
                    running[self._submit(pending[-1])] = pending[-1]
                    pending.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    facts = future.result()
                    yield running.pop(future), facts
        except BrokenProcessPool:
            self.close()
            suspects.extend(running.values())

    def _submit(self, job: Job) -> Future[dict[str, Any]]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin)
        return self._pool.submit(perform, job)

    def close(self) -> None:
        """End the workers at once; unfinished jobs run again in the next build."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Initialise a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        connection.wait([parent.sentinel])
    os._exit(1)


def _killed(job: Job) -> str:
    return (
        f"the worker process for {job.step} of {job.title} was killed twice. If memory ran out, lower "
        "engine.unit_bytes or engine.workers; the same command continues from here"
    )
