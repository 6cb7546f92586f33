"""Who draws the samples of RL: this process, or rollout workers apart.

    policy = sampler.policy()                  the weights of this moment, whatever the trainer does next
    answer = policy.submit(prompts, ...)       asked as of `Engine.plan`; with workers apart this returns at once
    answer.ready(), answer.take()              whether all is drawn; what was drawn, waiting if need be

The loop of an RL stage (recipe/policy) knows no more than this. What is drawn depends on what was asked and on the
weights alone, never on who drew it, on how many did, or on what died in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Completion, Engine, Prompt

Groups = list[list[Completion]]


class Answer(Protocol):
    def ready(self) -> bool: ...

    def take(self) -> Groups:
        """`samples` completions of each prompt, in order."""
        ...


class Policy(Protocol):
    def submit(self, prompts: Sequence[Prompt], **asked: Any) -> Answer: ...


class Sampler(Protocol):
    tokenizer: Tokenizer

    def open(self) -> None:
        """Whatever has to run before the first sample; a UserError where it cannot."""
        ...

    def policy(self) -> Policy: ...

    def generate(self, prompts: Sequence[Prompt], **asked: Any) -> Groups:
        """By the weights of this moment, at once."""
        ...

    def figures(self) -> dict[str, float]:
        """What to log of the time since the last call."""
        ...

    def close(self) -> None: ...


class Here:
    """This process and its `Workers`: what is submitted is drawn there and then, before the weights can change."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer

    def open(self) -> None:
        pass

    def policy(self) -> Here:
        return self

    def submit(self, prompts: Sequence[Prompt], **asked: Any) -> Drawn:
        return Drawn(self.generate(prompts, **asked))

    def generate(self, prompts: Sequence[Prompt], **asked: Any) -> Groups:
        return self.engine.generate(prompts, **asked)

    def figures(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class Drawn:
    """An answer that is there."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def ready(self) -> bool:
        return True

    def take(self) -> Groups:
        return self.groups
