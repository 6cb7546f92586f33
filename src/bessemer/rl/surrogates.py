"""What a token contributes to the policy's objective: GRPO's clip and its relatives, as pure functions.

    grpo        min(rho A, clip(rho, 1 - low, 1 + high) A)              PPO's clip, rho_t = pi(o_t) / pi_old(o_t)
    gspo        the same with s_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|)   one ratio per output (GSPO eq. 5-7)
    cispo       sg(clip(rho, 1 - low, 1 + high)) A log pi(o_t)          the weight is cut, no token's gradient
    reinforce   A log pi(o_t)                                           no ratio: for one update per rollout

Dr. GRPO and DAPO are `grpo` with other dials: Dr. GRPO divides by a constant instead of the length and does not scale
advantages; DAPO counts every token alike, clips higher than lower, resamples dead groups and prices over-long outputs.

All arguments are one number per token, N tokens; `output_N` says which output a token belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""exp() of more than this says nothing but that the policies parted; it keeps ratio and divergence finite."""


class Surrogate(NamedTuple):
    """Per token."""

    value: Tensor
    """What the objective sums; its gradient is the update."""
    clipped: Tensor
    """1 where the clip binds: no gradient (grpo, gspo) or a cut weight (cispo)."""
    ratio: Tensor
    """rho, or s for gspo."""


def grpo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, low: float, high: float
) -> Surrogate:
    return _pessimistic(_exp(logp_N - old_logp_N), advantage_N, low, high)


def gspo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, low: float, high: float
) -> Surrogate:
    """With weights 1/|o| per token this is the paper's mean over outputs. Its clips are small: 3e-4 and 4e-4."""
    outputs, index_N = output_N.unique(return_inverse=True)
    total = logp_N.new_zeros(outputs.numel()).index_add(0, index_N, logp_N - old_logp_N)
    length = index_N.bincount(minlength=outputs.numel())
    return _pessimistic(_exp(total / length)[index_N], advantage_N, low, high)


def cispo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, low: float, high: float
) -> Surrogate:
    ratio = _exp(logp_N - old_logp_N)
    weight = ratio.detach().clamp(1.0 - low, 1.0 + high)
    return Surrogate(weight * advantage_N * logp_N, (weight != ratio.detach()).float(), ratio)


def reinforce(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, low: float, high: float
) -> Surrogate:
    return Surrogate(advantage_N * logp_N, torch.zeros_like(advantage_N), _exp(logp_N - old_logp_N))


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Surrogate]] = {
    "grpo": grpo, "gspo": gspo, "cispo": cispo, "reinforce": reinforce,
}  # fmt: skip


def k3(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """The k3 estimator of KL(pi | pi_ref): pi_ref/pi - log(pi_ref/pi) - 1, never negative."""
    gap = (ref_logp_N - logp_N).clamp(max=LOG_RATIO_LIMIT)
    return gap.exp() - gap - 1.0


def _pessimistic(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Surrogate:
    """PPO's min: moves that went too far are cut, moves back are not."""
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    clipped = (ratio * advantage > bounded * advantage).float()
    return Surrogate(torch.minimum(ratio * advantage, bounded * advantage), clipped, ratio)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()
