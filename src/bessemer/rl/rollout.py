"""One rollout: P problems, G samples each, verified and scored, and the training batches made from it (R1 2.2).

The problems of rollout r are computed from r, and the seed of a sample from (run seed, rollout, prompt, sample), so a
resumed run samples what the uninterrupted one would have sampled.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.engine.answers import Outcome, PlayedEpisode, Spoken, played
from bessemer.engine.engine import Engine
from bessemer.engine.generation import Completion
from bessemer.eval.judging import judge_all
from bessemer.rl.sampler import Sampler
from bessemer.tasks.answer import TEXT_AROUND
from bessemer.tasks.base import Problem, Task, Verdict, stable_hash
from bessemer.tasks.language import consistency
from bessemer.train.runtime import ALONE, Share
from bessemer.train.trainer import Trainer


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
    """Why the environment or a reward failed; nothing of such a sample is trained on."""

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
            return torch.arange(0 if self.failure else len(self.completion.tokens))
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


SHARED = 4
"""The number of micro-batches of an update is a multiple of this, so that cores can share them. It is the same on every
machine, as a gradient's bits depend on how its sum is split; on many ranks also a multiple of the pipelines."""
BUCKET = 64
"""Multiple for row widths on a GPU: planning fused attention for a new length costs more than a little padding."""
Row = list[ScoredSample]
"""The samples of a row of a batch, one after another; none attends to another one's tokens."""


