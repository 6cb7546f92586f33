"""A pool of rollout workers, which are Ray actors.

`WorkerPool` schedules the jobs of a rollout, replaces workers that die, reschedules their jobs, and reports stalls.
`RaySampler` submits the jobs and takes their results.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bessemer import heartbeat
from bessemer.addons.distributed import ray_cluster
from bessemer.addons.distributed.ray_settings import DEFAULTS, VLLMOptions
from bessemer.addons.distributed.ray_worker import JobResult, RolloutWorker, versions
from bessemer.engine.generation import Completion, GenerationBatch
from bessemer.errors import UserError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

DEATHS = 3
"""Deaths in a row at one place, without a result between them, after which a run stops."""
PATIENCE = 300.0
"""Seconds without any result after which a line says so."""
START_SECONDS = 600.0
"""Time for Ray to place all workers and for them to load the model."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DETAIL = re.compile(r"Worker exit detail: ([^.\n]+)")


@dataclass(eq=False)
class RolloutJob:
    """One batch of samples, the number of the weights that generate it, and a reference to them in Ray's store."""

    batch: GenerationBatch
    version: int
    weights: ObjectRef | None
    result: JobResult | None = None

    @property
    def rows(self) -> int:
        return len(self.batch.samples)

    @property
    def completions(self) -> list[Completion]:
        """Of a finished job."""
        assert self.result is not None
        return self.result.completions


