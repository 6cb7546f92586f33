"""Scores a model on a task's held-out problems: pass@1 as a mean over samples, pass@k, maj@k (R1 3).

The rows go to `results.json`; keys are only ever added.

    {"rows": [...], "contamination": {...}}       the stage `eval`; contamination is `ContaminationSearch.result`
    {"model": directory, "rows": [...]}           `bessemer eval --json`

A row is one model on one task at one way of sampling:
    model                  name of the stage; on the command line, the directory
    task, domain           name of the task, and what it is counted under (`tasks.base.DOMAINS`; "lm-eval" there)
    language               "en", "zh", or "en+zh" if both are asked
    n, samples, k          problems; answers to each; k of pass@k and maj@k
    skip                   held-out problems left out before the first; absent for files of answers
    translated             whether the task's n-th problem is the same in every language
    temperature, top_p     how answers were sampled, and
    max_new_tokens         how long they could be (null if a file of answers does not say)
    pass_at_1              mean over problems and samples
    pass_at_k, maj_at_k    unbiased (Chen et al. 2021); maj@k is the paper's cons@k, see `tasks/verdict_metrics.py`
    *_interval             [low, high] of each of the three: 95 % over problems (the hook `interval`)
    by_problem             {problem: share of its answers that are correct}; a problem's name is a hash of its text
    readable_by_problem, language_by_problem      the same for `readable` and `language_consistency` below
    by_difficulty          {difficulty: {n, pass_at_1}}; {} if the task states none
    mean_length            tokens per answer; null if a file of answers does not say
    formatted, truncated   shares of answers in the required form, and cut off at the length cap (null as above)
    readable, unreadable   share a person can read, and {reason: answers} for the rest (the hook `readable`)
    language_consistency   mean share of the thoughts' words in the language of the question; this and `readable` have
                           an *_interval, too
    reasons                {verdict: answers}
    score                  mean credit of the answers, 0 to 1; absent for a task that gives no partial credit
    reward                 mean reward of the answers, if an RL stage that leads to a model has one of its own for this
                           task; also reward_by_problem, and reward_interval if all lie between 0 and 1
    shots, shot_kind       examples before each question, and their kind (`shots.py`); absent if there are none
    prefix                 text before every question; absent if there is none
    turns, called, failed  for an environment: the model's turns per episode, the share of episodes in which a tool
                           answered, and the number in which the environment failed, which count as wrong
A row of an lm-eval task has, instead of mean_length and what follows it, `metric` (what its pass_at_1 is; null, as are
the rates, if the task has no accuracy), `metrics` {name: {value, stderr}}, `shots`, and `contexts_cut` (requests of the
call that lost ids on the left). Its samples and k are 1, and its intervals are Wilson's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from bessemer import plugins
from bessemer.engine.answers import Generates, Outcome, PlayedEpisode, played
from bessemer.engine.generation import Completion
from bessemer.errors import UserError
from bessemer.eval.judging import judge_all
from bessemer.tasks import verdict_metrics as metrics
from bessemer.tasks.base import Problem, Task, Verdict, stable_hash
from bessemer.tasks.language import consistency
from bessemer.train.runtime import ALONE, Share
from bessemer.train.setup import batch_rows

FIGURES = ("pass_at_1", "pass_at_k", "maj_at_k")
Rewards = Callable[[Sequence[tuple[Task, Problem]], Sequence[list[int]], Sequence[Sequence[Outcome]], str], list[float]]
"""Takes problems, their prompts' ids, the answers to each, and what the template has already written of every answer;
returns the mean reward of each problem's answers."""


@dataclass(frozen=True)
class Answer:
    """One sample as it is judged, including the opening that its prompt already contains."""

    text: str
    tokens: int | None = None
    finish_reason: str | None = None
    episode: PlayedEpisode | None = None
    """The episode of an environment, with its verdict; `text` is its last turn."""


