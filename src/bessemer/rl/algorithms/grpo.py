"""GRPO (DeepSeekMath 4.1, R1 2.2.1): a sample is compared with the others of its prompt, and PPO's clip bounds the
update.

    A_i = (r_i - mean(r)) / std(r)        value = min(rho A, clip(rho, 1 - low, 1 + high) A),   rho = pi / pi_old

The reports do not say which std; the population std is used. A group of equal rewards teaches nothing: A = 0. Dr. GRPO
is `scale_by_std = false` with `normalise = "constant"`; DAPO clips higher above 1 than below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bessemer.errors import UserError
from bessemer.plugins import register
from bessemer.rl.algorithms.base import Surrogate, exp, pessimistic
from bessemer.rl.rollout import Group

Clip = Annotated[float, Field(gt=0)]
EPSILON = 1e-6
"""Guards the division; the reports give no value."""


@register("advantages", "group")
def group(rewards_PG: Tensor, groups: Sequence[Group], *, scale_by_std: bool = True) -> Tensor:
    return compared(rewards_PG, scale_by_std, sound(groups))


@register("losses", "grpo")
def grpo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, *, clip_low: Clip = 0.2,
    clip_high: Clip = 0.28,
) -> Surrogate:  # fmt: skip
    return pessimistic(exp(logp_N - old_logp_N), advantage_N, clip_low, clip_high)


def sound(groups: Sequence[Group]) -> Tensor:
    """[P, G]: false for episodes whose environment failed, which count for nobody."""
    return torch.tensor([[not row.failure for row in group] for group in groups])


def compared(reward_PG: Tensor, scale_by_std: bool = True, sound_PG: Tensor | None = None) -> Tensor:
    """How far each reward is from the mean of its row, [P, G]; only samples of `sound_PG` (default: all) are compared,
    the others get 0."""
    if reward_PG.dim() != 2 or reward_PG.shape[1] < 2:
        raise UserError(f"a group needs at least 2 samples to compare, got rewards of shape {tuple(reward_PG.shape)}")
    sound = torch.ones_like(reward_PG).double() if sound_PG is None else sound_PG.double()
    count = sound.sum(1, keepdim=True).clamp(min=1)
    centred = sound * (reward_PG - (sound * reward_PG).sum(1, keepdim=True) / count)
    if scale_by_std:
        std = (centred.square().sum(1, keepdim=True) / count).sqrt()
        centred = centred / (std + EPSILON)
    return centred.float()
