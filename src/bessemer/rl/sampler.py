"""Samplers inside the trainer's processes, and the protocol of all RL samplers.

    submit = sampler.policy()            the weights of this moment, whatever the trainer does next
    pending = submit(prompts, ...)       arguments of `Engine.generate`; with Ray workers this returns at once
    pending.ready(), pending.take()      whether all samples are there; the samples, waiting for them if necessary

    LocalSampler      the trainer's process and its `Workers`
    ShardedSampler    a trainer on many ranks: every rank has the whole network and generates its share
    Rank0Sampler      a trainer on many ranks: rank 0 has another sampler (`ray_sampler`) and passes its samples on

Samples depend only on the arguments and the weights: they are identical whichever process generates them, even after a
crash. On many ranks, all make the same calls at the same time, and all get all samples, unless they stay `apart`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Unpack

from bessemer.config.rl import RolloutConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.dist.ranks import Ranks
from bessemer.engine.engine import Engine
from bessemer.engine.generation import Completion, OnText, Options, Prompt, held_by
from bessemer.train import setup

Completions = list[list[Completion]]
"""`samples` completions of each prompt, in order."""


class SamplingOptions(Options, total=False):
    """Options of `Engine.generate`."""

    on_text: OnText


def batch_rows(rollout: RolloutConfig, samples: int) -> int:
    """Samples per batch, which one process generates: for vLLM a worker's whole share."""
    if rollout.engine == "vllm":
        return max(1, -(-samples // rollout.workers))
    return setup.batch_rows(samples)


def dealt(samples: int, rows: int, n: int) -> int:
    """Rows per batch, at most `rows`, such that n ranks get equally many batches: 1,024 samples in batches of 256 would
    leave half of eight ranks idle."""
    batches = max(1, -(-samples // (rows * n))) * n
    return max(1, -(-samples // batches))


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


class LocalSampler:
    """Generates samples when they are submitted, before the weights can change. `refresh` copies the trainer's weights
    into the engine's network."""

    def __init__(self, engine: Engine, refresh: Callable[[], None]) -> None:
        self.engine, self.tokenizer, self.refresh = engine, engine.tokenizer, refresh

    def open(self) -> None:
        pass

    def policy(self) -> Submit:
        return lambda prompts, **options: ReadySamples(self.generate(prompts, **options))

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        self.refresh()
        return self.engine.generate(prompts, **options)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class ShardedSampler(LocalSampler):
    """`refresh` is collective: it copies the trainer's weights into this rank's whole network."""

    def __init__(self, engine: Engine, refresh: Callable[[], None], ranks: Ranks, apart: bool = False) -> None:
        """`apart`: samples that are submitted stay on the rank that generates them; of the others it knows what
        `generation.held_by` says."""
        super().__init__(engine, refresh)
        self.ranks, self.apart = ranks, apart

    def policy(self) -> Submit:
        def submit(prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> PendingSamples:
            self.refresh()
            return ReadySamples(deal(self.engine, self.ranks, prompts, self.apart, **options))

        return submit

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        self.refresh()
        return deal(self.engine, self.ranks, prompts, **options)


def deal(
    engine: Engine, ranks: Ranks, prompts: Sequence[Prompt], apart: bool = False, on_text: OnText | None = None,
    **options: Unpack[Options],
) -> Completions:  # fmt: skip
    """`Engine.generate` shared by all ranks, whose engines have the same weights; all get all samples, or `apart` as in
    `ShardedSampler`. on_text hears of this rank's share. Collective."""
    n = ranks.n
    options["batch_rows"] = dealt(len(prompts) * options.get("samples", 1), options.get("batch_rows", 512), n)
    plan = engine.plan(prompts, **options)
    own = engine.run_all(plan.batches[ranks.me :: n], on_text)
    completions: list[list[Completion]] = [[] for _ in plan.batches]
    ranks.meet("samples")  # one rank may take many times as long as another
    if not apart:
        for rank, share in enumerate(ranks.all_gather(own, "samples")):
            completions[rank::n] = share
        return plan.gather(completions)
    facts = [[(len(one.tokens), one.finish_reason, one.prompt_tokens) for one in batch] for batch in own]
    for rank, known in enumerate(ranks.all_gather(facts, "lengths of samples")):
        completions[rank::n] = [[held_by(rank, *one) for one in batch] for batch in known]
    completions[ranks.me :: n] = own
    return plan.gather(completions)


class Rank0Sampler:
    """`sampler` is rank 0's; None on the others. `refresh` as in `ShardedSampler`."""

    def __init__(
        self, sampler: Sampler | None, tokenizer: Tokenizer, refresh: Callable[[], None], ranks: Ranks
    ) -> None:
        self.sampler, self.tokenizer, self.refresh, self.ranks = sampler, tokenizer, refresh, ranks

    def open(self) -> None:
        if self.sampler is not None:
            self.sampler.open()

    def policy(self) -> Submit:
        self.refresh()
        submit = None if self.sampler is None else self.sampler.policy()

        def submit_on_rank0(prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> PendingSamples:
            return _Rank0Samples(None if submit is None else submit(prompts, **options), self.ranks)

        return submit_on_rank0

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        return self.policy()(prompts, **options).take()

    def metrics(self) -> dict[str, float]:
        return {} if self.sampler is None else self.sampler.metrics()

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()


class _Rank0Samples:
    """`samples` are rank 0's; None on the others."""

    def __init__(self, samples: PendingSamples | None, ranks: Ranks) -> None:
        self.samples, self.ranks = samples, ranks

    def ready(self) -> bool:
        return self.ranks.agree(self.samples is not None and self.samples.ready())

    def take(self) -> Completions:
        def take_on_rank0() -> Completions:
            assert self.samples is not None
            return self.samples.take()

        return self.ranks.broadcast(take_on_rank0, "samples")
