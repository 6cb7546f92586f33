"""One rollout: P prompts, G samples each, verified, and laid out as training batches (R1 2.2).

The prompt of rollout r is found by arithmetic, and a sample's seed from (run seed, rollout, prompt, sample), so a
resumed run samples what the uninterrupted one would have sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.engine.engine import Completion, Engine
from bessemer.rl import replay
from bessemer.rl.sampler import Sampler
from bessemer.tasks.base import Problem, Task, Verdict, stable_hash
from bessemer.tasks.readability import consistency


@dataclass
class Sampled:
    """One verified completion."""

    problem: Problem
    prompt_tokens: list[int]
    completion: Completion
    verdict: Verdict
    reward: float = 0.0
    """Set by `reward.Reward`."""
    advantage: float | list[float] = 0.0
    """Of the whole output, or of each of its tokens where a critic judges them."""
    values: list[float] | None = None
    """What the critic expected before each token; None without one."""
    returns: list[float] | None = None
    """What it should have expected."""
    preference: float | None = None
    """What a reward model said of it; None where the verifier pays."""
    language: float = 1.0
    """Share of the thoughts' words that are in the language of the problem; 0 without thoughts."""
    begun: str = ""
    """What the prompt's template has already written of the answer."""

    @property
    def answer(self) -> str:
        """All of it, as a verifier reads it."""
        return self.begun + self.completion.text


def problems_of(tasks: Sequence[Task], split: str, first: int, count: int, seed: int) -> list[tuple[Task, Problem]]:
    """Problems first..first+count-1 of the endless list that takes the tasks in turn; a task named twice has two turns
    a round, with problems of its own in each."""
    names = [task.name for task in tasks]
    found = []
    for n in range(first, first + count):
        turn, place = divmod(n, len(tasks))
        index = turn * names.count(names[place]) + names[:place].count(names[place])
        found.append((tasks[place], tasks[place].problem(split, index, seed)))
    return found


def sample(
    engine: Engine | Sampler,
    chosen: Sequence[tuple[Task, Problem]],
    encode: Callable[[Problem], list[int]],
    *,
    samples: int,
    seed: int,
    **sampling,
) -> list[list[Sampled]]:
    """G verified completions of every problem, prompt by prompt; `reward.Reward` pays them."""
    prompts = [encode(problem) for _, problem in chosen]
    found = engine.generate(prompts, samples=samples, seeds=seeds_of(seed, len(prompts)), **sampling)
    return verified(chosen, prompts, found, engine.tokenizer.opening)


def seeds_of(seed: int, prompts: int) -> list[int]:
    """What names the random streams of each prompt of a rollout."""
    return [stable_hash("rollout", seed, p) & (2**62 - 1) for p in range(prompts)]


def verified(
    chosen: Sequence[tuple[Task, Problem]],
    prompts: Sequence[list[int]],
    groups: Sequence[Sequence[Completion]],
    begun: str,
) -> list[list[Sampled]]:
    """Completions as their tasks judge them; `begun` is what the prompt's template has written of the answer."""
    judged = []
    for (task, problem), prompt, group in zip(chosen, prompts, groups, strict=True):
        rows = []
        for completion in group:
            answer = begun + completion.text
            verdict, language = task.verify(problem, answer), consistency(answer, problem.language)
            rows.append(Sampled(problem, prompt, completion, verdict, language=language, begun=begun))
        judged.append(rows)
    return judged


def rewards(groups: Sequence[Sequence[Sampled]]) -> Tensor:
    """[P, G]."""
    return torch.tensor([[row.reward for row in group] for group in groups], dtype=torch.float32)


def batches(rows: Sequence[Sampled], pad_id: int, max_tokens: int, normalise: str) -> list[Batch]:
    """`cut(rows)` as batches.

    normalise "sequence": every output counts 1 (the paper); "token" (DAPO) and "constant" (Dr. GRPO): every token does.
    """
    return [_batch(part, _length(part[0]), pad_id, normalise) for part in cut(rows, max_tokens)]


def cut(rows: Sequence[Sampled], max_tokens: int) -> list[list[Sampled]]:
    """Rows of similar length together, longest first, each part at most `max_tokens` padded tokens (at least a row)."""
    ordered = sorted(rows, key=_length, reverse=True)
    out, start = [], 0
    while start < len(ordered):
        stop = min(len(ordered), start + max(1, max_tokens // _length(ordered[start])))
        out.append(ordered[start:stop])
        start = stop
    return out


def _length(row: Sampled) -> int:
    return len(row.prompt_tokens) + len(row.completion.tokens)


def _batch(rows: Sequence[Sampled], width: int, pad_id: int, normalise: str) -> Batch:
    shape = (len(rows), width)
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    loss, advantage, old_logp = (torch.zeros(shape) for _ in range(3))
    for i, row in enumerate(rows):
        start, stop = len(row.prompt_tokens), _length(row)
        tokens[i, :stop] = torch.tensor(row.prompt_tokens + row.completion.tokens)
        loss[i, start:stop] = 1.0 / (stop - start) if normalise == "sequence" else 1.0
        advantage[i, start:stop] = torch.as_tensor(row.advantage)
        old_logp[i, start:stop] = torch.tensor(row.completion.logprobs)
    extras = {"advantage_BT": advantage, "old_logp_BT": old_logp}
    if rows[0].values is not None:
        extras |= {"value_BT": _aligned(rows, width, "values"), "return_BT": _aligned(rows, width, "returns")}
    if rows[0].completion.routing is not None:
        extras[replay.CHOICE] = replay.laid_out([row.completion.routing for row in rows], width)
    return Batch(tokens, loss, extras=extras)


def _aligned(rows: Sequence[Sampled], width: int, field: str) -> Tensor:
    """A list per row, each entry where its token stands."""
    found = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        found[i, len(row.prompt_tokens) : _length(row)] = torch.tensor(getattr(row, field))
    return found
