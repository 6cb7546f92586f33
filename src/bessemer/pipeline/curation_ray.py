"""The jobs of `bessemer data build` as Ray tasks: the cluster that RAY_ADDRESS names, or one of its own here.

Workers read sources and write their folders themselves, so every node must see both under the same paths; what travels
is settings and counts. Ray tries a job again whose node is lost; a job writes its folder whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from bessemer.curate.jobs import Done, Job, perform
from bessemer.errors import UserError
from bessemer.rl import ray_cluster


class Ray:
    """An engine on Ray."""

    def __init__(self, workers: int) -> None:
        """workers: jobs at a time; 0: one per CPU of the cluster."""
        if not ray_cluster.is_installed():
            raise UserError("engine.kind = \"ray\" needs Ray: pip install 'bessemer[scale]'")
        self._cluster = ray_cluster.RayCluster(0)
        self._ray = self._cluster.ray
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        self.workers = min(workers or cpus, cpus)
        self._perform = self._ray.remote(num_cpus=1, max_retries=2)(_perform)

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        left, under_way = list(reversed(jobs)), {}
        while left or under_way:
            while left and len(under_way) < self.workers:
                job = left.pop()
                under_way[self._perform.remote(job, os.getcwd())] = job
            for reference in self._ray.wait(list(under_way), num_returns=1)[0]:
                job = under_way.pop(reference)
                yield job, self._facts(reference, job)

    def _facts(self, reference: Any, job: Job) -> dict[str, Any]:
        try:
            facts, mistake = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            raise UserError(
                f"Ray lost {job.step} of {job.title} for good ({type(error).__name__}); look at memory and disks of "
                "its nodes. The same command goes on from here"
            ) from error
        if mistake is not None:
            raise UserError(mistake)
        return facts

    def close(self) -> None:
        self._cluster.close()


def _perform(job: Job, folder: str) -> tuple[dict[str, Any], str | None]:
    """In a worker, whose paths count from `folder`. A user's mistake comes back as words: Ray would wrap it."""
    os.chdir(folder)
    try:
        return perform(job), None
    except UserError as error:
        return {}, str(error)
