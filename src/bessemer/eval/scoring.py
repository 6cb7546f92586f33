"""Scoring a model on a task's held-out problems: pass@1 as a mean over samples, pass@k, maj@k (R1 3, G.9)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.tasks import verdict_metrics as metrics
from bessemer.tasks.base import Problem, Task, stable_hash
from bessemer.tasks.readability import READABLE, consistency, readable
from bessemer.train.setup import batch_rows


def evaluate(
    engine: Engine,
    encode: Callable[[Problem], list[int]],
    task: Task,
    *,
    problems: int,
    samples: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 160,
    seed: int = 0,
    k: int | None = None,
) -> dict[str, Any]:
    """One row of results over problems 0..problems-1 of the test split; `results` says what its keys are."""
    k = samples if k is None else k
    if not 1 <= k <= samples:
        raise UserError(f"k is {k}: choose between 1 and the {samples} samples per problem")
    chosen = heldout(task, problems)
    seeds = [stable_hash("eval", seed, task.name, i) & (2**62 - 1) for i in range(problems)]
    groups = engine.generate(
        [encode(problem) for problem in chosen], samples=samples, seeds=seeds, temperature=temperature, top_p=top_p,
        max_new_tokens=max_new_tokens, batch_rows=batch_rows(problems * samples),
    )  # fmt: skip
    begun = engine.tokenizer.opening
    answers = [[begun + completion.text for completion in group] for group in groups]
    verdicts = [[task.verify(problem, text) for text in group] for problem, group in zip(chosen, answers, strict=True)]
    score = metrics.score(verdicts, k, seed)
    completions = [completion for group in groups for completion in group]
    written = [(text, problem.language) for problem, group in zip(chosen, answers, strict=True) for text in group]
    consistent = [consistency(text, language) for text, language in written]
    readings = Counter(readable(text, language).reason for text, language in written)
    return {
        "task": task.name,
        "domain": task.domain,
        "language": "+".join(task.languages),
        "n": problems,
        "samples": samples,
        "k": k,
        "temperature": temperature,
        "top_p": top_p,
        "pass_at_1": score["pass@1"],
        "pass_at_1_interval": _interval(score, "pass@1"),
        "pass_at_k": score[f"pass@{k}"],
        "pass_at_k_interval": _interval(score, f"pass@{k}"),
        "maj_at_k": score[f"maj@{k}"],
        "maj_at_k_interval": _interval(score, f"maj@{k}"),
        "by_difficulty": metrics.by_difficulty(verdicts, [problem.meta.get("difficulty") for problem in chosen]),
        "mean_length": sum(len(c.tokens) for c in completions) / len(completions),
        "formatted": score["formatted"],
        "readable": readings[READABLE] / len(completions),
        "unreadable": {reason: count for reason, count in readings.most_common() if reason != READABLE},
        "language_consistency": sum(consistent) / len(consistent),
        "truncated": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "reasons": metrics.reasons(verdicts),
    }


def heldout(task: Task, problems: int) -> list[Problem]:
    """Problems 0..problems-1 of the test split, those that every evaluation of the task asks."""
    size = task.size("test")
    if size is not None and problems > size:
        raise UserError(f"{problems} problems asked for, {task.name} has {size} held-out ones; take at most {size}")
    return [task.problem("test", i, seed=0) for i in range(problems)]


def _interval(score: dict[str, float], name: str) -> list[float]:
    return [score[f"{name}_low"], score[f"{name}_high"]]
