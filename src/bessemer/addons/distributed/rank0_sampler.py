"""A sampler that only rank 0 of a trainer on many ranks has, such as Ray's workers: it passes its samples on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import Prompt
from bessemer.rl.parts import LoopParts
from bessemer.rl.sampler import Completions, PendingSamples, Sampler, SamplingOptions, Submit
from bessemer.train.runtime import Runtime


def on_rank_0(loop: LoopParts, make: Callable[[Callable[[], None]], Sampler]) -> Sampler:
    """The sampler that `make` makes with what refreshes the weights; on many ranks it is rank 0's."""
    refresh, runtime = loop.sampler_model.refresh, loop.ctx.runtime
    if runtime.n == 1:
        return make(refresh)
    return Rank0Sampler(make(lambda: None) if loop.ctx.leads else None, loop.tokenizer, refresh, runtime)


class Rank0Sampler:
    """`sampler` is rank 0's; None on the others. `refresh` as in `LocalSampler`."""

    def __init__(
        self, sampler: Sampler | None, tokenizer: Tokenizer, refresh: Callable[[], None], runtime: Runtime
    ) -> None:
        self.sampler, self.tokenizer, self.refresh, self.runtime = sampler, tokenizer, refresh, runtime

    def open(self) -> None:
        self.refresh()  # rank 0 compares its sampler with the whole network
        if self.sampler is not None:
            self.sampler.open()

    def policy(self) -> Submit:
        self.refresh()
        submit = None if self.sampler is None else self.sampler.policy()

        def submit_on_rank0(prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> PendingSamples:
            return _Rank0Samples(None if submit is None else submit(prompts, **options), self.runtime)

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

    def __init__(self, samples: PendingSamples | None, runtime: Runtime) -> None:
        self.samples, self.runtime = samples, runtime

    def ready(self) -> bool:
        return self.runtime.agree(lambda: self.samples is not None and self.samples.ready())

    def take(self) -> Completions:
        def take_on_rank0() -> Completions:
            assert self.samples is not None
            return self.samples.take()

        return self.runtime.once(take_on_rank0, "samples")
