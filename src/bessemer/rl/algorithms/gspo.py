"""GSPO (Zheng et al. 2025, eq. 5-7): one ratio per output, s_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|), in place of one per
token. With weights 1/|o| per token this is the paper's mean over outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.plugins import register
from bessemer.rl.algorithms.base import Surrogate, exp, output_index, pessimistic
from bessemer.rl.algorithms.grpo import Clip


@register("losses", "gspo")
def gspo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, *, clip_low: Clip = 3e-4,
    clip_high: Clip = 4e-4,
) -> Surrogate:  # fmt: skip
    index_N = output_index(output_N)
    total = torch.zeros_like(logp_N).index_add(0, index_N, logp_N - old_logp_N)
    length = torch.zeros_like(logp_N).index_add(0, index_N, torch.ones_like(logp_N)).clamp(min=1)
    return pessimistic(exp(total / length)[index_N], advantage_N, clip_low, clip_high)
