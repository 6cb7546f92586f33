"""One rollout: P prompts, G samples each, judged, and laid out as training batches (R1 2.2).

The prompt of rollout r is found by arithmetic, and a sample's seed from (run seed, rollout, prompt, sample), so a
resumed run samples what the uninterrupted one would have sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.data.chat import opening
from bessemer.infer.engine import Completion, Engine
from bessemer.tasks.base import Problem, Task, Verdict, stable_hash
from bessemer.tasks.language import consistency


@dataclass
class Sampled:
    """One judged completion."""

    problem: Problem
    prompt_tokens: list[int]
    completion: Completion
    verdict: Verdict
    reward: float
    advantage: float = 0.0
    language: float = 1.0
    """Share of the thoughts' words that are in the language of the problem; 0 without thoughts."""
    begun: str = ""
    """What the prompt's template has already written of the answer."""

    @property
    def answer(self) -> str:
        """All of it, as a verifier reads it."""
        return self.begun + self.completion.text


@dataclass(frozen=True)
class Reward:
    """R = R_accuracy + format * R_format + language * R_language (R1 2.2.2 and 2.3.2, which add them with equal weight;
    R1-Zero has no language term)."""

    format: float = 1.0
    language: float = 0.0

    def __call__(self, verdict: Verdict, consistency: float) -> float:
        """`consistency` as in `tasks.language`."""
        return float(verdict.correct) + self.format * float(verdict.formatted) + self.language * consistency


def problems_of(tasks: Sequence[Task], split: str, first: int, count: int, seed: int) -> list[tuple[Task, Problem]]:
    """Problems first..first+count-1 of the endless list that takes the tasks in turn."""
    found = []
    for n in range(first, first + count):
        task = tasks[n % len(tasks)]
        found.append((task, task.problem(split, n // len(tasks), seed)))
    return found


def sample(
    engine: Engine,
    chosen: Sequence[tuple[Task, Problem]],
    encode: Callable[[Problem], list[int]],
    reward: Reward,
    *,
    samples: int,
    seed: int,
    **sampling,
) -> list[list[Sampled]]:
    """G judged completions of every problem, prompt by prompt."""
    prompts = [encode(problem) for _, problem in chosen]
    seeds = [stable_hash("rollout", seed, p) & (2**62 - 1) for p in range(len(prompts))]
    groups = engine.generate(prompts, samples=samples, seeds=seeds, **sampling)
    begun = opening(engine.tokenizer.chat_style)
    judged = []
    for (task, problem), prompt, group in zip(chosen, prompts, groups, strict=True):
        rows = []
        for completion in group:
            answer = begun + completion.text
            verdict, language = task.verify(problem, answer), consistency(answer, problem.language)
            paid = reward(verdict, language)
            rows.append(Sampled(problem, prompt, completion, verdict, paid, language=language, begun=begun))
        judged.append(rows)
    return judged


def rewards(groups: Sequence[Sequence[Sampled]]) -> Tensor:
    """[P, G]."""
    return torch.tensor([[row.reward for row in group] for group in groups], dtype=torch.float32)


def batches(rows: Sequence[Sampled], pad_id: int, max_tokens: int, normalise: str) -> list[Batch]:
    """Rows of similar length together, each batch at most `max_tokens` padded tokens (at least one row).

    normalise "sequence": every output counts 1 (the paper); "token" (DAPO) and "constant" (Dr. GRPO): every token does.
    """
    ordered = sorted(rows, key=_length, reverse=True)
    out, start = [], 0
    while start < len(ordered):
        width = _length(ordered[start])
        stop = min(len(ordered), start + max(1, max_tokens // width))
        out.append(_batch(ordered[start:stop], width, pad_id, normalise))
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
        advantage[i, start:stop] = row.advantage
        old_logp[i, start:stop] = torch.tensor(row.completion.logprobs)
    return Batch(tokens, loss, extras={"advantage_BT": advantage, "old_logp_BT": old_logp})
