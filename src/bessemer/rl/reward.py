"""Rewards of samples (R1 2.2.2, 2.3.2, 2.3.4), and their advantages within a group.

    reasoning   R_accuracy + f R_format + l R_language
    general     p R_preference + f R_format + l R_language      if a reward model serves the prompt's aim

R_accuracy is the verdict's score: 1 or 0 or, from a task that gives partial credit, anything between. A user's own
function may replace it.

R1 adds the terms with equal weight; R1-Zero has no language term and no general prompts. DAPO's soft overlong
punishment (DAPO 3.4) is subtracted. Two other kinds of reward are controls: what a run gains under them was not learnt
from the task.

Group-relative advantages (DeepSeekMath 4.1, R1 2.2.1) compare a sample with the others of its prompt:

    A_i = (r_i - mean(r)) / std(r)

The reports do not say which std; the population std is used. A group of equal rewards teaches nothing: A = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from bessemer.config.rl import RLConfig
from bessemer.errors import UserError
from bessemer.repeatable import repeatable, stable_hash
from bessemer.rl.rollout import Group, ScoredSample, rewards
from bessemer.tasks.readability import reply_consistency
from bessemer.tasks.user_code import RewardFunction, reward_function


class PreferenceScorer(Protocol):
    """A reward model as RL uses it."""

    def score(self, items: Sequence[tuple[str, str]]) -> list[float]:
        """One number per (prompt, answer), about 0 to 1."""
        ...


@dataclass(frozen=True)
class Reward:
    """Weights of the terms. Two controls: `kind` "format" rewards only the format, "random" flips a coin per sample."""

    format: float = 1.0
    language: float = 0.0
    preference: float = 1.0
    overlong: int = 0
    """Tokens before the cap over which the punishment grows from 0 to 1; 0 for none."""
    kind: Literal["task", "format", "random"] = "task"
    function: RewardFunction | None = None
    """The user's own, in place of the accuracy."""
    language_scope: Literal["thoughts", "reply"] = "thoughts"
    """What R_language reads."""

    @classmethod
    def of_config(cls, config: RLConfig) -> Reward:
        own = reward_function(config.reward) if ":" in config.reward else None
        kind = cast(Literal["task", "format", "random"], "task" if own else config.reward)
        terms = config.format_reward, config.language_reward, config.preference_reward
        return cls(*terms, config.overlong, kind, own, config.language_scope)

    def score(
        self,
        groups: Sequence[Group],
        cap: int,
        reward_models: Mapping[str, PreferenceScorer] | None = None,
        seed: int = 0,
    ) -> None:
        """Sets the reward of every sample, and its preference if `reward_models` has one for the prompt's aim. An
        episode whose environment failed gets the mean of its group, so that it makes no dead group alive. `seed`, the
        rollout's, decides what a user's function draws from the global generators."""
        rows = [row for group in groups for row in group]
        for aim, model in (reward_models or {}).items():
            judged = [row for row in rows if row.problem.meta.get("aim") == aim]
            scores = model.score([(row.problem.prompt, row.answer) for row in judged]) if judged else []
            for row, score in zip(judged, scores, strict=True):
                row.preference = score
        for number, row in enumerate(rows):
            row.reward = self.of(row, cap, number, seed)
            if not math.isfinite(row.reward):
                raise UserError(
                    f"the reward of a sample of problem {row.problem.id} is {row.reward}; "
                    + ("its reward model" if row.preference is not None else "its verifier or reward function")
                    + " must give a finite number"
                )
        for group in groups:
            sound = [row.reward for row in group if not row.failure]
            for row in group:
                if row.failure:
                    row.reward = sum(sound) / len(sound) if sound else 0.0

    def of(self, row: ScoredSample, cap: int, number: int = 0, seed: int = 0) -> float:
        """The reward of one sample; `number` is its place in the rollout, for what is drawn at random."""
        if self.kind == "random":
            return float(stable_hash("coin", row.problem.id, number, *row.completion.tokens) & 1)
        verdict = row.verdict
        if self.kind == "format":
            return float(verdict.formatted)
        if row.preference is not None:
            aim = self.preference * row.preference
        elif self.function is not None:
            with repeatable("reward", seed, row.problem.id, number):
                aim = self.function(row.problem, row.answer, verdict)
        else:
            aim = verdict.score
        reward = aim + self.format * float(verdict.formatted) + self.of_language(row)
        return reward - overlong(row.length, cap, self.overlong)

    def beside(self, row: ScoredSample, cap: int) -> float:
        """The terms of form, language and length alone; 0 for the controls, which have no other."""
        if self.kind != "task":
            return 0.0
        form = self.format * float(row.verdict.formatted)
        return form + self.of_language(row) - overlong(row.length, cap, self.overlong)

    def of_language(self, row: ScoredSample) -> float:
        """l R_language of one sample."""
        if self.language and self.language_scope == "reply":
            return self.language * reply_consistency(row.answer, row.problem.language)
        return self.language * row.language

    def passed(self, row: ScoredSample) -> float:
        """How far a scored sample did what this kind of reward asks for, 0 to 1: a right answer, or the credit that its
        task gives; the format; heads."""
        if self.kind == "random":
            return row.reward > 0
        if self.kind == "format":
            return row.verdict.formatted
        return row.verdict.correct if row.verdict.partial is None else row.verdict.partial


