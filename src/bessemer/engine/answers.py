"""Answers to problems: one engine call for them all, or as many as the turns of their episodes.

    play = play_of(problems, encode, tokenizer, ...)
    while (turn := play.turn()) is not None:
        play.add(engine.generate(turn.prompts, **turn.options(), ...))
    play.outcomes()                                     a completion, or an episode, for every sample

Tasks whose problems are episodes (`Task.episodic`) are played by `addons/tasks/episodes.py`, the hook "episodes".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bessemer import plugins
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import Completion, OnText, Prompt
from bessemer.tasks.base import Problem, Task, Verdict

Problems = Sequence[tuple[Task, Problem]]


class Spoken(NamedTuple):
    """One message of an episode."""

    role: str
    """"assistant" if the model wrote it."""
    tokens: int
    text: str


@dataclass(frozen=True)
class PlayedEpisode:
    """A finished episode as one completion. Its tokens are what the model wrote and what it read in between, the latter
    with log-probability 0; its text is the model's last turn."""

    completion: Completion
    turns: list[Spoken]
    verdict: Verdict
    failure: str = ""
    """Why the environment could not finish the episode; "" if it could."""


Outcome = Completion | PlayedEpisode


class TurnPrompts(NamedTuple):
    """The arguments of one engine call."""

    prompts: list[list[int]]
    samples: int
    seeds: list[int]
    max_new_tokens: int
    on_text: OnText | None = None
    """Given if somebody waits for complete answers."""

    def options(self) -> dict[str, Any]:
        options = {"samples": self.samples, "seeds": self.seeds, "max_new_tokens": self.max_new_tokens}
        return options if self.on_text is None else options | {"on_text": self.on_text}


class Generates(Protocol):
    """An `Engine`, or a sampler in RL."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def generate(
        self, prompts: Sequence[Prompt], *, samples: int, seeds: Sequence[int], temperature: float, top_p: float,
        max_new_tokens: int, batch_rows: int,
    ) -> list[list[Completion]]: ...  # fmt: skip


class Turns(Protocol):
    """What is asked of the engine, turn by turn."""

    prompts: list[list[int]]
    """Of every problem."""

    def turn(self) -> TurnPrompts | None:
        """What to generate next; None when everything is answered."""
        ...

    def add(self, completions: Sequence[Sequence[Completion]]) -> None:
        """Takes the completions of the turn."""
        ...

    def outcomes(self) -> list[list[Outcome]]:
        """The G outcomes of every problem, in order."""
        ...


class OneTurn:
    """G answers to each of P problems."""

    def __init__(
        self, problems: Problems, encode: Callable[[Problem], list[int]], tokenizer: Tokenizer, samples: int,
        seeds: Sequence[int], cap: int,
    ) -> None:  # fmt: skip
        self.problems, self.tokenizer = problems, tokenizer
        self.prompts = [encode(problem) for _, problem in problems]
        apart = any(task.apart for task, _ in problems)
        self._turn: TurnPrompts | None
        self._turn = TurnPrompts(self.prompts, samples, list(seeds), cap, self._complete if apart else None)
        self._completions: Sequence[Sequence[Completion]] = ()

    def turn(self) -> TurnPrompts | None:
        turn, self._turn = self._turn, None
        return turn

    def add(self, completions: Sequence[Sequence[Completion]]) -> None:
        self._completions = completions

    def outcomes(self) -> list[list[Outcome]]:
        return [list(group) for group in self._completions]

    def _complete(self, number: int, _: int, text: str) -> None:
        """An answer is complete: its verdict is under way before those of others are."""
        task, problem = self.problems[number]
        if task.apart:
            task.begin(problem, self.tokenizer.opening + text)


def play_of(
    problems: Problems,
    encode: Callable[[Problem], list[int]],
    tokenizer: Tokenizer,
    *,
    samples: int,
    seeds: Sequence[int],
    cap: int,
    context: int = 0,
    once: Callable[[Callable[[], Any]], Any] = lambda make: make(),
) -> Turns:
    """G samples of each problem, none of them generated yet. `cap` bounds the tokens of an answer; `context` and `once`
    are for episodes: the tokens that one may have in all, and what makes a value on one of many ranks for all."""
    if not any(task.episodic for task, _ in problems):
        return OneTurn(problems, encode, tokenizer, samples, seeds, cap)
    episodes: Callable[..., Turns] = plugins.find("hooks", "episodes")
    return episodes(
        problems, encode, tokenizer, samples=samples, seeds=seeds, cap=cap, context=context, once=once
    )  # fmt: skip


def played(
    engine: Generates, problems: Problems, encode: Callable[[Problem], list[int]], **settings: Any
) -> tuple[list[list[int]], list[list[Outcome]]]:
    """Answers all problems at once; returns (prompts, outcomes). `settings`: those of `play_of`, and sampling
    options."""
    own = {name: settings.pop(name) for name in ("samples", "seeds", "cap", "context", "once") if name in settings}
    play = play_of(problems, encode, engine.tokenizer, **own)
    while (turn := play.turn()) is not None:
        play.add(engine.generate(turn.prompts, **turn.options(), **settings))
    return play.prompts, play.outcomes()