def evaluate(
    engine: Generates,
    encode: Callable[[Problem], list[int]],
    task: Task,
    *,
    problems: int,
    samples: int,
    skip: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 160,
    seed: int = 0,
    k: int | None = None,
    context: int = 0,
    once: Callable[[Callable[[], Any]], Any] = lambda make: make(),
    share: Share = ALONE,
    rewards: Rewards | None = None,
) -> dict[str, Any]:
    """One evaluation row over `problems` problems of the test split after the first `skip`; `context` and `once` as in
    `play_of`, for environments; `share` as in `judge_all`."""
    k = samples if k is None else k
    if not 1 <= k <= samples:
        raise UserError(f"k is {k}; choose between 1 and the {samples} samples per problem")
    chosen = heldout(task, problems, skip)
    seeds = prompt_seeds(task, seed, range(skip, skip + problems))
    asked = [(task, problem) for problem in chosen]
    prompts, groups = played(
        engine, asked, encode, samples=samples, seeds=seeds, cap=max_new_tokens, context=context, once=once,
        temperature=temperature, top_p=top_p, batch_rows=batch_rows(problems * samples),
    )  # fmt: skip
    answers = [[answer_of(outcome, engine.tokenizer.opening) for outcome in group] for group in groups]
    row = judge(
        task, chosen, answers, k=k, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed,
        share=share,
    )  # fmt: skip
    if rewards is not None:
        row |= _rewarded(chosen, rewards(asked, prompts, groups, engine.tokenizer.opening), seed)
    return row | {"skip": skip}


def _rewarded(problems: Sequence[Problem], values: list[float], seed: int) -> dict[str, Any]:
    """Keys of the reward. It may be any number, and only between 0 and 1 has its mean an interval."""
    interval = _interval("reward", values, seed) if min(values) >= 0 and max(values) <= 1 else {}
    return {
        "reward": fmean(values),
        **interval,
        "reward_by_problem": dict(zip(_named(problems), values, strict=True)),
    }


def prompt_seeds(task: Task, seed: int, indices: Iterable[int]) -> list[int]:
    """The seeds of the random streams of held-out problems."""
    return [stable_hash("eval", seed, task.name, index) & (2**62 - 1) for index in indices]


def answer_of(outcome: Outcome, opening: str) -> Answer:
    if isinstance(outcome, Completion):
        return Answer(opening + outcome.text, len(outcome.tokens), outcome.finish_reason)
    tokens = sum(turn.tokens for turn in outcome.turns if turn.role == "assistant")
    return Answer(opening + outcome.completion.text, tokens, outcome.completion.finish_reason, outcome)


def judge(
    task: Task,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Answer]],
    *,
    k: int,
    temperature: float | None,
    top_p: float | None,
    max_new_tokens: int | None,
    seed: int = 0,
    share: Share = ALONE,
) -> dict[str, Any]:
    """The evaluation row for the answers to each problem, at least k of them. `seed` is for the intervals, `share` as
    in `judge_all`."""
    questions = list(zip(problems, groups, strict=True))
    plain = [
        (task, problem, completion.text)
        for problem, group in questions
        for completion in group
        if completion.episode is None
    ]
    results = iter(judge_all(plain, share))
    verdicts = [
        [next(results).verdict if completion.episode is None else completion.episode.verdict for completion in group]
        for group in groups
    ]
    rates, figures = metrics.rates(verdicts, k), dict[str, Any]()
    for name, values in rates.items():
        figures |= {name: float(np.mean(values)), **_interval(name, values, seed)}
    answers = [answer for group in groups for answer in group]
    consistent = [fmean(consistency(answer.text, problem.language) for answer in group) for problem, group in questions]
    named = _named(problems)
    read, readable = _readability(questions, named, seed)
    lengths = [answer.tokens for answer in answers if answer.tokens is not None]
    ends = [answer.finish_reason for answer in answers if answer.finish_reason is not None]
    return {
        "task": task.name,
        "domain": task.domain,
        "language": "+".join(task.languages),
        "n": len(problems),
        "samples": min(map(len, groups)),
        "k": k,
        "translated": task.translated,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        **figures,
        "by_problem": dict(zip(named, rates["pass_at_1"], strict=True)),
        **read,
        "language_by_problem": dict(zip(named, consistent, strict=True)),
        "by_difficulty": metrics.by_difficulty(verdicts, [problem.meta.get("difficulty") for problem in problems]),
        "mean_length": sum(lengths) / len(lengths) if len(lengths) == len(answers) else None,
        "formatted": fmean(v.formatted for group in verdicts for v in group),
        **readable,
        "language_consistency": fmean(consistent),
        **_interval("language_consistency", consistent, seed),
        "truncated": ends.count("length") / len(ends) if len(ends) == len(answers) else None,
        "reasons": metrics.reasons(verdicts),
        **_credit([verdict for group in verdicts for verdict in group]),
        **_of_episodes([answer.episode for answer in answers if answer.episode is not None]),
    }


