"""The gate of a micro-batch: scores, choice, gates and balance term in one pass (`model.gate`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.kernels.library import DTYPES, call, fits, threads

BLOCK = 512
"""Tokens per backward task; each task has its own [E, D] slice of `partial`."""
TOKENS = 64
"""Tokens that the kernel processes at once. Scores, which only the kernel reads, are [N / TOKENS, E, TOKENS]."""
MOST = 64
"""The most experts per token, and rated experts per group, that the kernel can handle."""


class Rule(NamedTuple):
    """How experts are chosen and weighted; see `cpp/gate.hpp`."""

    n_experts: int
    n_activated: int
    n_groups: int
    n_limited: int
    n_rated: int
    softmax: bool
    normalise: bool
    scale: float


RULE = "iiiiiiif"


def serves(x_ND: Tensor, weight_ED: Tensor, rule: Rule) -> bool:
    return (
        fits(x_ND)
        and x_ND.is_contiguous()
        and x_ND.numel() > 0
        and weight_ED.dtype == torch.float32
        and weight_ED.is_contiguous()
        and max(rule.n_activated, rule.n_rated) <= MOST
    )


def forward(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """(experts [N, K] int64, gates [N, K] float32, scores for `balance` and `backward`). Entries of choice_NK (int64)
    that are at least 0 override the gate's choice."""
    N, D = x_ND.shape
    expert_NK = torch.empty(N, rule.n_activated, dtype=torch.int64)
    weight_NK, score = torch.empty(N, rule.n_activated), torch.empty(-(-N // TOKENS), rule.n_experts, TOKENS)
    call(
        f"gate_{DTYPES[x_ND.dtype]}", f"pppppppii{RULE}i",
        x_ND, weight_ED, bias_E, choice_NK, expert_NK, weight_NK, score, N, D, *rule, threads(),
    )  # fmt: skip
    return expert_NK, weight_NK, score


def balance(expert_NK: Tensor, score: Tensor, n_sequences: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """(how often each sequence chose each expert [S, E] float32, sum over sequences of sum_i f_i P_i)."""
    count_SE, share_SE = (torch.empty(n_sequences, rule.n_experts) for _ in range(2))
    result, length = torch.empty(()), len(expert_NK) // n_sequences
    call("gate_balance", f"pppppii{RULE}", expert_NK, score, count_SE, share_SE, result, n_sequences, length, *rule)
    return count_SE, result


def backward(
    dweight_NK: Tensor, dbalance: Tensor, x_ND: Tensor, weight_ED: Tensor, expert_NK: Tensor, score: Tensor,
    count_SE: Tensor, rule: Rule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and of the gate's weight."""
    N, D = x_ND.shape
    dx_ND, dweight_ED = torch.empty_like(x_ND), torch.empty_like(weight_ED)
    partial = weight_ED.new_empty(-(-N // BLOCK), *weight_ED.shape)
    call(
        f"gate_backward_{DTYPES[x_ND.dtype]}", f"ppppppppppiii{RULE}i",
        dweight_NK, dbalance, x_ND, weight_ED, expert_NK, score, count_SE, dx_ND, dweight_ED, partial,
        N, D, len(count_SE), *rule, threads(),
    )  # fmt: skip
    return dx_ND, dweight_ED
