"""The loss "off-policy-mask": GRPO's, without the outputs that the policy has already left (DeepSeek-V3.2 3.1).

An output counts nothing if its advantage is negative and its mean of log(pi_old / pi) over tokens exceeds `limit`.
Pushing down what the policy has already moved away from only does harm.

    loss = { name = "off-policy-mask", limit = 0.02 }
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bessemer.rl.algorithms.base import Surrogate, output_index
from bessemer.rl.algorithms.grpo import Clip, grpo


def off_policy_mask(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, *,
    limit: Annotated[float, Field(gt=0)] = 0.02, clip_low: Clip = 0.2, clip_high: Clip = 0.28,
) -> Surrogate:  # fmt: skip
    """Masked tokens have no gradient, so they count as clipped."""
    terms = grpo(logp_N, old_logp_N, advantage_N, output_N, clip_low=clip_low, clip_high=clip_high)
    index_N, left_N = output_index(output_N), old_logp_N - logp_N.detach()
    zero_N = torch.zeros_like(left_N)
    count_N = zero_N.index_add(0, index_N, torch.ones_like(left_N)).clamp(min=1)
    mean_N = (zero_N.index_add(0, index_N, left_N) / count_N)[index_N]
    masked_N = ((advantage_N < 0) & (mean_N > limit)).to(left_N.dtype)
    return Surrogate(terms.value * (1.0 - masked_N), torch.maximum(terms.clipped, masked_N), terms.ratio)
