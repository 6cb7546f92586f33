"""Generates multi-turn episodes (`addons/tasks/environment.py`) turn by turn, and plain tasks along with them.

Tokens go in and tokens come out: the model's output is never re-encoded, and an observation is appended to it as the
ids that follow an answer in the chat template. A plain task has one turn, so a call without environments is just
`Engine.generate`.

The seed of a sample's first turn is that of its prompt, as without environments; the seed of turn t > 0 is derived from
the prompt's seed, the sample's number and t. In each turn, every live episode requests as many tokens as the one with
the most left to write, and is then cut to its own bound: a token depends only on those before it, so the result is the
same as with its own bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bessemer import heartbeat
from bessemer.addons.tasks import turns
from bessemer.addons.tasks.environment import FAILED, Environment, EnvironmentFailure, Episode, Message, bounded
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.answers import Outcome, PlayedEpisode, Problems, Spoken, TurnPrompts
from bessemer.engine.generation import Completion
from bessemer.errors import UserError
from bessemer.escape import shortened
from bessemer.tasks.base import Problem, Task, Verdict, stable_hash

_Result = TypeVar("_Result")
GRACE = 5.0
"""Seconds that a step may take beyond the time limit of the tools it calls."""


@dataclass
class _Sample:
    """One sample; for an episode, also its messages so far."""

    problem: int
    number: int
    environment: Environment | None
    spoken: list[Spoken] = field(default_factory=list)
    parts: list[Completion] = field(default_factory=list)
    """One for each turn of the model."""
    read: list[list[int]] = field(default_factory=list)
    """The ids between two turns."""
    failure: str = ""
    ended: bool = False
    cut: bool = False
    """Whether a bound ended it, rather than the model or the environment."""
    verdict: Verdict | None = None

    @property
    def written(self) -> int:
        return sum(len(part.tokens) for part in self.parts)

    def ids(self) -> list[int]:
        """All ids after the prompt."""
        ids: list[int] = []
        for turn, part in enumerate(self.parts):
            ids += part.tokens
            if turn < len(self.read):  # nothing may have been read after the last turn
                ids += self.read[turn]
        return ids


class Episodes:
    """Plays G samples of each of P problems.

    `cap` bounds the tokens that the model writes over all turns of an episode, `context` all that it reads and writes.
    `once(make)` makes a value on one of many ranks and returns it on all; only that rank has environments.
    """

    def __init__(
        self,
        problems: Problems,
        encode: Callable[[Problem], list[int]],
        tokenizer: Tokenizer,
        *,
        samples: int,
        seeds: Sequence[int],
        cap: int,
        context: int,
        once: Callable[[Callable[[], Any]], Any] = lambda make: make(),
    ) -> None:
        self.problems, self.tokenizer, self.samples, self.seeds = problems, tokenizer, samples, list(seeds)
        self.cap, self.context, self.once = cap, context, once
        self._episodes: dict[tuple[int, int], Episode] = {}
        self._all = [
            [_Sample(p, k, task if isinstance(task, Environment) else None) for k in range(samples)]
            for p, (task, _) in enumerate(problems)
        ]
        played = [sample for group in self._all for sample in group if sample.environment is not None]
        assert context or not played, "environments need to know the context"
        self._played = played
        self.prompts = self._begin(encode)
        self._first = True
        self._live: list[_Sample] = []

    def turn(self) -> TurnPrompts | None:
        """What to generate next; None when everything is played."""
        if self._first:
            apart = any(self._judged_apart(task) for task, _ in self.problems)
            return TurnPrompts(self.prompts, self.samples, self.seeds, self.cap, self._complete if apart else None)
        if not self._live:
            return None
        prompts = [[*self.prompts[sample.problem], *sample.ids()] for sample in self._live]
        seeds = [_seed(self.seeds[s.problem], s.number, len(s.parts)) for s in self._live]
        return TurnPrompts(prompts, 1, seeds, max(self.cap - sample.written for sample in self._live))

    def add(self, completions: Sequence[Sequence[Completion]]) -> None:
        """Takes the completions of the turn and lets the environments respond."""
        samples = [sample for group in self._all for sample in group] if self._first else self._live
        flat = [completion for group in completions for completion in group]
        for sample, completion in zip(samples, flat, strict=True):
            self._take(sample, completion)
        self._first = False
        self._answer([sample for sample in samples if not sample.ended])
        self._live = [sample for sample in samples if not sample.ended]

    def _complete(self, number: int, _: int, text: str) -> None:
        """An answer is complete: its verdict is under way before those of others are."""
        task, problem = self.problems[number]
        if self._judged_apart(task):
            task.begin(problem, self.tokenizer.opening + text)

    @staticmethod
    def _judged_apart(task: Task) -> bool:
        return not task.episodic and task.apart

    def outcomes(self) -> list[list[Outcome]]:
        """The G outcomes of every problem, in order. UserError if the environments failed in all their episodes."""
        if self._played and all(sample.failure for sample in self._played):
            first = self._played[0]
            raise UserError(
                f"{_environment(first).name}: the environment failed in every episode ({first.failure}); fix it and "
                "start again: a run resumes from its checkpoint"
            )
        return [[self._outcome(sample) for sample in group] for group in self._all]

    def _begin(self, encode: Callable[[Problem], list[int]]) -> list[list[int]]:
        """Resets the environments; returns the prompts of all problems."""
        starts = self.once(lambda: self._each(self._played, self._reset)) if self._played else []
        begun: dict[int, Sequence[Message]] = {}
        for sample, (start, failure) in zip(self._played, starts, strict=True):
            sample.failure = failure
            if not failure and begun.setdefault(sample.problem, start) != start:
                sample.failure = "reset began samples of one problem differently despite the same seed"
        prompts = []
        for p, (task, problem) in enumerate(self.problems):
            if isinstance(task, Environment):
                question = [{"role": "user", "content": problem.prompt}]
                start = begun.get(p, question)
                if start != question:
                    for sample in self._all[p]:
                        sample.spoken = [Spoken(message["role"], 0, message["content"]) for message in start]
                ids = turns.first_ids(self.tokenizer, start, task.schemas)
                if len(ids) >= self.context:
                    why = f"its first {len(ids)} tokens leave no room in the context of {self.context}"
                    for sample in self._all[p]:
                        sample.failure = sample.failure or why
                    ids = ids[:1]  # generated from for nothing, like other failed resets
                prompts.append(ids)
            else:
                prompts.append(encode(problem))
        return prompts

    def _reset(self, sample: _Sample) -> Sequence[Message]:
        task, (_, problem) = sample.environment, self.problems[sample.problem]
        assert task is not None
        episode = task.reset(problem, self.seeds[sample.problem])
        self._episodes[sample.problem, sample.number] = episode
        start = list(episode.start)
        if not start or start[-1]["role"] == "assistant":
            raise EnvironmentFailure("it begins with nothing that the model could answer")
        return start

    def _take(self, sample: _Sample, completion: Completion) -> None:
        environment = sample.environment
        if environment is None:
            sample.parts, sample.ended = [completion], True
            return
        completion = turns.cut(completion, self.cap - sample.written, self.tokenizer)
        sample.parts.append(completion)
        sample.spoken.append(Spoken("assistant", len(completion.tokens), self._text(completion)))
        if completion.finish_reason == "length" or sample.failure:
            sample.ended, sample.cut = True, completion.finish_reason == "length"

    def _answer(self, samples: Sequence[_Sample]) -> None:
        """Lets the samples' environments respond, and judges the episodes that are over."""
        observed = self.once(lambda: self._each(samples, self._step)) if samples else []
        for sample, (observation, failure) in zip(samples, observed, strict=True):
            sample.failure = failure
            messages, done = ([], True) if failure else observation
            ids = [] if done else turns.following_ids(self.tokenizer, messages)
            length = len(self.prompts[sample.problem]) + len(sample.ids()) + len(ids)
            full = length >= self.context or sample.written >= self.cap
            if done or full or len(sample.parts) >= _environment(sample).max_turns:
                sample.ended, sample.cut = True, not done
                continue
            sample.read.append(ids)
            text = "\n".join(message["content"] for message in messages)
            sample.spoken.append(Spoken(messages[0]["role"], len(ids), text))
        over = [s for group in self._all for s in group if s.environment and s.ended and s.verdict is None]
        verdicts = self.once(lambda: self._each(over, self._judge)) if over else []
        for sample, (verdict, failure) in zip(over, verdicts, strict=True):
            sample.failure = sample.failure or failure
            sample.verdict = Verdict(False, False, FAILED, None) if sample.failure else verdict

    def _step(self, sample: _Sample) -> tuple[list[Message], bool]:
        episode = self._episodes[sample.problem, sample.number]
        environment = _environment(sample)
        observation = episode.step(turns.read_action(self._text(sample.parts[-1])))
        if not observation.done and not observation.messages:
            raise EnvironmentFailure("it answered nothing, and the episode is not over")
        if other_roles := {message["role"] for message in observation.messages} - {"tool", "user"}:
            raise EnvironmentFailure(
                f"it answered in the role of {min(other_roles)}; tool and user are for environments"
            )
        return [
            {"role": message["role"], "content": shortened(message["content"], environment.observed)}
            for message in observation.messages
        ], observation.done

    def _judge(self, sample: _Sample) -> Verdict:
        episode = self._episodes.pop((sample.problem, sample.number), None)
        try:
            if episode is None or sample.failure:
                raise EnvironmentFailure(sample.failure)
            return episode.verdict(self._text(sample.parts[-1]))
        finally:
            if episode is not None:
                episode.close()

    def _each(self, samples: Sequence[_Sample], work: Callable[[_Sample], _Result]) -> list[tuple[_Result | None, str]]:
        """(result, "") for every sample, or (None, what failed)."""

        def attempt(sample: _Sample) -> tuple[_Result | None, str]:
            environment = _environment(sample)
            heartbeat.beat()
            try:
                return bounded(lambda: work(sample), environment.seconds + GRACE), ""
            except UserError:
                raise
            except EnvironmentFailure as failure:
                return None, str(failure)
            except TimeoutError:
                return None, f"{environment.name} did not answer in time"
            except Exception as error:
                return None, f"{type(error).__name__}: {error}"

        results: dict[int, tuple[_Result | None, str]] = {}
        for environment in {id(sample.environment): _environment(sample) for sample in samples}.values():
            own = [sample for sample in samples if sample.environment is environment]
            with ThreadPoolExecutor(max(1, environment.parallel)) as pool:
                results.update(zip(map(id, own), pool.map(attempt, own), strict=True))
        return [results[id(sample)] for sample in samples]

    def _text(self, completion: Completion) -> str:
        return self.tokenizer.opening + completion.text

    def _outcome(self, sample: _Sample) -> Outcome:
        if sample.environment is None:
            return sample.parts[0]
        assert sample.verdict is not None
        text = turns.joined(sample.parts, sample.read, ended_itself=not sample.cut)
        return PlayedEpisode(text, sample.spoken, sample.verdict, sample.failure)


def _environment(sample: _Sample) -> Environment:
    assert sample.environment is not None
    return sample.environment


def _seed(prompt_seed: int, number: int, turn: int) -> int:
    return stable_hash("turn", prompt_seed, number, turn) & (2**62 - 1)
