"""Rollout workers as Ray actors, separate from the trainer: numbered weights go out, samples come back.

Before the first sample after an update, the trainer's weights are put into Ray's object store once, tensor by tensor;
every node fetches them once and its workers map them. A policy keeps its weights there as long as a rollout may still
need them, so samples that are late, or regenerated after a worker died, come from bitwise the same weights.

All jobs of a rollout are submitted at once, each to the worker with the fewest queued rows, so workers keep going while
the trainer computes. A worker that dies (a signal, a lost node, out of memory) is replaced, and the others generate its
jobs from the same weights, so the samples are identical. "local" and "ray" give the same run bit for bit, so a run may
switch between them, and to any number of workers, at any point.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch

from bessemer.addons.accelerate.helpers import Helpers
from bessemer.addons.distributed import ray_cluster
from bessemer.addons.distributed.folder_sampling import FolderEngine
from bessemer.addons.distributed.rank0_sampler import TrainedPolicy, on_rank_0
from bessemer.addons.distributed.ray_settings import DEFAULTS, RaySettings, VLLMOptions, VLLMSettings, settings_of
from bessemer.addons.distributed.ray_worker import LOADED, NewWeights, pack
from bessemer.addons.distributed.sampler_check import Probe, check, short_answer
from bessemer.addons.distributed.worker_pool import RolloutJob, WorkerPool
from bessemer.config.rl import RLConfig
from bessemer.config.table import RolloutConfig, is_changed, validate
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.generation import GenerationPlan, OnText, Options, Prompt
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.rl.component import hooks_of
from bessemer.rl.parts import LoopParts
from bessemer.rl.sampler import (
    Completions,
    Sampler,
    SamplingOptions,
    Submit,
    rounding_facts,
)
from bessemer.train import setup
from bessemer.workers import Workers, cores

if TYPE_CHECKING:
    from ray import ObjectRef


def gpus_of_workers(settings: RaySettings, trains: bool = True) -> list[str] | None:
    """The GPUs of this machine that the run's own Ray may give to workers: all, or if the stage `trains` those without
    a trainer rank. None means no limit: vLLM takes turns with the trainer, or there is no GPU. UserError if there are
    too few."""
    visible = os.environ.get(ray_cluster.VISIBLE)
    names = [str(gpu) for gpu in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    names = names[: torch.cuda.device_count()]
    if settings.shares_gpus or not names:
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if trains and setup.device().type == "cuda" else 0
    workers, gpus_each = settings.workers, 1 if settings.gpus is None else settings.gpus
    if workers * gpus_each > len(names) - ranks:
        vllm = isinstance(settings, VLLMSettings)
        share = ", or let vLLM take turns with the trainer (rollout.sleep = true)" if vllm else ""
        raise UserError(
            f"{workers} rollout workers of {gpus_each} GPU{'s' * (gpus_each > 1)} need {workers * gpus_each} beside "
            f"the {ranks} of the trainer, but this machine shows {len(names)}; lower rollout.workers or rollout.gpus, "
            f"train on fewer (--gpus){share}"
        )
    return names[ranks:] if gpus_each else []


def _start_pool(
    name: str,
    settings: RaySettings,
    folder: Path,
    say: Callable[[str], None],
    exchanged: int | None = None,
    **needs: Any,
) -> WorkerPool:
    """The workers of the sampler `name`, for the model in `folder`; `exchanged`: bytes of the weights that are handed
    over, None if they stay; `needs`: further `VLLMOptions`."""
    gpus_here = gpus_of_workers(settings, exchanged is not None) if ray_cluster.starts_own() else None
    cluster = ray_cluster.RayCluster(exchanged or 0, gpus_here)
    try:
        gpus = min(1, cluster.gpus()) if settings.gpus is None else settings.gpus
        vllm = DEFAULTS
        if isinstance(settings, VLLMSettings):
            vllm = VLLMOptions(**settings.model_dump(), **needs)
        return WorkerPool(cluster, name, str(folder.resolve()), settings.workers, gpus, say, vllm)
    except BaseException:
        cluster.close()
        raise


ROUTING = "record_routing"


def peft_names(model: Any) -> dict[str, str]:
    """The names that peft gives in files to the adapters of a model with LoRA, by those of the model's state."""
    return {item.sources[0]: item.key for item in model.adapter_exports()}