def overlong(length: int, cap: int, buffer: int) -> float:
    """DAPO eq. 13: 0 up to cap - buffer tokens, then growing evenly to 1 at the cap."""
    if buffer <= 0:
        return 0.0
    return min(1.0, max(0.0, (length - (cap - buffer)) / buffer))


EPSILON = 1e-6
"""Guards the division; the reports give no value."""


def assign_group_advantages(groups: Sequence[Group], scale_by_std: bool = True, together: bool = False) -> None:
    """Sets the advantage of every sample; `together`: as if all groups were one. Failed episodes count for nobody."""
    reward_PG, sound_PG = rewards(groups), torch.tensor([[not row.failure for row in group] for group in groups])
    shape = (1, -1) if together else reward_PG.shape
    compared = group_advantages(reward_PG.reshape(shape), scale_by_std, sound_PG.reshape(shape))
    advantage_PG = compared.view_as(reward_PG)
    for group, advantages in zip(groups, advantage_PG.tolist(), strict=True):
        for sample, advantage in zip(group, advantages, strict=True):
            sample.advantage = advantage


def group_advantages(reward_PG: Tensor, scale_by_std: bool = True, sound_PG: Tensor | None = None) -> Tensor:
    """Advantage of every sample, [P prompts, G samples]; `scale_by_std=False` is Dr. GRPO's form. Only samples of
    `sound_PG` (default: all) are compared; the others get 0."""
    if reward_PG.dim() != 2 or reward_PG.shape[1] < 2:
        raise UserError(f"a group needs at least 2 samples to compare, got rewards of shape {tuple(reward_PG.shape)}")
    if not reward_PG.isfinite().all():
        bad = (~reward_PG.isfinite()).nonzero()[0].tolist()
        raise UserError(
            f"reward of prompt {bad[0]}, sample {bad[1]} is {reward_PG[tuple(bad)].item()}; fix the verifier"
        )
    sound = torch.ones_like(reward_PG).double() if sound_PG is None else sound_PG.double()
    count = sound.sum(1, keepdim=True).clamp(min=1)
    centred = sound * (reward_PG - (sound * reward_PG).sum(1, keepdim=True) / count)
    if scale_by_std:
        std = (centred.square().sum(1, keepdim=True) / count).sqrt()
        centred = centred / (std + EPSILON)
    return centred.float()


def dead_groups(reward_PG: Tensor) -> float:
    """Share of groups whose samples all have the same reward."""
    return (reward_PG == reward_PG[:, :1]).all(1).float().mean().item()
