"""Samples for a trainer on many ranks; all of them get all samples.

    Dealt    every rank has the whole network and draws a share
    Led      rank 0 has rollout workers apart draw, and hands on what they bring

All ranks ask the same at the same time. `refresh` brings their copies of the whole network to the trainer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bessemer.data.tokenizer import Tokenizer
from bessemer.dist.ranks import Ranks
from bessemer.engine.engine import Completion, Engine, Prompt
from bessemer.rl.sampler import Answer, Drawn, Groups, Policy, Sampler


class Dealt:
    """What is submitted is drawn there and then, before the weights can change."""

    def __init__(self, engine: Engine, refresh: Callable[[], None], ranks: Ranks) -> None:
        self.engine, self.tokenizer, self.refresh, self.ranks = engine, engine.tokenizer, refresh, ranks

    def open(self) -> None:
        pass

    def policy(self) -> Dealt:
        return self

    def submit(self, prompts: Sequence[Prompt], **asked: Any) -> Drawn:
        return Drawn(self.generate(prompts, **asked))

    def generate(self, prompts: Sequence[Prompt], **asked: Any) -> Groups:
        self.refresh()
        plan, n = self.engine.plan(prompts, **asked), self.ranks.n
        mine = [self.engine.run(call) for call in plan.batches[self.ranks.me :: n]]
        found: list[list[Completion]] = [[] for _ in plan.batches]
        for rank, drawn in enumerate(self.ranks.all_gather(mine, "samples")):
            found[rank::n] = drawn
        return plan.gather(found)

    def figures(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class Led:
    """`sampler` is rank 0's; None on the others."""

    def __init__(
        self, sampler: Sampler | None, tokenizer: Tokenizer, refresh: Callable[[], None], ranks: Ranks
    ) -> None:
        self.sampler, self.tokenizer, self.refresh, self.ranks = sampler, tokenizer, refresh, ranks

    def open(self) -> None:
        if self.sampler is not None:
            self.sampler.open()

    def policy(self) -> _Policy:
        self.refresh()
        return _Policy(None if self.sampler is None else self.sampler.policy(), self.ranks)

    def generate(self, prompts: Sequence[Prompt], **asked: Any) -> Groups:
        return self.policy().submit(prompts, **asked).take()

    def figures(self) -> dict[str, float]:
        return {} if self.sampler is None else self.sampler.figures()

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()


class _Policy:
    def __init__(self, policy: Policy | None, ranks: Ranks) -> None:
        self.policy, self.ranks = policy, ranks

    def submit(self, prompts: Sequence[Prompt], **asked: Any) -> _Answer:
        return _Answer(None if self.policy is None else self.policy.submit(prompts, **asked), self.ranks)


class _Answer:
    def __init__(self, answer: Answer | None, ranks: Ranks) -> None:
        self.answer, self.ranks = answer, ranks

    def ready(self) -> bool:
        return self.ranks.agree(self.answer is not None and self.answer.ready())

    def take(self) -> Groups:
        return self.ranks.broadcast(lambda: self.answer.take(), "samples")
