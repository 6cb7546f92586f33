"""Group-relative advantages (DeepSeekMath 4.1, R1 2.2.1): a sample is compared with the others of its prompt.

    A_i = (r_i - mean(r)) / std(r)

The reports do not say which std; the population std is used. A group of equal rewards teaches nothing: A = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bessemer.errors import UserError
from bessemer.rl.rollout import Group, rewards

EPSILON = 1e-6
"""Guard of the division (value undocumented)."""


def assign_group_advantages(groups: Sequence[Group], scale_by_std: bool = True) -> None:
    """Sets the advantage of every sample."""
    for group, advantages in zip(groups, group_advantages(rewards(groups), scale_by_std).tolist(), strict=True):
        for sample, advantage in zip(group, advantages, strict=True):
            sample.advantage = advantage


def group_advantages(reward_PG: Tensor, scale_by_std: bool = True) -> Tensor:
    """Advantage of every sample, [P prompts, G samples]; `scale_by_std=False` is Dr. GRPO's form."""
    if reward_PG.dim() != 2 or reward_PG.shape[1] < 2:
        raise UserError(f"a group needs at least 2 samples to compare, got rewards of shape {tuple(reward_PG.shape)}")
    if not reward_PG.isfinite().all():
        bad = (~reward_PG.isfinite()).nonzero()[0].tolist()
        raise UserError(
            f"reward of prompt {bad[0]}, sample {bad[1]} is {reward_PG[tuple(bad)].item()}; fix the verifier"
        )
    centred = reward_PG.double() - reward_PG.double().mean(1, keepdim=True)
    if scale_by_std:
        std = centred.square().mean(1, keepdim=True).sqrt()
        centred = centred / (std + EPSILON)
    return centred.float()


def dead_groups(reward_PG: Tensor) -> float:
    """Share of groups whose samples all have the same reward."""
    return (reward_PG == reward_PG[:, :1]).all(1).float().mean().item()
