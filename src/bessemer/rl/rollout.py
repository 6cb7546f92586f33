"""One rollout: P problems, G samples each, verified and scored, and the training batches made from it (R1 2.2).

The problems of rollout r are computed from r, and the seed of a sample from (run seed, rollout, prompt, sample), so a
resumed run samples what the uninterrupted one would have sampled.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.engine.answers import Outcome, PlayedEpisode, Spoken, played
from bessemer.engine.engine import Engine
from bessemer.engine.generation import Completion
from bessemer.engine.kept_tokens import KeptTokens
from bessemer.eval.judging import judge_all
from bessemer.rl.sampler import Sampler
from bessemer.tasks.answer import TEXT_AROUND
from bessemer.tasks.base import Problem, Task, Verdict, stable_hash
from bessemer.tasks.language import consistency
from bessemer.train.runtime import ALONE, Share


@dataclass
class ScoredSample:
    """One verified completion; `reward.Reward` scores it, then its advantage is estimated."""

    problem: Problem
    prompt_tokens: list[int]
    completion: Completion
    verdict: Verdict
    reward: float = 0.0
    advantage: float | list[float] = 0.0
    """Of the whole output, or of each of its trained tokens."""
    terms: list[float] = field(default_factory=list)
    """The weighted terms of the reward."""
    per_token: dict[str, list[float]] = field(default_factory=dict)
    """Further numbers for each trained token; `value` reaches the batch as `value_BT`."""
    preference: float | None = None
    """The score of a reward model; None if the verifier decides."""
    language: float = 1.0
    """Share of the thoughts' words that are in the language of the problem; 0 without thoughts."""
    begun: str = ""
    """The beginning of the answer that the prompt's template has already written."""
    turns: list[Spoken] | None = None
    """For an episode: who wrote which tokens of the completion. None: the model wrote all of them."""
    failure: str = ""
    """Why the environment failed; nothing of such an episode is trained on."""

    @property
    def answer(self) -> str:
        """The whole answer, as a verifier reads it; for an episode, the last turn."""
        return self.begun + self.completion.text

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        turns = self.turns
        return len(self.completion.tokens) if turns is None else sum(n for role, n, _ in turns if role == MODEL)

    @property
    def trained_N(self) -> Tensor:
        """Positions in the completion of the tokens that are trained on, those the model wrote; int64."""
        if self.turns is None:
            return torch.arange(len(self.completion.tokens))
        written = [role == MODEL and not self.failure for role, _, _ in self.turns]
        counts = torch.tensor([count for _, count, _ in self.turns])
        return torch.tensor(written).repeat_interleave(counts).nonzero().squeeze(1)


MODEL = "assistant"
"""The role of what the model wrote."""
Once = Callable[[Callable[[], Any]], Any]
"""Calls its argument on one rank and returns the value on all."""
Group = list[ScoredSample]
"""The samples of one problem."""
TaskProblems = Sequence[tuple[Task, Problem]]
SHARED = 4
"""The number of micro-batches of an update is a multiple of this, so that cores can share them. It is the same on every
machine, as a gradient's bits depend on how its sum is split; on many ranks also a multiple of the pipelines."""


@dataclass(frozen=True)
class Rollout:
    """A finished rollout, as it is trained on."""

    groups: list[Group]
    """P groups of G samples, scored."""
    n_problems: int
    """Problems that were sampled, those of discarded groups included."""
    cap: int
    """Longest completion allowed, tokens."""
    step: int
    """Optimizer steps of the policy that sampled it."""


def problems_of(
    tasks: Sequence[Task], split: str | Callable[[Task], str], first: int, count: int, seed: int
) -> list[tuple[Task, Problem]]:
    """Problems first..first+count-1 of an endless list that cycles through the tasks; a task named twice gets two turns
    per round, with different problems in each. `split`: of all, or of each task."""
    names = [task.name for task in tasks]
    problems = []
    for n in range(first, first + count):
        turn, position = divmod(n, len(tasks))
        index = turn * names.count(names[position]) + names[:position].count(names[position])
        task = tasks[position]
        problems.append((task, task.problem(split if isinstance(split, str) else split(task), index, seed)))
    return problems