class RaySampler:
    """`start()` returns the pool. `engine` is the trainer's: it plans the batches and runs none. With a `FolderEngine`
    the weights stay, and no policy is trained."""

    Settings: type[RaySettings] = RaySettings

    def __init__(
        self,
        engine: Engine | FolderEngine,
        trained: TrainedPolicy | None,
        start: Callable[[], WorkerPool],
        workers: int = 1,
    ) -> None:
        self.engine, self.trained, self._start, self.workers = engine, trained, start, workers
        self.tokenizer: Tokenizer = engine.tokenizer
        self._pool: WorkerPool | None = None
        self._version = 0
        self._moment: int | None = None
        self._weights: ObjectRef | None = None
        """Number, the policy's version and reference of the newest weights in Ray's store."""
        self.lora, self._adapter_config = False, ""
        """Whether adapters alone are exchanged, and their settings in peft's words."""
        self._probe: list[int] | None = None
        """The ids with which workers check the weights that they load."""
        self.waited = 0.0
        """Seconds the trainer waited for samples."""
        self.handover = 0.0
        """Seconds spent putting weights into the store."""

    @classmethod
    def facts(cls, config: RLConfig) -> dict[str, Any]:
        """As those of `LocalSampler`."""
        if config.lora is not None:
            raise UserError(
                f'stage "{config.name}": with lora the trainer samples from base and adapters itself, and separate '
                'workers load whole models; set rollout.engine = "local"'
            )
        if not ray_cluster.is_installed():
            raise ray_cluster.not_installed(config.rollout.engine)
        return rounding_facts(config.rollout)

    @classmethod
    def trainer_workers(cls, config: RLConfig) -> Workers:
        """The trainer's own helpers, which leave one core to each rollout worker on the same machine."""
        if setup.device().type != "cpu" or not ray_cluster.starts_own():
            return setup.workers()
        torch.set_num_threads(1)
        return Helpers(max(1, cores() - settings_of(config).workers))

    @classmethod
    def of_loop(cls, loop: LoopParts, engine: Engine) -> Sampler:
        """Its workers start when it is opened. On many ranks it is rank 0's."""
        return on_rank_0(loop, partial(cls._make, loop, engine))

    @classmethod
    def _make(cls, loop: LoopParts, engine: Engine, trained: TrainedPolicy) -> RaySampler:
        config, ctx, settings = loop.settings, loop.ctx, settings_of(loop.settings)
        samples, workers = config.prompts_per_rollout * config.samples, settings.workers
        rows = cls.batch_rows(samples, workers)
        idle = workers - (batches := -(-samples // rows))
        if idle > 0:
            ctx.say(
                f"warning: a rollout of {samples} samples makes {batches} batches of {rows}: {idle} of "
                f"{workers} rollout workers will have nothing to do; lower rollout.workers"
            )

        assert ctx.source is not None
        folder, needs = ctx.source / "model", cls.needs(config)
        start = partial(_start_pool, config.rollout.engine, settings, folder, ctx.say, trained.size, **needs)
        sampler = cls(engine, trained, start, workers)
        sampler.lora = config.lora is not None
        return sampler

    @classmethod
    def needs(cls, config: RLConfig) -> dict[str, Any]:
        """What the stage needs of an engine of vLLM, as `VLLMOptions`."""
        return {}

    @classmethod
    def of_folder(cls, rollout: RolloutConfig, folder: Path, say: Callable[[str], None], where: str) -> RaySampler:
        """For the model in a directory, whose weights stay; opened."""
        if not ray_cluster.is_installed():
            raise ray_cluster.not_installed(rollout.engine)
        settings = validate(cls.Settings, rollout.settings, where, ": rollout")
        if isinstance(settings, VLLMSettings) and settings.sleep_level == 2:
            raise UserError(f"{where}: rollout.sleep = 2 drops the weights, and this stage exchanges none; set it to 1")
        start = partial(_start_pool, rollout.engine, settings, folder, say)
        sampler = cls(FolderEngine(folder), None, start, settings.workers)
        sampler.open()
        return sampler

    @staticmethod
    def batch_rows(samples: int, workers: int) -> int:
        """Samples per batch, which one worker generates."""
        return setup.batch_rows(samples)

    @property
    def model(self) -> LanguageModel:
        """The trainer's, or the sizes of one in a folder."""
        return self.engine.model

    @property
    def pool(self) -> WorkerPool:
        if self._pool is None:
            self._pool = self._start()
            self._since = (time.monotonic(), self.waited, 0.0, self.handover, 0)
        return self._pool

    def open(self) -> None:
        """Starts the workers, and checks on a short answer that they compute what the trainer does."""
        if self.trained is None:
            assert isinstance(self.engine, FolderEngine)
            self.engine.check(self.generate, self.pool.dtype, "the sampler", self.pool.say)
            return
        prompt, answer = short_answer(self.generate, self.tokenizer)
        ids = [*prompt, *answer.tokens]
        trainer = self.trained.logprobs(ids)[len(prompt) - 1 :]
        check(answer.logprobs, trainer, (self.pool.dtype, self.trained.dtype), "the sampler")
        self._probe = ids

    def policy(self) -> Submit:
        if self.trained is None:
            return partial(self._submit, LOADED, None)
        version, pool = self.trained.version(), self.pool
        if self._weights is None or self._moment != version:
            began = time.monotonic()
            tensors = self.trained.weights(lambda tensor: pool.ray.put(pack(tensor)))
            adapter = ""
            if self.lora:
                names = peft_names(self.engine.model)
                tensors = {names[name]: reference for name, reference in tensors.items()}
                adapter = self._adapter(tensors)
            self._weights = pool.ray.put(NewWeights(tensors, self._expected(self.trained), adapter))
            self._version, self._moment = self._version + 1, version
            self.handover += time.monotonic() - began
        return partial(self._submit, self._version, self._weights)

    def _adapter(self, names: Iterable[str]) -> str:
        """The adapter_config.json of the adapters with these names."""
        if not self._adapter_config:
            with tempfile.TemporaryDirectory() as folder:
                nothing = torch.empty(0)
                cast(Any, self.engine.model).save_adapter(Path(folder) / "adapter", dict.fromkeys(names, nothing))
                self._adapter_config = (Path(folder) / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
        return self._adapter_config

    def _expected(self, trained: TrainedPolicy) -> Probe | None:
        """What a worker should compute from the weights of this moment; None before the check at the start."""
        return Probe(self._probe, trained.logprobs(self._probe), trained.dtype) if self._probe else None

    def _submit(
        self, version: int, weights: ObjectRef | None, prompts: Sequence[Prompt], on_text: OnText | None = None,
        **options: Unpack[Options],
    ) -> RaySamples:  # fmt: skip
        rows = self.batch_rows(len(prompts) * options.get("samples", 1), self.workers)
        plan = self.engine.plan(prompts, **Options(batch_rows=rows) | options)
        jobs = [RolloutJob(batch, version, weights) for batch in plan.batches]
        self.pool.submit(jobs)
        return RaySamples(self, plan, jobs, on_text)

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        return self.policy()(prompts, **options).take()

    def metrics(self) -> dict[str, float]:
        pool = self.pool
        now = (time.monotonic(), self.waited, pool.busy, self.handover, pool.deaths)
        wall, waited, busy, handover, deaths = (a - b for a, b in zip(now, self._since, strict=True))
        self._since = now
        return {
            "rl/trainer_waited": waited / wall,
            "rl/trainer_waited_seconds": waited,
            "rl/workers_waited": max(0.0, 1.0 - busy / (wall * len(pool.workers))),
            "rl/workers_waited_seconds": max(0.0, wall - busy / len(pool.workers)),
            "rl/handover_seconds": handover,
            "rl/worker_restarts": float(deaths),
        }

    def close(self) -> None:
        """Stops the workers, and Ray if the run started it."""
        pool, self._pool, self._weights = self._pool, None, None
        if pool is not None:
            try:
                pool.close()
            finally:
                pool.cluster.close()


class VLLMSampler(RaySampler):
    """Workers that generate with vLLM; a batch is a worker's whole share."""

    Settings = VLLMSettings

    @classmethod
    def check_stage(cls, config: RLConfig) -> None:
        """UserError for a stage that vLLM cannot sample for."""
        where = f'stage "{config.name}"'
        if is_changed(config.rollout, "precision"):
            raise UserError(
                f"{where}: rollout.precision has no effect with vLLM, which computes in BF16, on CPUs in float32"
            )
        for hook, (kind, _) in zip(config.hooks, hooks_of(config), strict=True):
            if unknown := kind.options.keys() - {ROUTING}:
                raise UserError(
                    f"{where}: the hook {hook.name} needs {min(unknown)}, which vLLM rollouts do not report; set "
                    'rollout.engine to "ray", or leave the hook out'
                )
        if config.top_p < 1 and not config.keeps_mask:
            raise UserError(
                f"{where}: with top_p = {config.top_p:g} vLLM's log-probabilities are of what truncation left; train "
                "on that too (keep_sampling_mask = true), or set top_p to 1"
            )

    @classmethod
    def facts(cls, config: RLConfig) -> dict[str, Any]:
        cls.check_stage(config)
        if not ray_cluster.is_installed():
            raise ray_cluster.not_installed(config.rollout.engine)
        return {"sampler": "vllm"} | rounding_facts(config.rollout)

    @classmethod
    def needs(cls, config: RLConfig) -> dict[str, Any]:
        return {
            "records_routing": any(kind.options.get(ROUTING) for kind, _ in hooks_of(config)),
            "records_kept": config.top_p < 1,
            "lora_rank": 0 if config.lora is None else config.lora.rank,
        }

    @classmethod
    def _make(cls, loop: LoopParts, engine: Engine, trained: TrainedPolicy) -> RaySampler:
        if setup.device().type != "cpu" and not any(hook.name == "correction" for hook in loop.settings.hooks):
            loop.ctx.say(
                "warning: vLLM samples in BF16 with kernels of its own, and there is no correction of the difference "
                'between its probabilities and the trainer\'s; consider the hook "correction"'
            )
        return super()._make(loop, engine, trained)

    @staticmethod
    def batch_rows(samples: int, workers: int) -> int:
        return max(1, -(-samples // workers))


class RaySamples:
    """Samples that workers are generating."""

    def __init__(
        self, sampler: RaySampler, plan: GenerationPlan, jobs: list[RolloutJob], on_text: OnText | None
    ) -> None:
        self.sampler, self.plan, self.jobs, self.on_text = sampler, plan, jobs, on_text
        self._announced = 0

    def ready(self) -> bool:
        self.sampler.pool.poll()
        self._announce()
        return all(job.result is not None for job in self.jobs)

    def take(self) -> Completions:
        began = time.monotonic()
        for job in self.jobs:
            self.sampler.pool.wait([job])
            self._announce()
        self.sampler.waited += time.monotonic() - began
        return self.plan.gather([job.completions for job in self.jobs])

    def _announce(self) -> None:
        """Passes the texts of the jobs that are done, in order, to on_text."""
        while self._announced < len(self.jobs) and self.jobs[self._announced].result is not None:
            job, self._announced = self.jobs[self._announced], self._announced + 1
            for sample, completion in zip(job.batch.samples, job.completions, strict=True):
                if self.on_text is not None:
                    self.on_text(sample.prompt, sample.sample, completion.text)
