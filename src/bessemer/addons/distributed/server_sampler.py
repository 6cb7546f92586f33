"""The sampler "vllm-server": rollouts from a `vllm serve` that runs already (`vllm_server`).

    [stage.rollout]
    engine = "vllm-server"
    url = "http://127.0.0.1:8000"

The server has one set of weights. The first rollout after an update hands the new ones over, once nothing of an earlier
policy is under way, and a few log-probabilities are compared after every exchange (`sampler_check`). A rollout and all
turns of its episodes are of one policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from bessemer import heartbeat
from bessemer.addons.distributed.folder_sampling import FolderEngine
from bessemer.addons.distributed.rank0_sampler import TrainedPolicy, on_rank_0
from bessemer.addons.distributed.ray_sampler import VLLMSampler
from bessemer.addons.distributed.ray_settings import ServerSettings
from bessemer.addons.distributed.sampler_check import check, short_answer
from bessemer.addons.distributed.vllm_engine import check_length
from bessemer.addons.distributed.vllm_server import AT_ONCE, VLLMServer
from bessemer.config.rl import RLConfig
from bessemer.config.table import RolloutConfig, validate
from bessemer.engine.engine import Engine
from bessemer.engine.generation import Completion, GenerationPlan, OnText, Options, Prompt
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.rl.component import hooks_of
from bessemer.rl.parts import LoopParts
from bessemer.rl.sampler import Completions, Sampler, SamplingOptions, Submit
from bessemer.train import setup
from bessemer.workers import Workers

BATCH = 1 << 30
"""A plan has one batch: the server makes its own."""


class ServerSampler:
    """`engine` and `trained` as in `RaySampler`."""

    Settings = ServerSettings

    def __init__(
        self,
        engine: Engine | FolderEngine,
        trained: TrainedPolicy | None,
        server: VLLMServer,
        say: Callable[[str], None],
        temperature: float = 1.0,
    ) -> None:
        self.engine, self.trained, self.server, self.say = engine, trained, server, say
        self.tokenizer, self.temperature = engine.tokenizer, temperature
        self.waited = self.handover = 0.0
        self._since = (time.monotonic(), 0.0, 0.0)
        self._threads = ThreadPoolExecutor(AT_ONCE, "vllm-server")
        self._running: set[Future[Completion]] = set()
        self._moment: int | None = None
        self._probe: list[int] = []
        """The ids with which the weights are checked."""

    @classmethod
    def facts(cls, config: RLConfig) -> dict[str, Any]:
        """As those of `LocalSampler`."""
        VLLMSampler.check_stage(config)
        where = f'stage "{config.name}"'
        needs = {"lora": config.lora is not None, "top_p": config.top_p < 1, "routing-replay": False}
        needs["routing-replay"] = VLLMSampler.needs(config)["records_routing"]
        if key := next((key for key, needed in needs.items() if needed), ""):
            raise UserError(f'{where}: {key} does not reach a vLLM server here; set rollout.engine = "vllm"')
        hooks = zip(config.hooks, hooks_of(config), strict=True)
        if ahead := next((hook.name for hook, (kind, _) in hooks if kind.ahead), ""):
            raise UserError(
                f"{where}: a vLLM server has one set of weights, and the hook {ahead} samples of several "
                'policies at once; leave it out, or set rollout.engine = "vllm"'
            )
        return {"sampler": "vllm"}

    @classmethod
    def trainer_workers(cls, config: RLConfig) -> Workers:
        return setup.workers()

    @classmethod
    def of_loop(cls, loop: LoopParts, engine: Engine) -> Sampler:
        """On many ranks it is rank 0's."""
        return on_rank_0(loop, partial(cls._make, loop, engine))

    @classmethod
    def _make(cls, loop: LoopParts, engine: Engine, trained: TrainedPolicy) -> ServerSampler:
        config = loop.settings
        settings = validate(ServerSettings, config.rollout.settings, f'stage "{config.name}"', ": rollout")
        assert loop.ctx.source is not None
        server = VLLMServer(settings.url, loop.ctx.source / "model", engine.tokenizer)
        return cls(engine, trained, server, loop.ctx.say, config.temperature)

    @classmethod
    def of_folder(cls, rollout: RolloutConfig, folder: Path, say: Callable[[str], None], where: str) -> ServerSampler:
        """For the model in a directory, whose weights stay; opened."""
        settings = validate(ServerSettings, rollout.settings, where, ": rollout")
        engine = FolderEngine(folder)
        sampler = cls(engine, None, VLLMServer(settings.url, folder, engine.tokenizer), say)
        sampler.open()
        return sampler

    @property
    def model(self) -> LanguageModel:
        """The trainer's, or the sizes of one in a folder."""
        return self.engine.model

    def open(self) -> None:
        """Finds the server, gives it the trainer's weights, since an earlier attempt may have left others there, and
        checks on a short answer that it computes what the trainer does."""
        trained = self.trained
        if warning := self.server.open(trains=trained is not None):
            self.say(warning)
        if trained is None:
            assert isinstance(self.engine, FolderEngine)
            self.engine.check(self._sample_now, self.server.dtype, self.name, self.say)
            return
        self._hand_over(trained)
        prompt, answer = short_answer(self._sample_now, self.tokenizer, self.temperature)
        self._probe = [*prompt, *answer.tokens]
        expected = trained.logprobs(self._probe, self.temperature)[len(prompt) - 1 :]
        check(answer.logprobs, expected, (self.server.dtype, trained.dtype), self.name)

    @property
    def name(self) -> str:
        return f"the vLLM server at {self.server.url}"

    def policy(self) -> Submit:
        trained = self.trained
        if trained is not None and trained.version() != self._moment:
            began = time.monotonic()
            self._finish()
            self._hand_over(trained)
            dtypes = self.server.dtype, trained.dtype
            check(self.server.score(self._probe), trained.logprobs(self._probe), dtypes, self.name)
            self.handover += time.monotonic() - began
        return self._submit

    def _hand_over(self, trained: TrainedPolicy) -> None:
        """The server loads the weights of this moment, which this process holds for that time on the CPU."""
        self.server.load(trained.weights(lambda tensor: tensor.to("cpu", copy=True)))
        self._moment = trained.version()

    def _sample_now(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> Completions:
        return self._submit(prompts, **options).take()

    def _submit(
        self, prompts: Sequence[Prompt], on_text: OnText | None = None, **options: Unpack[Options]
    ) -> ServerSamples:
        plan = self.engine.plan(prompts, **options | Options(batch_rows=BATCH))
        for batch in plan.batches:
            check_length(batch, self.server.max_model_len)
        requests = [sample.request for batch in plan.batches for sample in batch.samples]
        futures = [self._threads.submit(self.server.sample, request) for request in requests]
        self._running = {future for future in self._running if not future.done()} | set(futures)
        return ServerSamples(self, plan, futures, on_text)

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        return self.policy()(prompts, **options).take()

    def _finish(self) -> None:
        """Waits until nothing of the policy so far is under way."""
        for future in self._running:
            future.exception()

    def metrics(self) -> dict[str, float]:
        now = (time.monotonic(), self.waited, self.handover)
        wall, waited, handover = (new - old for new, old in zip(now, self._since, strict=True))
        self._since = now
        return {"rl/trainer_waited": waited / wall, "rl/handover_seconds": handover}

    def close(self) -> None:
        """The server goes on; what is under way there is forgotten."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class ServerSamples:
    """Samples that the server is generating."""

    def __init__(
        self, sampler: ServerSampler, plan: GenerationPlan, futures: list[Future[Completion]], on_text: OnText | None
    ) -> None:
        self.sampler, self.plan, self.futures, self.on_text = sampler, plan, futures, on_text
        self._announced: set[int] = set()

    def ready(self) -> bool:
        self._announce()
        return all(future.done() for future in self.futures)

    def take(self) -> Completions:
        began = time.monotonic()
        try:
            for future in self.futures:
                while not future.done():
                    self._announce()
                    wait([future], timeout=1.0)
                    heartbeat.beat()
                future.result()
        except BaseException:
            for future in self.futures:
                future.cancel()
            raise
        self._announce()
        self.sampler.waited += time.monotonic() - began
        results = iter(self.futures)
        return self.plan.gather([[next(results).result() for _ in batch.samples] for batch in self.plan.batches])

    def _announce(self) -> None:
        """Passes the texts of finished samples to on_text."""
        if self.on_text is None:
            return
        samples = [sample for batch in self.plan.batches for sample in batch.samples]
        for number, (sample, future) in enumerate(zip(samples, self.futures, strict=True)):
            if number not in self._announced and future.done() and not future.cancelled() and not future.exception():
                self._announced.add(number)
                self.on_text(sample.prompt, sample.sample, future.result().text)