def sample(
    engine: Engine | Sampler,
    problems: TaskProblems,
    encode: Callable[[Problem], list[int]],
    *,
    samples: int,
    seed: int,
    needs_format: bool = False,
    max_new_tokens: int = 256,
    context: int = 0,
    once: Once = lambda make: make(),
    share: Share = ALONE,
    **sampling,
) -> list[Group]:
    """G verified completions or episodes per problem, not yet scored; `needs_format` and `share` as in `verify`,
    `context` and `once` as in `play_of`, which environments need, `sampling` as in `Engine.plan`."""
    prompts, outcomes = played(
        engine, problems, encode, samples=samples, seeds=prompt_seeds(seed, len(problems)), cap=max_new_tokens,
        context=context, once=once, **sampling,
    )  # fmt: skip
    return verify(problems, prompts, outcomes, engine.tokenizer.opening, needs_format, share)


def prompt_seeds(seed: int, prompts: int) -> list[int]:
    """The seed of each prompt's random streams."""
    return [stable_hash("rollout", seed, p) & (2**62 - 1) for p in range(prompts)]


def verify(
    problems: TaskProblems,
    prompts: Sequence[list[int]],
    outcomes: Sequence[Sequence[Outcome]],
    begun: str,
    needs_format: bool = False,
    share: Share = ALONE,
    holders: Sequence[int] | None = None,
) -> list[Group]:
    """Verifies the completions of each problem with its task; an episode has its verdict already. `begun` as in
    `ScoredSample`. With `needs_format`, a right answer in the wrong format counts as wrong. The format is R1-Zero's two
    blocks or, if the template has opened the thoughts, as R1's does, R1's summary too. On many ranks `share` is this
    one's; `holders`: the ranks that have the completions, if all have only their own. Collective."""
    pairs = [
        (task, problem, outcome) for (task, problem), group in zip(problems, outcomes, strict=True) for outcome in group
    ]
    plain = [(task, problem, begun + answer.text) for task, problem, answer in pairs if isinstance(answer, Completion)]
    judged = iter(judge_all(plain, share, holders))
    groups = []
    for (_, problem), prompt, group in zip(problems, prompts, outcomes, strict=True):
        rows = []
        for outcome in group:
            if isinstance(outcome, PlayedEpisode):
                episode, completion, verdict = outcome, outcome.completion, outcome.verdict
                language = consistency(begun + completion.text, problem.language)
            else:
                episode, completion = None, outcome
                verdict, language = next(judged)
            if needs_format:
                verdict = in_form(verdict, begun)
            row = ScoredSample(problem, prompt, completion, verdict, language=language, begun=begun)
            if episode is not None:
                row.turns, row.failure = episode.turns, episode.failure
            rows.append(row)
        groups.append(rows)
    return groups


def in_form(verdict: Verdict, begun: str) -> Verdict:
    """The verdict where accuracy needs the form: an answer in another form earns no credit."""
    summary = verdict.summary and not begun
    if summary and (verdict.sound or verdict.partial):
        verdict = replace(verdict, reason=TEXT_AROUND)
    formatted = verdict.formatted and not summary
    partial = verdict.partial if formatted or verdict.partial is None else 0.0
    return replace(verdict, correct=verdict.sound and not summary, partial=partial)


def rewards(groups: Sequence[Group]) -> Tensor:
    """The rewards, [P, G]."""
    return torch.tensor([[row.reward for row in group] for group in groups], dtype=torch.float32)


BUCKET = 64
"""Multiple for row widths on a GPU: planning fused attention for a new length costs more than a little padding."""


def to_batches(
    rows: Sequence[ScoredSample], pad_id: int, max_tokens: int, normalise: str, n_pipelines: int = 1
) -> list[Batch]:
    """`split_by_length(rows)` as batches.

    normalise "sequence": each output weighs 1 (the paper); "token" (DAPO) and "constant" (Dr. GRPO): each token does.
    """
    parts = split_by_length(rows, max_tokens, n_pipelines)
    return [batch_of(part, part, pad_id, normalise) for part in parts]


def batch_of(rows: Sequence[ScoredSample], part: Sequence[ScoredSample], pad_id: int, normalise: str) -> Batch:
    """The batch of the rows, as wide as that of the part they are from."""
    return _batch(rows, _width(_length(part[0])), pad_id, normalise)


