"""Rollout workers as Ray actors, separate from the trainer: weights go out under numbers, samples come back.

Before the first sample after an update, the trainer's weights are put into Ray's object store once (one copy); every
node fetches them once and its workers map them. A policy holds its weights there as long as a rollout may still ask it,
so samples that are late, or generated again after a worker died, come from the same bits.

All jobs of a rollout are submitted at once, each to the worker with the fewest rows before it, so workers go on while
the trainer computes. A worker that dies (a signal, a lost node, memory) is replaced, and the others generate its jobs
from the weights they came with: the samples are identical. "local" and "ray" give the same run bit for bit, so a run
may change from one to the other, and to any number of workers, in the middle.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from bessemer import heartbeat
from bessemer.config.rl import RLConfig, RolloutConfig
from bessemer.config.table import changed
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.generation import Completion, GenerationBatch, GenerationPlan, Prompt
from bessemer.errors import UserError
from bessemer.rl import ray_cluster
from bessemer.rl.ray_worker import JobResult, RolloutWorker, pack_weights, versions
from bessemer.rl.sampler import Completions, SamplingOptions, Submit, batch_rows
from bessemer.rl.vllm_engine import DEFAULTS, VLLMSettings
from bessemer.runs.context import StageContext
from bessemer.train import setup
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers, cores

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


def facts(stage: str, rollout: RolloutConfig, replay: bool, top_p: float = 1.0) -> dict[str, Any]:
    """The settings of the table `rollout` that change samples; UserError for settings without effect."""
    ineffective = ("workers", "gpus") if rollout.engine == "local" else ()
    for name in ineffective if rollout.engine == "vllm" else (*ineffective, *VLLMSettings._fields):
        if changed(rollout, name):
            raise UserError(f'stage "{stage}": rollout.{name} has no effect while rollout.engine is "{rollout.engine}"')
    if rollout.engine == "local":
        pass
    elif rollout.engine == "vllm" and changed(rollout, "precision"):
        raise UserError(f'stage "{stage}": rollout.precision has no effect with vLLM, which computes in BF16')
    elif not ray_cluster.is_installed():
        raise ray_cluster.not_installed(rollout.engine)
    if rollout.engine == "vllm" and replay:
        raise UserError(
            f'stage "{stage}": routing_replay needs the experts that the sampler chose, and rollouts by vLLM do not '
            'bring them; set rollout.engine to "ray", or routing_replay to false'
        )
    if rollout.engine == "vllm" and top_p < 1:
        raise UserError(
            f'stage "{stage}": rollouts by vLLM bring neither the tokens that top_p leaves nor log-probabilities of '
            'these; set rollout.engine to "ray", or top_p to 1'
        )
    sampler: dict[str, Any] = {"sampler": "vllm"} if rollout.engine == "vllm" else {}
    rounded = {"precision": rollout.precision} if changed(rollout, "precision") else {}
    return sampler | rounded | ({"rows": rollout.rows} if rollout.rows else {})


def trainer_workers(rollout: RolloutConfig) -> Workers:
    """The trainer's own helpers; rollout workers on the same machine take their share of its cores."""
    if rollout.engine == "local" or setup.device().type != "cpu" or not ray_cluster.starts_own():
        return setup.workers()
    torch.set_num_threads(1)
    return Workers(max(1, cores() - rollout.workers))


