"""Why the reward of an RL stage rose: the same problems are answered before and after it, and the difference is
decomposed.

The reward is a sum of terms, so its rise is exactly the sum of theirs. A term rises because answers change in ways that
earn it. A way of answering is a cause if it became more frequent AND if, among answers to one problem by one model,
those that have it earn more, other causes being equal (least squares within groups). Its part of the rise is the
product of the two. Candidates are named behaviours and the phrases whose frequency changed most, so that a reward that
pays for something nobody thought of shows too.

This is association within groups, not an experiment: a behaviour that only accompanies the cause is named with it or in
its place. `bessemer replay` and a run with a control reward test such a claim.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.addons.evals.intervals import shares_apart
from bessemer.addons.evals.mean_interval import FEW, bootstrap, widened
from bessemer.addons.tasks.countdown_diagnosis import diagnose
from bessemer.addons.tasks.readable import readable
from bessemer.rl.reward import Reward
from bessemer.rl.rollout import Group, ScoredSample
from bessemer.tasks.answer import thought

RIGHT = "right answers"
CAUSES = 4
"""Maximum number of causes per term."""
PHRASES = 60
"""Number of candidate phrases: those whose share of answers changed most."""
PLAINER = 0.7
"""A phrase must explain 1 / PLAINER times as much as a behaviour to be preferred to it."""
CHANGED, EARNS, COUNTS = 3.0, 4.0, 0.1
"""Minimum size of a cause: its change in standard errors over problems, its coefficient in standard errors, its part of
the term's rise."""
OWN = 0.05
"""Minimum share of a candidate's within-group variance that the causes chosen before it do not explain."""
RESAMPLES = 400
DEFINED = {"form": "keeps the form", "language": "thinks in the language of the question"}
"""Terms that pay for one behaviour by definition."""
_WORD = re.compile(r"</?\w+>|[A-Za-z']+|[\u3400-\u9fff]{1,2}|\d+|[^\s\w]")


@dataclass(frozen=True)
class Cause:
    """One way of answering, and its part in the rise of a term."""

    term: str
    name: str
    before: float
    after: float
    """Its mean frequency or amount per answer."""
    earns: float
    """Reward of one unit of it, other causes being equal."""
    part: float
    """Its part of the reward's rise: (after - before) earns."""
    low: float
    high: float


@dataclass(frozen=True)
class Flip:
    """A problem whose reward changed a lot."""

    id: str
    prompt: str
    before: float
    after: float


@dataclass(frozen=True)
class Explanation:
    """The full explanation. Rates are means over samples."""

    problems: int
    samples: int
    before: float
    after: float
    low: float
    high: float
    """95 % interval of the rise, over problems."""
    terms: dict[str, tuple[float, float]]
    """Term -> its mean before and after; they sum to the reward."""
    causes: list[Cause]
    """Largest part first."""
    right: tuple[float, float]
    """Share of right answers by the task's own verdict, whatever the reward paid for."""
    some_before: float
    """Share of problems with at least one right answer among the samples before: pass@G."""
    new: int
    """Problems solved by at least half the samples after, and by none before."""
    sharpened: int
    """Problems solved by at least half the samples after, and by some but fewer than half before."""
    length: tuple[float, float]
    language: tuple[float, float]
    dead: tuple[float, float]
    """Share of groups without contrast."""
    flips: list[Flip]
    training: int = 0
    """Problems that training may have asked, of tasks that hold none out."""

    @property
    def rise(self) -> float:
        return self.after - self.before

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> Explanation:
        """From JSON."""
        causes, flips = [Cause(**fields) for fields in facts["causes"]], [Flip(**fields) for fields in facts["flips"]]
        pairs = {name: tuple(facts[name]) for name in ("right", "length", "language", "dead")}
        terms = {name: tuple(pair) for name, pair in facts["terms"].items()}
        return cls(**facts | pairs | {"causes": causes, "flips": flips, "terms": terms})


