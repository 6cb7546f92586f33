"""Rewards of samples: a weighted sum of terms, each a function that a recipe names (R1 2.2.2, 2.3.2, 2.3.4).

    reward = ["accuracy", { name = "format", weight = 0.1 }]        R = R_accuracy + 0.1 R_format

    accuracy    the verdict's score: 1 or 0 or, from a task that gives partial credit, anything between; on a general
                prompt the score of the reward model of its aim
    format      1 in the right form
    language    the share of the thoughts' words in the problem's language

R1 adds the terms with equal weight; R1-Zero has no language term and no general prompts. A term of your own takes a
batch of samples, `def term(samples): ...` with `Samples`, or one, `def term(problem, answer, verdict): ...`, and may be
async. Its keyword arguments are settings.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor

from bessemer import plugins
from bessemer.config.rl import RLConfig
from bessemer.errors import UserError
from bessemer.plugins import register
from bessemer.repeatable import repeatable
from bessemer.rl.rollout import Group, ScoredSample
from bessemer.tasks.base import Problem, Verdict
from bessemer.tasks.language import reply_consistency

FORM = ("format", "language")
"""Terms that say nothing about the answer's content."""
BATCH, SINGLE = "samples", "problem, answer, verdict"
"""The forms of a term."""


class PreferenceScorer(Protocol):
    """A reward model as RL uses it."""

    aim: str
    """The prompts that it judges."""

    def score(self, items: Sequence[tuple[str, str]]) -> list[float]:
        """One number per (prompt, answer), about 0 to 1."""
        ...


@dataclass(frozen=True)
class Samples:
    """A batch of samples as a reward reads them; entry n of every list is sample n."""

    rows: Sequence[ScoredSample]
    """Everything that is known of each."""
    groups: list[int]
    """The number of its problem in the batch, from 0: samples of one problem have one number."""
    step: int
    """Optimizer steps of the policy that wrote them."""

    @property
    def problems(self) -> list[Problem]:
        return [row.problem for row in self.rows]

    @property
    def answers(self) -> list[str]:
        """The whole texts from `<think>` on; of an episode, the last turn."""
        return [row.answer for row in self.rows]

    @property
    def verdicts(self) -> list[Verdict]:
        return [row.verdict for row in self.rows]

    @property
    def tokens(self) -> list[Sequence[int]]:
        """The token ids of the answers."""
        return [row.completion.tokens for row in self.rows]


@register("rewards", "accuracy")
def accuracy(samples: Samples) -> list[float]:
    return [row.verdict.score if row.preference is None else row.preference for row in samples.rows]


@register("rewards", "format")
def form(samples: Samples) -> list[float]:
    return [float(row.verdict.formatted) for row in samples.rows]


@register("rewards", "language")
def language(samples: Samples, *, scope: Literal["thoughts", "reply"] = "thoughts") -> list[float]:
    """`scope` reply: the summary is read, too, and the less consistent of the two counts (for small models, whose
    thoughts are mostly numbers, so a summary in another language would cost nothing)."""
    if scope == "reply":
        return [reply_consistency(row.answer, row.problem.language) for row in samples.rows]
    return [row.language for row in samples.rows]


@dataclass(frozen=True)
class Term:
    """A term of the reward with its weight."""

    name: str
    weight: float
    function: partial[Any]
    """With its settings."""
    single: bool = False
    """Whether it takes one sample at a time."""
    own: bool = False
    """Whether it is not the package's."""
    member: object = None
    """The function itself, for errors."""

    def values(self, samples: Samples, seed: int) -> list[float]:
        """One number per sample. `seed` decides what the function draws from the global generators."""
        if not self.own:
            return self.function(samples)
        if self.single:
            values = [self._single(row, number, seed) for number, row in enumerate(samples.rows)]
        else:
            with repeatable("reward", seed):
                values = _awaited(self.function(samples))
        try:
            numbers = [float(value) for value in values]
            if len(numbers) != len(samples.rows):
                raise ValueError(f"{len(numbers)} numbers for {len(samples.rows)} samples")
            for row, number in zip(samples.rows, numbers, strict=True):
                if not math.isfinite(number):
                    raise ValueError(f"{number} for a sample of problem {row.problem.id}")
        except (TypeError, ValueError, OverflowError) as error:
            form = "a number" if self.single else "a list of one number per sample"
            raise UserError(
                f"{plugins.where(self.name, self.member)} returned something else ({error}); return {form}"
            ) from None
        return numbers

    def _single(self, row: ScoredSample, number: int, seed: int) -> Any:
        with repeatable("reward", seed, row.problem.id, number):
            return _awaited(self.function(row.problem, row.answer, row.verdict))


