"""Rollout workers apart from the trainer: its weights go out under numbers, samples come back.

Before the first sample after an update, the trainer's weights are put into Ray's object store once (one copy); every
node fetches them once and its workers map them. A policy holds its weights there as long as somebody may still ask it:
what is drawn late, or again after a worker died, is drawn by the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bessemer.engine.engine import Engine, GenerationPlan, Prompt
from bessemer.rl import ray_weights
from bessemer.rl.ray_pool import Job, Pool
from bessemer.rl.sampler import Groups


class Apart:
    """`state()` gives the weights by name, `moment()` something that differs whenever they do; `start()` makes the
    pool. `engine` is the trainer's: it cuts what is asked into calls and runs none."""

    def __init__(
        self, engine: Engine, state: Callable[[], Mapping[str, Tensor]], moment: Callable[[], Hashable],
        start: Callable[[], Pool],
    ) -> None:  # fmt: skip
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.state, self.moment, self._start = state, moment, start
        self._pool: Pool | None = None
        self._now: Version | None = None
        self.waited = 0.0
        """Seconds the trainer waited for samples."""
        self.handing = 0.0
        """Seconds it took to hand out weights."""

    @property
    def pool(self) -> Pool:
        if self._pool is None:
            self._pool = self._start()
            self._since = (time.monotonic(), self.waited, 0.0, self.handing, 0)
        return self._pool

    def open(self) -> None:
        assert self.pool is not None

    def policy(self) -> Version:
        moment, pool = self.moment(), self.pool
        if self._now is None or self._now.moment != moment:
            began = time.monotonic()
            ref = pool.ray.put(ray_weights.packed(self.state()))
            self._now = Version(self, 1 if self._now is None else self._now.number + 1, moment, ref)
            self.handing += time.monotonic() - began
        return self._now

    def generate(self, prompts: Sequence[Prompt], **asked: Any) -> Groups:
        return self.policy().submit(prompts, **asked).take()

    def figures(self) -> dict[str, float]:
        pool = self.pool
        now = (time.monotonic(), self.waited, pool.busy, self.handing, pool.deaths)
        wall, waited, busy, handing, deaths = (a - b for a, b in zip(now, self._since, strict=True))
        self._since = now
        return {
            "rl/trainer_waited": waited / wall,
            "rl/workers_waited": max(0.0, 1.0 - busy / (wall * len(pool.workers))),
            "rl/handover_seconds": handing,
            "rl/worker_restarts": float(deaths),
        }

    def close(self) -> None:
        """Ends the workers, and Ray where it is the run's own."""
        pool, self._pool, self._now = self._pool, None, None
        if pool is not None:
            try:
                pool.close()
            finally:
                pool.cluster.close()


class Version:
    """The weights of one moment."""

    def __init__(self, sampler: Apart, number: int, moment: Hashable, ref: Any) -> None:
        self.sampler, self.number, self.moment, self.ref = sampler, number, moment, ref

    def submit(self, prompts: Sequence[Prompt], **asked: Any) -> Coming:
        plan = self.sampler.engine.plan(prompts, **asked)
        jobs = [Job(call, self.number, self.ref) for call in plan.batches]
        self.sampler.pool.deal(jobs)
        return Coming(self.sampler, plan, jobs)


class Coming:
    """An answer that workers are drawing."""

    def __init__(self, sampler: Apart, plan: GenerationPlan, jobs: list[Job]) -> None:
        self.sampler, self.plan, self.jobs = sampler, plan, jobs

    def ready(self) -> bool:
        self.sampler.pool.poll()
        return all(job.drew is not None for job in self.jobs)

    def take(self) -> Groups:
        began = time.monotonic()
        self.sampler.pool.wait(self.jobs)
        self.sampler.waited += time.monotonic() - began
        return self.plan.gather([job.drew.completions for job in self.jobs])