def explain(before: Sequence[Group], after: Sequence[Group], reward: Reward, training: int = 0) -> Explanation:
    """Explains the rise from scored groups of the same problems in order, by the starting model and by the result;
    `training` of the problems are not held out."""
    sides = [list(before), list(after)]
    paid = [[_terms(row, reward) for group in side for row in group] for side in sides]
    names = list(dict.fromkeys(name for side in paid for terms in side for name in terms))
    size = len(before[0])
    value = {
        name: np.array([[terms.get(name, 0.0) for terms in side] for side in paid]).reshape(2, -1, size)
        for name in names
    }
    total = np.sum([value[name] for name in names], axis=0)
    columns = _columns(sides)
    causes = [cause for name in names for cause in _causes(name, value[name], columns)]
    right = _stack(sides, lambda row: float(row.verdict.correct))
    rate = right.mean(2)
    problems = [group[0].problem for group in before]
    change = total.mean(2)[1] - total.mean(2)[0]
    order = np.argsort(-np.abs(change))[:8]
    low, high = _interval(total, change)

    def both(read: Callable[[ScoredSample], float]) -> tuple[float, float]:
        return _pair(_stack(sides, read).mean((1, 2)))

    solved = rate[1] >= 0.5
    return Explanation(
        len(problems), size, float(total[0].mean()), float(total[1].mean()), low, high,
        {name: _pair(value[name].mean((1, 2))) for name in names},
        sorted(causes, key=lambda cause: -abs(cause.part)),
        _pair(right.mean((1, 2))), float((rate[0] > 0).mean()),
        int((solved & (rate[0] == 0)).sum()), int((solved & (rate[0] > 0) & (rate[0] < 0.5)).sum()),
        both(lambda row: row.length), both(lambda row: row.language),
        _pair(np.array([(side == side[:, :1]).all(1).mean() for side in total])),
        [Flip(problems[i].id, problems[i].prompt, *map(float, total.mean(2)[:, i])) for i in order],
        training,
    )  # fmt: skip


def _terms(row: ScoredSample, reward: Reward) -> dict[str, float]:
    """The summands of a sample's reward."""
    labels = {"accuracy": RIGHT if row.preference is None else "reward models", "format": "form"}
    names = [labels.get(term.name, Path(term.name).name) for term in reward.terms]
    return dict(zip(names, row.terms, strict=True))


def _behaviours(row: ScoredSample) -> dict[str, float]:
    """The named behaviours of one answer, each 0 or 1, or an amount."""
    thoughts, answer = thought(row.answer).strip(), row.verdict.answer or ""
    behaviours = {
        "thinks": float(bool(thoughts)),
        "keeps the form": float(row.verdict.formatted),
        "is longer, by 100 tokens": row.length / 100,
        "ends before the cap": float(row.completion.finish_reason != "length"),
        "takes more steps or tries, by 10": (thoughts.count("\n") + 1 if thoughts else 0) / 10,
        "thinks in the language of the question": row.language,
        "does not repeat itself": float(readable(row.answer, row.problem.language).reason != "repetitive"),
        "answers with what stands in the question": float(_stands_in(answer, row.problem.prompt)),
    }
    if row.problem.meta.keys() >= {"numbers", "target"} and thoughts:
        trace = diagnose(row.problem, row.answer)
        behaviours |= {
            "searches in order": float(trace.systematic > 0),
            "goes on until it accepts a try": float(trace.said_yes > 0),
            "repeats no try": float(trace.repeated == 0),
            "calculates without an error": float(trace.steps_right == trace.steps),
            "uses the given numbers": float(trace.right_numbers == trace.tries),
            "accepts no miss": float(trace.yes_on_miss == 0),
        }
    return behaviours


def _stands_in(answer: str, prompt: str) -> bool:
    """Whether the question holds the answer as a word of its own."""
    return bool(answer) and re.search(rf"(?<!\w)(?<!\d\.){re.escape(answer)}(?!\w|\.\d)", prompt) is not None


def _columns(sides: Sequence[Sequence[Group]]) -> dict[str, np.ndarray]:
    """Candidate -> [2, P, G]; phrases are in quotation marks."""
    rows = [row for side in sides for group in side for row in group]
    shape = (2, len(sides[0]), len(sides[0][0]))
    behaviours = [_behaviours(row) for row in rows]
    names = dict.fromkeys(name for behaviour in behaviours for name in behaviour)
    columns = {
        name: np.array([behaviour.get(name, 0.0) for behaviour in behaviours]).reshape(shape) for name in names
    } | {RIGHT: _stack(sides, lambda row: float(row.verdict.correct))}
    common = Counter(row.verdict.answer for group in sides[1] for row in group if row.verdict.answer).most_common(1)
    if common:
        constant = f'answers "{common[0][0][:40]}" to everything'
        columns[constant] = _stack(sides, lambda row: float(row.verdict.answer == common[0][0]))
    phrases_of = [_phrases(row) for row in rows]
    half = len(rows) // 2
    counts = [
        Counter(phrase for phrases in part for phrase in phrases) for part in (phrases_of[:half], phrases_of[half:])
    ]
    moved = {phrase: abs(counts[1][phrase] - counts[0][phrase]) for phrase in counts[0] | counts[1]}
    for phrase in sorted(moved, key=lambda phrase: (-moved[phrase], phrase))[:PHRASES]:
        columns[f'writes "{phrase}"'] = np.array([float(phrase in phrases) for phrases in phrases_of]).reshape(shape)
    return {name: column for name, column in columns.items() if np.ptp(column) > 0}


def _phrases(row: ScoredSample) -> set[str]:
    """Words and pairs of words of an answer; numbers are one word."""
    words = ["0" if word.isdigit() else word for word in _WORD.findall(row.answer)]
    return {*words, *(f"{first} {second}" for first, second in pairwise(words))} - {"0"}