def make(
    settings: RLConfig, ctx: StageContext, engine: Engine, trainer: Trainer, refresh: Callable[[], None]
) -> RaySampler:
    """The sampler of a stage; its workers start when it is opened. `refresh` brings the engine's network to the
    trainer's weights."""
    rollout = settings.rollout
    samples = settings.prompts_per_rollout * settings.samples
    rows = batch_rows(rollout, samples)
    idle = rollout.workers - (batches := -(-samples // rows))
    if idle > 0:
        ctx.say(
            f"warning: a rollout of {samples} samples makes {batches} batches of {rows}: {idle} of {rollout.workers} "
            "rollout workers will have nothing to do; lower rollout.workers or rollout.rows"
        )
    if rollout.engine == "vllm" and settings.correction == "none":
        ctx.say(
            'warning: vLLM samples in BF16 with kernels of its own, and correction is "none": nothing corrects the '
            'difference between its probabilities and the trainer\'s; consider "token-truncate"'
        )
    start = partial(_start_pool, rollout, ctx, engine)
    # every update counts its rows, also one after which the guard goes back to an earlier step

    def state() -> Mapping[str, Tensor]:
        refresh()
        return engine.model.state_dict()

    return RaySampler(engine, state, lambda: trainer.rows, start)


def gpus_of_workers(rollout: RolloutConfig) -> list[str] | None:
    """The GPUs of this machine that a Ray of the run's own may give to workers: those that no rank of the trainer
    computes on. None: all, where vLLM shares them in turn. UserError where they are too few."""
    visible = os.environ.get(ray_cluster.VISIBLE)
    names = [str(gpu) for gpu in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    names = names[: torch.cuda.device_count()]
    if rollout.sleep or not names:
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if setup.device().type == "cuda" else 0
    each = 1 if rollout.gpus is None else rollout.gpus
    if rollout.workers * each > len(names) - ranks:
        share = ", or let vLLM take turns with the trainer (rollout.sleep = true)" if rollout.engine == "vllm" else ""
        raise UserError(
            f"{rollout.workers} rollout workers of {each} GPU{'s' * (each > 1)} need {rollout.workers * each} beside "
            f"the {ranks} of the trainer, and this machine shows {len(names)}; lower rollout.workers or rollout.gpus, "
            f"train on fewer (--gpus){share}"
        )
    return names[ranks:] if each else []


def _start_pool(rollout: RolloutConfig, ctx: StageContext, engine: Engine) -> WorkerPool:
    size = sum(tensor.numel() * tensor.element_size() for tensor in engine.model.state_dict().values())
    cluster = ray_cluster.RayCluster(size, gpus_of_workers(rollout) if ray_cluster.starts_own() else None)
    try:
        gpus = min(1, cluster.gpus()) if rollout.gpus is None else rollout.gpus
        if rollout.engine == "vllm" and not gpus:
            raise UserError("rollouts by vLLM need GPUs, and Ray has none")
        vllm = VLLMSettings(rollout.gpu_memory_utilization, rollout.max_model_len, rollout.sleep)
        assert ctx.source is not None
        directory = str((ctx.source / "model").resolve())
        return WorkerPool(cluster, rollout.engine, directory, rollout.workers, gpus, ctx.say, vllm)
    except BaseException:
        cluster.close()
        raise


@dataclass(eq=False)
class RolloutJob:
    """One batch of samples, the number of the weights that generate it, and a reference to them in Ray's store."""

    batch: GenerationBatch
    version: int
    weights: ObjectRef
    result: JobResult | None = None

    @property
    def rows(self) -> int:
        return len(self.batch.samples)

    @property
    def completions(self) -> list[Completion]:
        """Of a finished job."""
        assert self.result is not None
        return self.result.completions


class RaySampler:
    """`state()` gives the weights by name, `moment()` a value that differs whenever they do; `start()` makes the pool.
    `engine` is the trainer's: it plans the batches and runs none."""

    def __init__(
        self,
        engine: Engine,
        state: Callable[[], Mapping[str, Tensor]],
        moment: Callable[[], Hashable],
        start: Callable[[], WorkerPool],
    ) -> None:
        self.engine, self.state, self.moment, self._start = engine, state, moment, start
        self.tokenizer: Tokenizer = engine.tokenizer
        self._pool: WorkerPool | None = None
        self._version = 0
        self._moment: Hashable = None
        self._weights: ObjectRef | None = None
        """Number, moment and reference of the newest weights in Ray's store."""
        self.waited = 0.0
        """Seconds the trainer waited for samples."""
        self.handover = 0.0
        """Seconds spent on putting weights into the store."""

    @property
    def pool(self) -> WorkerPool:
        if self._pool is None:
            self._pool = self._start()
            self._since = (time.monotonic(), self.waited, 0.0, self.handover, 0)
        return self._pool

    def open(self) -> None:
        assert self.pool is not None

    def policy(self) -> Submit:
        moment, pool = self.moment(), self.pool
        if self._weights is None or self._moment != moment:
            began = time.monotonic()
            self._weights = pool.ray.put(pack_weights(self.state()))
            self._version, self._moment = self._version + 1, moment
            self.handover += time.monotonic() - began
        return partial(self._submit, self._version, self._weights)

    def _submit(
        self, version: int, weights: ObjectRef, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]
    ) -> RaySamples:
        plan = self.engine.plan(prompts, **options)
        jobs = [RolloutJob(batch, version, weights) for batch in plan.batches]
        self.pool.submit(jobs)
        return RaySamples(self, plan, jobs)

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        return self.policy()(prompts, **options).take()

    def metrics(self) -> dict[str, float]:
        pool = self.pool
        now = (time.monotonic(), self.waited, pool.busy, self.handover, pool.deaths)
        wall, waited, busy, handover, deaths = (a - b for a, b in zip(now, self._since, strict=True))
        self._since = now
        return {
            "rl/trainer_waited": waited / wall,
            "rl/workers_waited": max(0.0, 1.0 - busy / (wall * len(pool.workers))),
            "rl/handover_seconds": handover,
            "rl/worker_restarts": float(deaths),
        }

    def close(self) -> None:
        """Ends the workers, and Ray where the run started it."""
        pool, self._pool, self._weights = self._pool, None, None
        if pool is not None:
            try:
                pool.close()
            finally:
                pool.cluster.close()


class RaySamples:
    """Samples that workers are generating."""

    def __init__(self, sampler: RaySampler, plan: GenerationPlan, jobs: list[RolloutJob]) -> None:
        self.sampler, self.plan, self.jobs = sampler, plan, jobs

    def ready(self) -> bool:
        self.sampler.pool.poll()
        return all(job.result is not None for job in self.jobs)

    def take(self) -> Completions:
        began = time.monotonic()
        self.sampler.pool.wait(self.jobs)
        self.sampler.waited += time.monotonic() - began
        return self.plan.gather([job.completions for job in self.jobs])


class WorkerPool:
    """`n` workers. `submit` distributes jobs, `poll` collects results that are there, `wait` until all of some are."""

    def __init__(
        self, cluster: ray_cluster.RayCluster, kind: str, directory: str, n: int, gpus: int,
        say: Callable[[str], None], vllm: VLLMSettings = DEFAULTS,
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
        self.busy = 0.0
        """Seconds that workers spent on sampling."""
        self._loading: dict[ObjectRef, int] = {}
        """Places whose worker has not loaded the model yet, by the reference of its `open`."""
        self._queues: list[dict[ObjectRef, RolloutJob]] = [{} for _ in range(n)]
        """The jobs of each place by the references of their results, in order."""
        self._backlog: list[RolloutJob] = []
        """Jobs without a worker."""
        self._progress_at, self._patience = time.monotonic(), PATIENCE
        """Time of the last result, and how long after it the next line says so."""
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def submit(self, jobs: Sequence[RolloutJob]) -> None:
        """To the places with the fewest rows before them; to none before one has loaded the model."""
        self._backlog += jobs
        places = [w for w in range(len(self.workers)) if w not in self._loading.values()]
        while places and self._backlog:
            job = self._backlog.pop(0)
            load = {w: sum(waiting.rows for waiting in self._queues[w].values()) for w in places}
            w = min(places, key=load.__getitem__)
            self._queues[w][self.workers[w].generate.remote(job.version, job.weights, job.batch)] = job

    def poll(self, seconds: float = 0.0) -> None:
        """Collects the results that are there; waits at most so long for the first."""
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
            heartbeat.beat()  # that of workers is `_check_stall`'s to judge

    def close(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker)
        self.workers, self._queues, self._loading, self._backlog = [], [], {}, []

    def _open(self) -> None:
        """Until every worker has loaded the model, or after START_SECONDS one of them."""
        until = time.monotonic() + START_SECONDS
        for w, worker in enumerate(self.workers):
            self._loading[worker.open.remote()] = w
        while self._loading and (time.monotonic() < until or len(self._loading) == len(self.workers)):
            self.poll(1.0)

    def _check_stall(self) -> None:
        """Nothing came back for long: UserError where no worker ever started, else a line that says so."""
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
        """A result; `_WorkerDied` where its worker is gone, the worker's own error where it raised one."""
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
                "rollout.workers or rollout.rows; the same command goes on from the last checkpoint"
            )
        self.ray.kill(self.workers[w])  # it may only be out of reach
        self._loading = {ref: place for ref, place in self._loading.items() if place != w}
        jobs, self._queues[w] = list(self._queues[w].values()), {}
        self.workers[w] = self._new()
        self._loading[self.workers[w].open.remote()] = w
        again = f"; its {sum(job.rows for job in jobs)} samples are generated again" if jobs else ""
        self.say(f"a rollout worker died ({why}) and is replaced{again}")
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
    """UserError where a worker runs another version of the programs that compute."""
    for name, version in versions().items():
        if node[name] != version:
            raise UserError(
                f"the rollout worker on {node['node']} has {name} {node[name]}, the trainer {version}; install the "
                "same on every node"
            )