def _awaited(value: Any) -> Any:
    return asyncio.run(value) if inspect.iscoroutine(value) else value


@dataclass(frozen=True)
class Reward:
    terms: tuple[Term, ...]

    @classmethod
    def of_config(cls, config: RLConfig) -> Reward:
        """The reward of a stage. UserError for a term that does not exist, or has other settings."""
        terms = []
        for table in config.reward:
            member, single = _term(table.name)
            plugins.check_settings("rewards", table.name, member, table.settings, config.name)
            own = not plugins.is_built_in("rewards", table.name)
            terms.append(Term(table.name, table.weight, partial(member, **table.settings), single, own, member))
        return cls(tuple(terms))

    @staticmethod
    def set_preferences(groups: Sequence[Group], reward_models: Mapping[str, PreferenceScorer]) -> None:
        """Sets the preference of every sample whose prompt's aim a reward model is for. Collective: all processes pass
        the same samples."""
        for aim, model in reward_models.items():
            judged = [row for group in groups for row in group if row.problem.meta.get("aim") == aim]
            scores = model.score([(row.problem.prompt, row.answer) for row in judged]) if judged else []
            for row, score in zip(judged, scores, strict=True):
                row.preference = score

    def score(self, groups: Sequence[Group], step: int = 0, seed: int = 0) -> None:
        """Sets the reward of every sample. A sample that failed, by its environment or in a term, gets the mean of its
        group, so that it makes no dead group alive. `step` as in `Samples`; `seed`, the rollout's, as in
        `Term.values`."""
        rows = [row for group in groups for row in group]
        samples = Samples(rows, [number for number, group in enumerate(groups) for _ in group], step)
        values = [term.values(samples, seed) for term in self.terms]
        for row, of_row in zip(rows, zip(*values, strict=True), strict=True):
            row.terms = [term.weight * value for term, value in zip(self.terms, of_row, strict=True)]
            row.reward = sum(row.terms)
            if not math.isfinite(row.reward):
                raise UserError(
                    f"the reward of a sample of problem {row.problem.id} is {row.reward}; "
                    f"its {'verifier' if row.preference is None else 'reward model'} must give a finite number"
                )
        for group in groups:
            sound = [row.reward for row in group if not row.failure]
            for row in group:
                if row.failure:
                    row.reward = sum(sound) / len(sound) if sound else 0.0

    def content(self, row: ScoredSample) -> float:
        """What the answer of a scored sample earns for more than its form and language."""
        return sum(part for term, part in zip(self.terms, row.terms, strict=True) if term.name not in FORM)

    @property
    def own(self) -> bool:
        """Whether a term is not the package's."""
        return any(term.own for term in self.terms)

    @property
    def pays_form(self) -> bool:
        """Whether an answer in another form than the verifier reads loses something for that."""
        return any(term.name in ("accuracy", "format") for term in self.terms)

    @property
    def judges(self) -> set[str]:
        """The aims of general prompts that terms judge in place of reward models: the attribute `judges` of such a term
        takes its settings."""
        judging = [(getattr(term.member, "judges", None), term.function.keywords) for term in self.terms]
        return {aim for judges, settings in judging if judges is not None for aim in judges(settings)}

    def weight(self, name: str) -> float:
        """The weight of a term; 0 if there is none of that name."""
        return sum(term.weight for term in self.terms if term.name == name)


def _term(name: str) -> tuple[Callable[..., Any], bool]:
    """(the function, whether it takes one sample at a time)."""
    member = plugins.find("rewards", name)
    single = False
    if callable(member):
        try:
            kinds = [parameter.kind for parameter in inspect.signature(member).parameters.values()]
            single = inspect.Parameter.VAR_POSITIONAL in kinds or (_POSITIONAL.issuperset(kinds[:3]) and len(kinds) > 2)
        except ValueError:  # a function of C has no signature
            single = True
    return plugins.find("rewards", name, takes=SINGLE if single else BATCH), single


_POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


def dead_groups(reward_PG: Tensor) -> float:
    """Share of groups whose samples all have the same reward."""
    return (reward_PG == reward_PG[:, :1]).all(1).float().mean().item()
