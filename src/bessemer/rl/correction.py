"""Importance weights for samples that another policy drew: a sampler with other rounding, or an older policy.

    rho_t = pi(o_t) / pi_sampler(o_t)          of a token, pi the trainer's policy before the rollout's first update
    rho_i = prod_t rho_t                       of an output

    token-truncate       min(rho_t, C)                     truncated importance sampling (TIS)
    token-mask           rho_t if rho_t <= C else 0        what is too unlikely to be the policy's own is left out
    sequence-truncate    min(rho_i, C)
    sequence-mask        rho_i if rho_i <= C else 0

The weight multiplies what a token contributes to the objective, the divergence from the reference excepted. Only the
weight of whole outputs is unbiased where nothing is cut: a token's own weight leaves out how likely the tokens before
it were. It varies less, and with small gaps the bias is small. A cut trades variance for bias in both.

`log_ratio_N` is log rho_t, one number per token; `output_N` says which output a token belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.rl.surrogates import LOG_RATIO_LIMIT


class Correction(NamedTuple):
    """Per token; no gradient."""

    weight: Tensor
    cut: Tensor
    """1 where the cap binds."""


def token_truncate(log_ratio_N: Tensor, output_N: Tensor, cap: float) -> Correction:
    return _truncate(_ratio(log_ratio_N), cap)


def token_mask(log_ratio_N: Tensor, output_N: Tensor, cap: float) -> Correction:
    return _mask(_ratio(log_ratio_N), cap)


def sequence_truncate(log_ratio_N: Tensor, output_N: Tensor, cap: float) -> Correction:
    return _truncate(_ratio(_of_outputs(log_ratio_N, output_N)), cap)


def sequence_mask(log_ratio_N: Tensor, output_N: Tensor, cap: float) -> Correction:
    return _mask(_ratio(_of_outputs(log_ratio_N, output_N)), cap)


CORRECTIONS: dict[str, Callable[[Tensor, Tensor, float], Correction]] = {
    "token-truncate": token_truncate, "token-mask": token_mask,
    "sequence-truncate": sequence_truncate, "sequence-mask": sequence_mask,
}  # fmt: skip


def _of_outputs(log_ratio_N: Tensor, output_N: Tensor) -> Tensor:
    """The sum over its output, for every token."""
    outputs, index_N = output_N.unique(return_inverse=True)
    return log_ratio_N.new_zeros(outputs.numel()).index_add(0, index_N, log_ratio_N)[index_N]


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.detach().clamp(max=LOG_RATIO_LIMIT).exp()


def _truncate(ratio: Tensor, cap: float) -> Correction:
    return Correction(ratio.clamp(max=cap), (ratio > cap).float())


def _mask(ratio: Tensor, cap: float) -> Correction:
    cut = ratio > cap
    return Correction(torch.where(cut, 0.0, ratio), cut.float())
