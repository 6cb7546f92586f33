"""Group-relative advantages (DeepSeekMath 4.1, R1 2.2.1): a sample is judged against the others of its prompt.

    A_i = (r_i - mean(r)) / std(r)

The reports do not say which std; the population std is used. A group of equal rewards teaches nothing: A = 0.
"""

from __future__ import annotations

from torch import Tensor

from bessemer.errors import UserError

EPSILON = 1e-6
"""Guard of the division (value undocumented)."""


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
    """Share of groups without any difference to learn from."""
    return (reward_PG == reward_PG[:, :1]).all(1).float().mean().item()
