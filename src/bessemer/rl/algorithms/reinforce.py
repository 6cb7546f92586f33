"""REINFORCE (Williams 1992): A log pi without a ratio, for one update per rollout. Its usual baseline is the mean
reward of the whole rollout, whatever the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.plugins import register
from bessemer.rl.algorithms.base import Surrogate, exp
from bessemer.rl.algorithms.grpo import compared, sound
from bessemer.rl.rollout import Group


@register("advantages", "batch")
def batch(rewards_PG: Tensor, groups: Sequence[Group], *, scale_by_std: bool = True) -> Tensor:
    together = compared(rewards_PG.reshape(1, -1), scale_by_std, sound(groups).reshape(1, -1))
    return together.view_as(rewards_PG)


batch.within_groups = False  # type: ignore[attr-defined]


@register("losses", "reinforce")
def reinforce(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor) -> Surrogate:
    return Surrogate(advantage_N * logp_N, torch.zeros_like(advantage_N), exp(logp_N - old_logp_N))
