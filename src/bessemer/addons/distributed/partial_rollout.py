"""A rollout whose answers are written in segments, each by the newest policy of its time.

After every segment the unfinished answers are continued from their own tokens with the weights of that moment, so a
long answer does not hold up the updates, and its later tokens are fresher than its first. Every token keeps the
log-probability under the policy that drew it and the optimizer step of that policy (`per_token["version"]`). Where one
segment ends and the next begins is counted in tokens and rollouts, never in seconds: a run is the same however fast its
workers are, and the prefix is read anew with the new weights, so that no token depends on a cache of older ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bessemer.addons.tasks.turns import joined
from bessemer.engine.answers import TurnPrompts
from bessemer.engine.generation import Completion
from bessemer.rl import rollout
from bessemer.rl.generator import RolloutGenerator
from bessemer.rl.rollout import Group, Rollout, ScoredSample
from bessemer.rl.sampler import PendingSamples
from bessemer.tasks import stable_hash
from bessemer.tasks.base import Verdict

VERSION = "version"
"""Optimizer steps of the policy that drew a token."""
UNJUDGED = Verdict(False, False, "not finished", None)


class PartialRollout:
    """Rollout `number`, whose answers grow by at most `segment` tokens with every `submit`."""

    def __init__(self, generator: RolloutGenerator, number: int, cap: int, step: int, segment: int) -> None:
        self.generator, self.number, self.cap, self.step, self.segment = generator, number, cap, step, segment
        self.rollout: Rollout | None = None
        """Set once it is finished."""
        self.groups: list[Group] = []
        """The answers so far."""
        self.seed = generator.round_seed(number, 0)
        self._pending: tuple[PendingSamples, list[ScoredSample], int] | None = None
        """What is being sampled, for which answers, by the policy of which step."""
        general, problems = generator.candidates(number, 0)
        if (select := generator.selector()) is not None:
            problems = select(problems, len(problems) // generator.pool, self.seed)
        self.problems = general + problems

    def restored(self, groups: list[Group]) -> PartialRollout:
        """The same with the answers of a checkpoint."""
        self.groups = groups
        asked = [pair for pairs in self.generator.candidates(self.number, 0) for pair in pairs]
        by_id = {problem.id: (task, problem) for task, problem in asked}
        self.problems = [by_id[group[0].problem.id] for group in groups]
        if not self._unfinished():
            self._score()
        return self

    def submit(self, step: int) -> None:
        """Asks the policy of this moment, which has made `step` steps, for the next segment."""
        self._submit(step, self.segment)

    def poll(self) -> bool:
        """Takes what is there, without waiting; returns whether the rollout is finished."""
        if self._pending is not None and self._pending[0].ready():
            self.collect()
        return self.rollout is not None

    def collect(self) -> None:
        """Waits for the segment that is being sampled."""
        if self._pending is None:
            return
        (pending, samples, step), self._pending = self._pending, None
        completions = [completion for group in pending.take() for completion in group]
        if not self.groups:
            count = self.generator.settings.samples
            for n, (_, problem) in enumerate(self.problems):
                prompt, answers = self.generator.encode(problem), completions[n * count : (n + 1) * count]
                self.groups.append([ScoredSample(problem, prompt, answer, UNJUDGED) for answer in answers])
            for sample in (sample for group in self.groups for sample in group):
                sample.per_token[VERSION] = [float(step)] * len(sample.completion.tokens)
        else:
            for sample, completion in zip(samples, completions, strict=True):
                sample.completion = self._joined(sample.completion, completion)
                sample.per_token[VERSION] += [float(step)] * len(completion.tokens)
        if not self._unfinished():
            self._score()

    def finish(self, step: int) -> Rollout:
        """The finished rollout; the policy of this moment writes what is missing."""
        while self.rollout is None:
            if self._pending is None:
                self._submit(step, self.cap)
            self.collect()
        return self.rollout

    def _submit(self, step: int, most: int) -> None:
        if self._pending is not None:
            self.collect()
        if self.rollout is not None:
            return
        generator, unfinished = self.generator, self._unfinished()
        if not self.groups:
            prompts = [generator.encode(problem) for _, problem in self.problems]
            seeds = rollout.prompt_seeds(self.seed, len(prompts))
            turn = TurnPrompts(prompts, generator.settings.samples, seeds, min(most, self.cap))
        else:
            length = len(unfinished[0].completion.tokens)
            prompts = [[*sample.prompt_tokens, *sample.completion.tokens] for sample in unfinished]
            turn = TurnPrompts(prompts, 1, self._seeds(unfinished), min(most, self.cap - length))
        self._pending = generator.submit(generator.sampler.policy(), turn), unfinished, step

    def _seeds(self, unfinished: Sequence[ScoredSample]) -> list[int]:
        """A stream of random numbers for each answer, of its own in every segment."""
        numbers = {id(sample): n for n, sample in enumerate(sample for group in self.groups for sample in group)}
        return [
            stable_hash("segment", self.seed, numbers[id(sample)], len(sample.completion.tokens)) & (2**62 - 1)
            for sample in unfinished
        ]

    def _unfinished(self) -> list[ScoredSample]:
        """All have equally many tokens: whatever has fewer has ended."""
        context = self.generator.context
        return [
            sample
            for group in self.groups
            for sample in group
            if sample.completion.finish_reason == "length"
            and len(sample.completion.tokens) < self.cap
            and len(sample.prompt_tokens) + len(sample.completion.tokens) < context
        ]

    def _joined(self, first: Completion, second: Completion) -> Completion:
        whole = joined([first, second], [[]], second.finish_reason == "stop")
        return replace(whole, text=self.generator.sampler.tokenizer.decode(whole.tokens))

    def _score(self) -> None:
        prompts = [group[0].prompt_tokens for group in self.groups]
        outcomes = [[sample.completion for sample in group] for group in self.groups]
        scored = self.generator.score(self.problems, prompts, outcomes, self.step, self.seed)
        for group, written in zip(scored, self.groups, strict=True):
            for sample, before in zip(group, written, strict=True):
                sample.per_token[VERSION] = before.per_token[VERSION]
        self.rollout = Rollout(scored, len(scored), self.cap, self.step)