def _causes(term: str, value: np.ndarray, columns: dict[str, np.ndarray]) -> list[Cause]:
    """Forward selection of what explains the term's change. `value` and columns are [2, P, G]."""
    rise = float(value[1].mean() - value[0].mean())
    if abs(rise) < 1e-9:
        return []
    pool = {name: column for name, column in columns.items() if _has_moved(column)}
    if term == RIGHT:
        pool.pop(RIGHT, None)
    definition = DEFINED.get(term, RIGHT)
    chosen: list[str] = [definition] if definition in pool else []
    while len(chosen) < CAUSES:
        best, worth = None, 0.0
        for name in [name for name in pool if _is_new(pool[name], [pool[other] for other in chosen])]:
            coefficients, errors = _fit(value, [pool[other] for other in (*chosen, name)])
            part = float(coefficients[-1] * (pool[name][1].mean() - pool[name][0].mean()))
            weight = part / rise * (PLAINER if name.startswith('writes "') else 1.0)
            if abs(coefficients[-1]) > EARNS * errors[-1] and weight > max(COUNTS, worth):
                best, worth = name, weight
        if best is None:
            break
        chosen.append(best)
    if not chosen:
        return []
    parts = [pool[name] for name in chosen]
    coefficients, _ = _fit(value, parts)
    spread = _resampled(value, parts)
    causes = []
    for i, name in enumerate(chosen):
        first, last = (float(parts[i][side].mean()) for side in (0, 1))
        part = float(coefficients[i]) * (last - first)
        low, high = (float(end) for end in np.quantile(spread[:, i], [0.025, 0.975]))
        low, high = widened(part, low, high, value.shape[1])
        causes.append(Cause(term, name, first, last, float(coefficients[i]), part, low, high))
    return [cause for cause in causes if cause.part / rise > COUNTS]


def _has_moved(column: np.ndarray) -> bool:
    change = column.mean(2)[1] - column.mean(2)[0]
    error = change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.inf
    return abs(change.mean()) > CHANGED * error and abs(change.mean()) > 1e-9


def _inside(values: np.ndarray) -> np.ndarray:
    """Deviations from the mean of a group, [2 P G]."""
    return (values - values.mean(2, keepdims=True)).reshape(-1)


def _is_new(column: np.ndarray, chosen: Sequence[np.ndarray]) -> bool:
    """Whether a column holds more than a combination of the chosen ones."""
    if not chosen:
        return True
    coefficients, _ = _fit(column, chosen)
    y = _inside(column)
    residual = y - np.stack([_inside(part) for part in chosen], 1) @ coefficients
    return float(residual @ residual) > OWN * float(y @ y)


def _fit(value: np.ndarray, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Least squares within groups: coefficients and their standard errors."""
    y, x = _inside(value), np.stack([_inside(part) for part in parts], 1)
    square = x.T @ x + 1e-9 * np.eye(len(parts))
    coefficients = np.linalg.solve(square, x.T @ y)
    residual = y - x @ coefficients
    freedom = max(1, y.size - 2 * value.shape[1] - len(parts))
    return coefficients, np.sqrt(np.diag(np.linalg.inv(square)) * (residual @ residual) / freedom)


def _resampled(value: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Bootstrap over problems: each part's share of the rise, [RESAMPLES, parts]."""
    y = (value - value.mean(2, keepdims=True)).transpose(1, 0, 2).reshape(value.shape[1], -1)
    x = np.stack([(p - p.mean(2, keepdims=True)).transpose(1, 0, 2).reshape(p.shape[1], -1) for p in parts], 2)
    square, cross = np.einsum("pni,pnj->pij", x, x), np.einsum("pni,pn->pi", x, y)
    change = np.stack([p.mean(2)[1] - p.mean(2)[0] for p in parts], 1)
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(y), size=len(y))
        total = square[drawn].sum(0) + 1e-9 * np.eye(len(parts))
        samples.append(np.linalg.solve(total, cross[drawn].sum(0)) * change[drawn].mean(0))
    return np.array(samples)


def _interval(total: np.ndarray, change: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean change, over problems."""
    low, high = widened(*bootstrap(list(change)), len(change))
    span = float(np.ptp(total))
    if span and ((change != 0).sum() < FEW or high - low < 1e-9):  # resampling sees too little spread
        before, after = (total.mean((1, 2)) - total.min()) / span
        apart = shares_apart(float(after), float(before), len(change))
        low, high = min(low, span * apart.low), max(high, span * apart.high)
    return low, high


def _stack(sides: Sequence[Sequence[Group]], read: Callable[[ScoredSample], float]) -> np.ndarray:
    return np.array([[[read(row) for row in group] for group in side] for side in sides], dtype=np.float64)


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])