class WorkerPool:
    """`n` workers. `submit` distributes jobs, `poll` collects results that are there, `wait` waits for given jobs."""

    def __init__(
        self, cluster: ray_cluster.RayCluster, kind: str, directory: str, n: int, gpus: int,
        say: Callable[[str], None], vllm: VLLMOptions = DEFAULTS,
    ) -> None:  # fmt: skip
        self.cluster, self.ray, self.say = cluster, cluster.ray, say
        cluster.check(n, gpus)
        # Ray's own restarts would hide a death, and lose the queue of the worker
        actor = self.ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(RolloutWorker)
        self._new: Callable[[], ActorHandle] = lambda: actor.remote(kind, directory, gpus, vllm)
        self.workers: list[ActorHandle] = [self._new() for _ in range(n)]
        """The actor at each place."""
        self.deaths = 0
        """Workers that died."""
        self._deaths_in_a_row = [0] * n
        """Deaths at each place since its last result."""
        self.dtype = "float32"
        """In which the workers compute."""
        self.busy = 0.0
        """Seconds that workers spent on sampling."""
        self._loading: dict[ObjectRef, int] = {}
        """Places whose worker has not loaded the model yet, by the reference of its `open`."""
        self._queues: list[dict[ObjectRef, RolloutJob]] = [{} for _ in range(n)]
        """The jobs of each place by the references of their results, in order."""
        self._backlog: list[RolloutJob] = []
        """Jobs without a worker."""
        self._progress_at, self._patience = time.monotonic(), PATIENCE
        """Time of the last result, new worker or job after a pause, and how long after it the next line says so."""
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def submit(self, jobs: Sequence[RolloutJob]) -> None:
        """Sends jobs to the places with the fewest queued rows; to none before its worker has loaded the model."""
        if not (self._backlog or self._loading or any(self._queues)):
            self._progress_at = time.monotonic()  # before, there was nothing to do
        self._backlog += jobs
        places = [w for w in range(len(self.workers)) if w not in self._loading.values()]
        while places and self._backlog:
            job = self._backlog.pop(0)
            load = {w: sum(waiting.rows for waiting in self._queues[w].values()) for w in places}
            w = min(places, key=load.__getitem__)
            self._queues[w][self.workers[w].generate.remote(job.version, job.weights, job.batch)] = job

    def poll(self, seconds: float = 0.0) -> None:
        """Collects the results that have arrived; waits at most `seconds` for the first."""
        pending = [*self._loading, *(ref for queue in self._queues for ref in queue)]
        if not pending:
            return
        done, _ = self.ray.wait(pending, num_returns=len(pending), timeout=0.0)
        if not done and seconds > 0:
            done, _ = self.ray.wait(pending, num_returns=1, timeout=seconds)
        for ref in done:
            w = self._loading.get(ref, next((w for w, queue in enumerate(self._queues) if ref in queue), None))
            if w is None:  # of a worker whose death was seen a moment ago
                continue
            try:
                result = self._get(ref)
            except _WorkerDied as death:
                self._replace(w, str(death))
                continue
            if ref in self._loading:
                _check_versions(result)
                self.dtype = result["dtype"]
                del self._loading[ref]
            else:
                self._queues[w].pop(ref).result = result
                self.busy += result.seconds
                self._deaths_in_a_row[w] = 0
            self._progress_at = time.monotonic()
        self._check_stall()
        self.submit(())

    def wait(self, jobs: Sequence[RolloutJob]) -> None:
        self._progress_at = time.monotonic()
        while any(job.result is None for job in jobs):
            self.poll(1.0)
            heartbeat.beat()  # `_check_stall` watches the workers

    def close(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker)
        self.workers, self._queues, self._loading, self._backlog = [], [], {}, []

    def _open(self) -> None:
        """Waits until every worker has loaded the model or, after START_SECONDS, at least one has."""
        until = time.monotonic() + START_SECONDS
        for w, worker in enumerate(self.workers):
            self._loading[worker.open.remote()] = w
        while self._loading and (time.monotonic() < until or len(self._loading) == len(self.workers)):
            self.poll(1.0)

    def _check_stall(self) -> None:
        """If nothing came back for long: UserError if no worker ever started, else a line that says so."""
        still = time.monotonic() - self._progress_at
        if len(self._loading) == len(self.workers) and still > START_SECONDS:
            raise UserError(
                f"no rollout worker was ready after {START_SECONDS:.0f} s; Ray has free: {self._free()}. Wait for the "
                "other work on the cluster, or lower rollout.workers"
            )
        if still > self._patience:
            self._patience += PATIENCE
            self.say(f"nothing from the rollout workers for {still:.0f} s; Ray has free: {self._free()}")
        elif still < PATIENCE:
            self._patience = PATIENCE

    def _get(self, ref: ObjectRef) -> Any:
        """A result; raises `_WorkerDied` if its worker is gone, the worker's own error if it raised one."""
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
            raise _WorkerDied(_reason(text)) from None

    def _replace(self, w: int, why: str) -> None:
        """A new worker in place of a dead one; its jobs go to the workers that have loaded the model."""
        self.deaths += 1
        self._deaths_in_a_row[w] += 1
        if self._deaths_in_a_row[w] >= DEATHS:
            raise UserError(
                f"a rollout worker died {DEATHS} times in a row (the last: {why}). If memory ran out, lower "
                "rollout.workers; the same command resumes from the last checkpoint"
            )
        self.ray.kill(self.workers[w])  # it may only be out of reach
        self._loading = {ref: worker for ref, worker in self._loading.items() if worker != w}
        jobs, self._queues[w] = list(self._queues[w].values()), {}
        self.workers[w], self._progress_at = self._new(), time.monotonic()  # it has its own time to start
        self._loading[self.workers[w].open.remote()] = w
        note = f"; its {sum(job.rows for job in jobs)} samples are generated again" if jobs else ""
        self.say(f"a rollout worker died ({why}) and is replaced{note}")
        self.submit(jobs)

    def _free(self) -> str:
        have = self.ray.available_resources()
        return ", ".join(f"{have.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))


class _WorkerDied(Exception):
    """The reason in one line."""


def _reason(text: str) -> str:
    """Ray's report of a death, which fills a screen, in a few words."""
    if "low on memory" in text:
        return "its node ran low on memory"
    if "connection error code 2" in text:
        return "killed by a signal, or by the system for want of memory"
    detail = _DETAIL.search(text)
    return detail[1] if detail else (text.splitlines() or ["no reason given"])[0].rstrip(".")


def _check_versions(node: Mapping[str, str]) -> None:
    """UserError if a worker runs another version of bessemer or torch than the trainer."""
    for name, version in versions().items():
        if node[name] != version:
            raise UserError(
                f"the rollout worker on {node['node']} has {name} {node[name]}, the trainer {version}; install the "
                "same on every node"
            )
