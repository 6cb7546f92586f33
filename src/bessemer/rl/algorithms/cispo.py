"""CISPO (MiniMax-M1, 2025): sg(clip(rho, 1 - low, 1 + high)) A log pi. It clips the weight, so every token keeps its
gradient."""

from __future__ import annotations

from torch import Tensor

from bessemer.plugins import register
from bessemer.rl.algorithms.base import Surrogate, exp
from bessemer.rl.algorithms.grpo import Clip


@register("losses", "cispo")
def cispo(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor, *, clip_low: Clip = 0.2,
    clip_high: Clip = 0.28,
) -> Surrogate:  # fmt: skip
    ratio = exp(logp_N - old_logp_N)
    weight = ratio.detach().clamp(1.0 - clip_low, 1.0 + clip_high)
    return Surrogate(weight * advantage_N * logp_N, (weight != ratio.detach()).float(), ratio)
