"""Samplers inside the trainer's processes, and the protocol of all RL samplers.

    submit = sampler.policy()            the weights of this moment, whatever the trainer does next
    pending = submit(prompts, ...)       arguments of `Engine.generate`; with Ray workers this returns at once
    pending.ready(), pending.take()      whether all samples are there; the samples, waiting for them if necessary

`LocalSampler` generates in the trainer's process and its `Workers`; on many ranks every rank generates its share.
Samples depend only on the arguments and the weights: they are identical whichever process generates them, even after a
crash. On many ranks, all make the same calls at the same time, and all get all samples, unless they stay `apart`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Unpack

from bessemer import plugins
from bessemer.config.rl import RLConfig
from bessemer.config.table import Precision, RolloutConfig, SamplingConfig, is_changed
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.generation import Completion, OnText, Options, Prompt
from bessemer.errors import UserError
from bessemer.plugins import register
from bessemer.rl.parts import LoopParts
from bessemer.runs.context import StageContext
from bessemer.train import setup
from bessemer.train.runtime import Runtime
from bessemer.workers import Workers

Completions = list[list[Completion]]
"""`samples` completions of each prompt, in order."""


class SamplingOptions(Options, total=False):
    """Options of `Engine.generate`."""

    on_text: OnText


def rounding_facts(rollout: RolloutConfig) -> dict[str, Any]:
    """The keys of [rollout] that change the last digits of every sampler's samples."""
    return {"precision": rollout.precision} if rollout.precision != "trainer" else {}


def sampler_of(config: RLConfig | SamplingConfig, door: str = "of_loop") -> type[LocalSampler]:
    """The class of a stage's sampler. UserError if there is none with the method `door`, or it has other settings."""
    name = config.rollout.engine
    kind = plugins.find("samplers", name)
    if not hasattr(kind, door):
        raise UserError(
            f"{plugins.where(name, kind)} is not a sampler; derive the class from bessemer.rl.sampler.LocalSampler"
        )
    plugins.check_settings("samplers", name, kind, config.rollout.settings, config.name)
    return kind


class PendingSamples(Protocol):
    def ready(self) -> bool: ...

    def take(self) -> Completions: ...


Submit = Callable[..., PendingSamples]
"""Takes the arguments of `Engine.generate`; the samples are from the policy of one moment."""


class Sampler(Protocol):
    tokenizer: Tokenizer

    def open(self) -> None:
        """Starts whatever has to run before the first sample; UserError if it cannot."""
        ...

    def policy(self) -> Submit: ...

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        """Samples from the current policy and waits for the result."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the time since the last call."""
        ...

    def close(self) -> None: ...


class ReadySamples:
    def __init__(self, completions: Completions) -> None:
        self.completions = completions

    def ready(self) -> bool:
        return True

    def take(self) -> Completions:
        return self.completions


@register("samplers", "local")
class LocalSampler:
    """Generates samples when they are submitted, before the weights can change. `refresh` copies the trainer's weights
    into the engine's network. `apart`: samples that are submitted stay in the process that generates them.

    A sampler of your own overrides `sample`; its keyword arguments are settings."""

    def __init__(
        self, engine: Engine, refresh: Callable[[], None], runtime: Runtime | None = None, apart: bool = False
    ) -> None:
        self.engine, self.tokenizer, self.refresh = engine, engine.tokenizer, refresh
        self.runtime, self.apart = runtime or Runtime(), apart

    @classmethod
    def facts(cls, config: RLConfig) -> dict[str, Any]:
        """What in [rollout] changes samples; UserError for settings without effect."""
        rollout = config.rollout
        own = {} if rollout.engine == "local" else {"sampler": rollout.engine, "settings": rollout.settings}
        return own | rounding_facts(rollout)

    @classmethod
    def trainer_workers(cls, config: RLConfig) -> Workers:
        """The trainer's own helpers."""
        return setup.workers()

    @classmethod
    def of_loop(cls, loop: LoopParts, engine: Engine) -> Sampler:
        settings = loop.settings.rollout.settings
        return cls(engine, loop.sampler_model.refresh, loop.ctx.runtime, loop.carrier is not None, **settings)

    @classmethod
    def of_folder(cls, rollout: RolloutConfig, folder: Path, say: Callable[[str], None], where: str) -> Any:
        """For the model in a directory, whose weights stay; opened. `answering` asks an `Engine` instead."""
        raise UserError(f'{where}: {rollout.engine} samples for RL alone; set rollout.engine to "local"')

    def open(self) -> None:
        pass

    def policy(self) -> Submit:
        def submit(prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> PendingSamples:
            self.refresh()
            rows = setup.batch_rows(len(prompts) * options.get("samples", 1))
            return ReadySamples(self.sample(prompts, self.apart, **SamplingOptions(batch_rows=rows) | options))

        return submit

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        self.refresh()
        return self.sample(prompts, **options)

    def sample(self, prompts: Sequence[Prompt], apart: bool = False, **options: Unpack[SamplingOptions]) -> Completions:
        """Samples of the weights that the engine holds; on many ranks collective."""
        return self.runtime.generate(self.engine, prompts, apart, **options)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def engine_of(folder: Path, ctx: StageContext, role: str = "model", precision: Precision = "device") -> Any:
    """Loads the model in `folder` and returns an engine for it, as in `Runtime.dealt`."""
    loaded = setup.load_to_sample(folder, ctx.say_once, precision=precision, state=ctx.state)
    return ctx.runtime.dealt(Engine(*loaded, setup.workers()), folder, role, precision=precision)


def facts_of_answers(config: SamplingConfig) -> dict[str, Any]:
    """What in the [rollout] of a stage that does not train changes its answers; UserError for settings without
    effect."""
    rollout, where = config.rollout, f'stage "{config.name}"'
    if is_changed(rollout, "precision"):
        raise UserError(f"{where}: rollout.precision is for weights that are trained; set precision instead")
    kind = sampler_of(config, "of_folder")
    if kind is LocalSampler:
        return {}
    if is_changed(config, "precision"):
        raise UserError(f'{where}: precision has no effect with rollout.engine = "{rollout.engine}"; leave it out')
    return {"sampler": rollout.engine}


@contextmanager
def answering(folder: Path, ctx: StageContext, config: SamplingConfig) -> Iterator[Any]:
    """What answers with the model in `folder` for a stage that does not train it: used like an `Engine`."""
    kind = sampler_of(config, "of_folder")
    if kind is LocalSampler:
        yield engine_of(folder, ctx, precision=config.precision)
        return
    sampler = kind.of_folder(config.rollout, folder, ctx.say, f'stage "{config.name}"')
    try:
        yield sampler
    finally:
        sampler.close()