@dataclass(frozen=True)
class Packing:
    """How a stage lays out its samples."""

    max_tokens: int
    """Padded tokens of a micro-batch."""
    pad_id: int
    normalise: str = "token"
    """sequence: each output weighs 1 (the paper); token (DAPO) and constant (Dr. GRPO): each token does."""
    n_pipelines: int = 1
    multiple: int = 1
    """What the width of a row is a multiple of (context parallelism)."""
    packs: bool = True
    """False: each sample has a row."""

    @classmethod
    def of(cls, settings: RLConfig, trainer: Trainer, pad_id: int) -> Packing:
        among = trainer.collective
        return cls(
            settings.micro_tokens, pad_id, settings.normalise, among.n_pipelines, among.row_multiple,
            trainer.model.keeps_segments(),
        )  # fmt: skip

    def parts(self, samples: Sequence[ScoredSample]) -> list[list[Row]]:
        """The samples packed into rows by best fit, the fullest row first, with at most `max_tokens` padded tokens per
        part (at least one row). Rows are as wide as the longest sample: short samples share a row, and no row is longer
        than it must be.

        If there is more than one part, their number is a multiple of `SHARED`, with about equal tokens, so that no core
        waits for the last one. With several pipelines it is also a multiple of these, if there are enough rows.
        """
        rows = _packed(samples, self.multiple) if self.packs else [[sample] for sample in samples]
        rows.sort(key=_filled, reverse=True)
        lengths = [_width(_filled(row), self.multiple) for row in rows]
        parts = _cut(lengths, self.max_tokens)
        if len(parts) > 1 or (parts and self.n_pipelines > 1):
            multiple = self.n_pipelines if len(parts) == 1 else math.lcm(SHARED, self.n_pipelines)
            most = -(-len(parts) // multiple) * multiple
            least = min(lengths[0], self.max_tokens)
            bounds = range(self.max_tokens)
            even = bisect_left(bounds, True, least, key=lambda tokens: len(_cut(lengths, tokens)) <= most)
            parts = _cut(lengths, even)
        return [rows[start:stop] for start, stop in parts]

    def batch(self, rows: Sequence[Row], part: Sequence[Row]) -> Batch:
        """The batch of the rows, as wide as that of the part they are from."""
        shape, extras = (len(rows), _width(_filled(part[0]), self.multiple)), dict[str, Tensor]()
        tokens, loss = torch.full(shape, self.pad_id, dtype=torch.int64), torch.zeros(shape)
        segments, samples = torch.zeros_like(tokens), [sample for row in rows for sample in row]
        begins = [(b, sum(map(_length, row[:n]))) for b, row in enumerate(rows) for n in range(len(row))]
        for number, (sample, (b, begin)) in enumerate(zip(samples, begins, strict=True), start=1):
            end, own_N = begin + _length(sample), sample.trained_N
            tokens[b, begin:end] = torch.tensor([*sample.prompt_tokens, *sample.completion.tokens])
            segments[b, begin:end] = number
            trained_N = begin + len(sample.prompt_tokens) + own_N
            loss[b, trained_N] = 1.0 / max(1, len(own_N)) if self.normalise == "sequence" else 1.0
            old_logp = values_of(sample.completion.logprobs)[own_N]
            for name, values in {"advantage": sample.advantage, "old_logp": old_logp, **sample.per_token}.items():
                extras.setdefault(f"{name}_BT", torch.zeros(shape))[b, trained_N] = torch.as_tensor(values)
        if samples[0].completion.routing is not None:
            extras["choice_BTLK"] = _place_routing(samples, begins, shape)
        if samples[0].completion.kept is not None:
            extras |= _place_kept(samples, begins, len(rows))
        packed = len(samples) > len(rows)
        return Batch(tokens, loss, segments if packed else None, extras, samples=len(samples) if packed else None)


def _width(longest: int, multiple: int = 1) -> int:
    """Tokens of a batch's rows: as many as the longest has, on a GPU a multiple of `BUCKET`."""
    multiple = math.lcm(BUCKET, multiple) if torch.cuda.is_available() else multiple
    return -(-longest // multiple) * multiple


def _packed(samples: Sequence[ScoredSample], multiple: int) -> list[Row]:
    """Rows as wide as the longest sample, filled by best fit: a sample, longest first, goes into the row with the least
    room that is enough."""
    rows: list[Row] = []
    rooms: list[tuple[int, int]] = []  # (free tokens of a row, its number), ascending
    width = _width(max(map(_length, samples), default=0), multiple)
    for sample in sorted(samples, key=_length, reverse=True):
        fitting = bisect_left(rooms, (_length(sample), 0))
        if fitting == len(rooms):
            rooms.append((width, len(rows)))
            rows.append([])
        room, number = rooms.pop(fitting)
        rows[number].append(sample)
        insort(rooms, (room - _length(sample), number))
    return rows


def _cut(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of each part, as full as `max_tokens` allows; `lengths` descend."""
    parts, start = [], 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, max_tokens // lengths[start]))
        parts.append((start, stop))
        start = stop
    return parts


def _length(sample: ScoredSample) -> int:
    return len(sample.prompt_tokens) + len(sample.completion.tokens)


def _filled(row: Row) -> int:
    """Tokens of a row without its padding."""
    return sum(map(_length, row))


def values_of(numbers: array) -> Tensor:
    """The array as a tensor of its dtype, which shares its memory."""
    return torch.from_numpy(np.frombuffer(numbers, dtype=numbers.typecode))


Begins = Sequence[tuple[int, int]]
"""(row, position of the first token) of each sample of a batch."""


def _place_routing(samples: Sequence[ScoredSample], begins: Begins, shape: tuple[int, int]) -> Tensor:
    """`Completion.routing` of the samples as one choice_BTLK, int16. It is -1 (the gate chooses) at a sample's last
    token, which was never fed, and at padding. No trained token follows either."""
    routings = [routing for sample in samples if (routing := sample.completion.routing) is not None]
    choice_BTLK = torch.full((*shape, *routings[0].shape[1:]), -1, dtype=torch.int16)
    for routing, (b, begin) in zip(routings, begins, strict=True):
        choice_BTLK[b, begin : begin + len(routing)] = routing
    return choice_BTLK


def _place_kept(samples: Sequence[ScoredSample], begins: Begins, n_rows: int) -> dict[str, Tensor]:
    """`Completion.kept` of the samples: the kept ids and the positions they are for, int32 [B, M], M that of the row
    with most ids. Nothing precedes position 0, so it marks padding."""
    ids: list[list[Tensor]] = [[] for _ in range(n_rows)]
    at: list[list[Tensor]] = [[] for _ in range(n_rows)]
    for sample, (b, begin) in zip(samples, begins, strict=True):
        assert sample.completion.kept is not None, "all samples have it, or none"
        id_M, count_T = sample.completion.kept
        first = begin + len(sample.prompt_tokens)
        ids[b].append(id_M)
        at[b].append(first + torch.arange(len(count_T), dtype=torch.int32).repeat_interleave(count_T))

    def padded(parts: list[list[Tensor]]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.cat(row) for row in parts], batch_first=True)

    return {"kept_id_BM": padded(ids), "kept_at_BM": padded(at)}