def _width(longest: int) -> int:
    """Tokens of a batch's rows: as many as the longest has, on a GPU a multiple of `BUCKET`."""
    return -(-longest // BUCKET) * BUCKET if torch.cuda.is_available() else longest


def split_by_length(rows: Sequence[ScoredSample], max_tokens: int, n_pipelines: int = 1) -> list[list[ScoredSample]]:
    """Rows grouped by similar length, longest first, at most `max_tokens` padded tokens per part (at least one row).

    If there is more than one part, their number is a multiple of `SHARED`, with about equal tokens, so that no core
    waits for the last one. With several pipelines it is also a multiple of these, if there are enough rows.
    """
    ordered = sorted(rows, key=_length, reverse=True)
    lengths = [_length(row) for row in ordered]
    parts = _cut(lengths, max_tokens)
    if len(parts) > 1 or (parts and n_pipelines > 1):
        multiple = n_pipelines if len(parts) == 1 else math.lcm(SHARED, n_pipelines)
        most = -(-len(parts) // multiple) * multiple
        least = min(lengths[0], max_tokens)
        even = bisect_left(range(max_tokens), True, least, key=lambda tokens: len(_cut(lengths, tokens)) <= most)
        parts = _cut(lengths, even)
    return [ordered[start:stop] for start, stop in parts]


def _cut(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of each part, as full as `max_tokens` allows; `lengths` descend."""
    parts, start = [], 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, max_tokens // lengths[start]))
        parts.append((start, stop))
        start = stop
    return parts


def _length(row: ScoredSample) -> int:
    return len(row.prompt_tokens) + len(row.completion.tokens)


def _batch(rows: Sequence[ScoredSample], width: int, pad_id: int, normalise: str) -> Batch:
    shape = (len(rows), width)
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    loss, advantage, old_logp = (torch.zeros(shape) for _ in range(3))
    for i, row in enumerate(rows):
        start, stop, own_N = len(row.prompt_tokens), _length(row), row.trained_N
        tokens[i, :start] = torch.tensor(row.prompt_tokens)
        tokens[i, start:stop] = values_of(row.completion.tokens)
        loss[i, start + own_N] = 1.0 / max(1, len(own_N)) if normalise == "sequence" else 1.0
        advantage[i, start + own_N] = torch.as_tensor(row.advantage)
        old_logp[i, start + own_N] = values_of(row.completion.logprobs)[own_N]
    extras = {"advantage_BT": advantage, "old_logp_BT": old_logp}
    extras |= {f"{name}_BT": _align(rows, width, name) for name in rows[0].per_token}
    if routings := [row.completion.routing for row in rows if row.completion.routing is not None]:
        extras["choice_BTLK"] = pad_routing(routings, width)
    if kept := [row.completion.kept for row in rows if row.completion.kept is not None]:
        extras |= pad_kept(kept, [len(row.prompt_tokens) for row in rows])
    return Batch(tokens, loss, extras=extras)


def values_of(numbers: array) -> Tensor:
    """The array as a tensor of its dtype, which shares its memory."""
    return torch.from_numpy(np.frombuffer(numbers, dtype=numbers.typecode))


def _align(rows: Sequence[ScoredSample], width: int, name: str) -> Tensor:
    """One list per row, each entry at the position of its trained token."""
    aligned = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        aligned[i, len(row.prompt_tokens) + row.trained_N] = torch.tensor(row.per_token[name])
    return aligned


def pad_routing(routings: Sequence[Tensor], width: int) -> Tensor:
    """Pads `Completion.routing` records into one choice_BTLK, int16. It is -1 (the gate chooses) at a row's last token,
    which was never fed, and at padding. No trained token follows either."""
    choice_BTLK = torch.full((len(routings), width, *routings[0].shape[1:]), -1, dtype=torch.int16)
    for row, routing in zip(choice_BTLK, routings, strict=True):
        row[: len(routing)] = routing
    return choice_BTLK


def pad_kept(kept: Sequence[KeptTokens], starts: Sequence[int]) -> dict[str, Tensor]:
    """Pads `Completion.kept` records, whose tokens begin at `starts`: the kept ids and the positions they are for,
    int32 [B, M], M that of the row with most ids. Nothing precedes position 0, so it marks padding."""
    at = [
        start + torch.arange(len(count_T), dtype=torch.int32).repeat_interleave(count_T)
        for (_, count_T), start in zip(kept, starts, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"kept_id_BM": pad([id_M for id_M, _ in kept], batch_first=True), "kept_at_BM": pad(at, batch_first=True)}
