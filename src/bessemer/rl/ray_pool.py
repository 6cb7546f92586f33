"""Rollout workers as Ray actors: jobs are dealt to them, and what a dead one leaves behind is dealt again.

All jobs of a rollout are handed out at once, each to the worker with the fewest rows before it, so workers go on while
the trainer computes and nobody looks. A worker that dies (a signal, a lost node, memory) is replaced, and what it had
to draw is drawn by those that are left, from the weights it came with: the samples are the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.engine.engine import GenerationBatch
from bessemer.errors import UserError
from bessemer.rl.ray_cluster import Cluster
from bessemer.rl.ray_worker import Drew, Kind, Worker, versions

DEATHS = 3
"""Deaths in a row at one place, with nothing drawn between them, after which a run stops."""
PATIENCE = 300.0
"""Seconds without any answer after which a line says so."""
START_SECONDS = 600.0
"""Time for Ray to place all workers and for them to load the model."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DETAIL = re.compile(r"Worker exit detail: ([^.\n]+)")


@dataclass(eq=False)
class Job:
    """One call, the number of the weights that answer it, and where they lie (a reference into Ray's store)."""

    call: GenerationBatch
    version: int
    weights: Any
    drew: Drew | None = None

    @property
    def rows(self) -> int:
        return len(self.call.samples)


class Pool:
    """`n` workers. `deal` hands jobs out, `poll` looks what came back, `wait` until some came back whole."""

    def __init__(self, cluster: Cluster, kind: Kind, directory: str, n: int, gpus: int, say: Callable[[str], None]):
        self.cluster, self.ray, self.say = cluster, cluster.ray, say
        cluster.check(n, gpus)
        # Ray's own restarts would hide a death, and lose what was queued
        actor = self.ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Worker)
        self._new = lambda: actor.remote(kind, directory, gpus)
        self.workers: list[Any] = [None] * n
        """The actor at each place."""
        self.deaths = 0
        """Workers that died."""
        self._in_a_row = [0] * n
        """Deaths at each place since something was drawn there."""
        self.busy = 0.0
        """Seconds that workers spent on drawing."""
        self._opening: dict[Any, int] = {}
        """Places whose worker does not hold the model yet, by the reference of its word that it does."""
        self._queues: list[dict[Any, Job]] = [{} for _ in range(n)]
        """Per place, the jobs it has by the references of their results, in order."""
        self._backlog: list[Job] = []
        """Jobs that nobody has."""
        self._moved, self._patience = time.monotonic(), PATIENCE
        """When something came back last, and how long after that the next line says so."""
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def deal(self, jobs: Sequence[Job]) -> None:
        """To the places with the fewest rows before them; to none before one holds the model."""
        self._backlog += jobs
        places = [w for w in range(len(self.workers)) if w not in self._opening.values()]
        while places and self._backlog:
            job = self._backlog.pop(0)
            load = {w: sum(waiting.rows for waiting in self._queues[w].values()) for w in places}
            w = min(load, key=load.get)
            self._queues[w][self.workers[w].draw.remote(job.version, job.weights, job.call)] = job

    def poll(self, seconds: float = 0.0) -> None:
        """Takes in what is there, waiting for the first for so long at most."""
        pending = [*self._opening, *(ref for queue in self._queues for ref in queue)]
        if not pending:
            return
        found, _ = self.ray.wait(pending, num_returns=len(pending), timeout=0.0)
        if not found and seconds > 0:
            found, _ = self.ray.wait(pending, num_returns=1, timeout=seconds)
        for ref in found:
            w = self._opening.get(ref, next((w for w, queue in enumerate(self._queues) if ref in queue), None))
            if w is None:  # of a worker that was found dead a moment ago
                continue
            try:
                came = self._get(ref)
            except _Died as death:
                self._replace(w, str(death))
                continue
            if ref in self._opening:
                _same(came)
                del self._opening[ref]
            else:
                self._queues[w].pop(ref).drew = came
                self.busy += came.seconds
                self._in_a_row[w] = 0
            self._moved = time.monotonic()
        self._mind_the_time()
        self.deal(())

    def wait(self, jobs: Sequence[Job]) -> None:
        self._moved = time.monotonic()
        while any(job.drew is None for job in jobs):
            self.poll(1.0)

    def close(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker)
        self.workers, self._queues, self._opening, self._backlog = [], [], {}, []

    def _open(self) -> None:
        """Until every place holds the model, or after long some do."""
        until = time.monotonic() + START_SECONDS
        for w in range(len(self.workers)):
            self._start(w)
        while self._opening and (time.monotonic() < until or len(self._opening) == len(self.workers)):
            self.poll(1.0)

    def _start(self, w: int) -> None:
        self.workers[w] = self._new()
        self._opening[self.workers[w].open.remote()] = w

    def _mind_the_time(self) -> None:
        """Nothing came back for long: an error where nobody is there who could, else a line that says so."""
        still = time.monotonic() - self._moved
        if len(self._opening) == len(self.workers) and still > START_SECONDS:
            raise UserError(
                f"no rollout worker was ready after {START_SECONDS:.0f} s; Ray has free: {self._free()}. Wait for what "
                "else runs there, or lower rollout.workers"
            )
        if still > self._patience:
            self._patience += PATIENCE
            self.say(f"nothing from the rollout workers for {still:.0f} s; Ray has free: {self._free()}")
        elif still < PATIENCE:
            self._patience = PATIENCE

    def _get(self, ref: Any) -> Any:
        """A result; `_Died` where its worker is gone, the worker's own error where it raised one."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except (errors.RayActorError, errors.OutOfMemoryError, errors.ObjectLostError) as error:
            text = _COLOUR.sub("", str(error)).strip()
            if "creation task" in text:
                raise UserError(
                    f"a rollout worker cannot start: {text.splitlines()[-1].strip()}; install the same bessemer[scale] "
                    "on every node of the Ray cluster"
                ) from None
            raise _Died(_why(text)) from None

    def _replace(self, w: int, why: str) -> None:
        """A new worker in place of a dead one; its jobs go to those that are there."""
        self.deaths += 1
        self._in_a_row[w] += 1
        if self._in_a_row[w] >= DEATHS:
            raise UserError(
                f"a rollout worker died {DEATHS} times in a row (the last: {why}). If memory ran out, lower "
                "rollout.workers or rollout.rows; the same command goes on from the last checkpoint"
            )
        self.ray.kill(self.workers[w])  # it may only be out of reach
        self._opening = {ref: place for ref, place in self._opening.items() if place != w}
        jobs, self._queues[w] = list(self._queues[w].values()), {}
        self._start(w)
        again = f"; its {sum(job.rows for job in jobs)} samples are drawn again" if jobs else ""
        self.say(f"a rollout worker died ({why}) and is replaced{again}")
        self.deal(jobs)

    def _free(self) -> str:
        have = self.ray.available_resources()
        return ", ".join(f"{have.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))


class _Died(Exception):
    """The reason in one line."""


def _why(text: str) -> str:
    """Ray's report of a death, which fills a screen, in a few words."""
    if "low on memory" in text:
        return "its node ran low on memory"
    if "connection error code 2" in text:
        return "killed by a signal, or by the system for want of memory"
    detail = _DETAIL.search(text)
    return detail[1] if detail else (text.splitlines() or ["no reason given"])[0].rstrip(".")


def _same(facts: dict[str, Any]) -> None:
    """UserError where a worker runs another version of what computes."""
    for name, version in versions().items():
        if facts[name] != version:
            raise UserError(
                f"the rollout worker on {facts['node']} has {name} {facts[name]}, the trainer {version}; install the "
                "same on every node"
            )