def _interval(name: str, values: Sequence[float], seed: int) -> dict[str, list[float]]:
    """The interval of a mean over problems, from the hook `interval`; none without it."""
    interval = plugins.hook("interval")
    return {} if interval is None else {f"{name}_interval": list(interval(values, seed)[1:])}


def _readability(
    questions: Sequence[tuple[Problem, Sequence[Answer]]], named: Sequence[str], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys by problem, and keys of all answers, from the hook `readable`; none without it."""
    if (judge := plugins.hook("readable")) is None:
        return {}, {}
    readings = [[judge(answer.text, problem.language) for answer in group] for problem, group in questions]
    shares = [fmean(reading.readable for reading in group) for group in readings]
    faults = Counter(reading.reason for group in readings for reading in group if not reading.readable)
    n = sum(map(len, readings))
    return {"readable_by_problem": dict(zip(named, shares, strict=True))}, {
        "readable": (n - faults.total()) / n,
        **_interval("readable", shares, seed),
        "unreadable": dict(faults.most_common()),
    }


def _credit(verdicts: Sequence[Verdict]) -> dict[str, float]:
    return {"score": fmean(v.score for v in verdicts)} if any(v.partial is not None for v in verdicts) else {}


def _of_episodes(episodes: Sequence[PlayedEpisode]) -> dict[str, Any]:
    """Further keys of an environment's row."""
    if not episodes:
        return {}
    spoken = [[turn.role for turn in episode.turns] for episode in episodes]
    return {
        "turns": sum(roles.count("assistant") for roles in spoken) / len(spoken),
        "called": sum("tool" in roles for roles in spoken) / len(spoken),
        "failed": sum(bool(episode.failure) for episode in episodes),
    }


def _named(problems: Sequence[Problem]) -> list[str]:
    """A name for each problem, equal in every evaluation that asks the same; repeated problems are numbered."""
    names: list[str] = []
    counts: Counter[str] = Counter()
    for problem in problems:
        name = f"{stable_hash(problem.language, problem.prompt):016x}"[:12]
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}-{counts[name]}")
    return names


def heldout(task: Task, problems: int, skip: int = 0) -> list[Problem]:
    """Problems skip..skip+problems-1 of the test split, the same in every evaluation. UserError if the task has
    fewer."""
    size = task.size("test")
    if size == 0:
        raise UserError(f"{task.name} holds out no problem; write @test after its file, or name another task")
    if size is not None and skip + problems > size:
        request = f"{problems} problems requested after the first {skip}" if skip else f"{problems} problems requested"
        most = f"use at most {size - skip}" if skip < size else f"skip at most {size - 1}"
        raise UserError(f"{request}, but {task.name} has {size} held-out ones; {most}")
    return [task.problem("test", i, seed=0) for i in range(skip, skip + problems)]
