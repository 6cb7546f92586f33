"""The gate of a micro-batch: scores, choice, gates and balance term in one pass (`model.gate`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.kernels.library import DTYPES, call, fits, threads
from bessemer.model.config import ModelConfig

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

    @classmethod
    def of(cls, cfg: ModelConfig) -> Rule:
        grouped = cfg.topk_method != "greedy" and cfg.n_expert_groups > 1
        return cls(
            cfg.n_routed_experts, cfg.n_activated_experts, cfg.n_expert_groups if grouped else 1, cfg.n_limited_groups,
            cfg.n_rated_experts, cfg.score_func == "softmax", cfg.norm_topk_prob, cfg.route_scale,
        )  # fmt: skip


RULE = "iiiiiiif"


def serves(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, n_sequences: int,
    cfg: ModelConfig, counting: bool, sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> bool:  # fmt: skip
    return (
        sum_counts is None
        and fits(x_ND)
        and x_ND.is_contiguous()
        and x_ND.numel() > 0
        and weight_ED.dtype == torch.float32
        and weight_ED.is_contiguous()
        and max(cfg.n_activated_experts, cfg.n_rated_experts) <= MOST
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


def routing(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, n_sequences: int,
    cfg: ModelConfig, counting: bool, sum_counts: None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`model.gate.routing`."""
    choice_NK = None if choice_NK is None else choice_NK.long().contiguous()
    arguments = x_ND, weight_ED, bias_E, choice_NK
    if not torch.is_grad_enabled():
        expert_NK, weight_NK, _ = forward(*arguments, Rule.of(cfg))
        return expert_NK, weight_NK, x_ND.new_zeros((), dtype=torch.float32), None
    return _Routing.apply(*arguments, n_sequences, Rule.of(cfg), counting)


class _Routing(torch.autograd.Function):
    """(experts, gates, balance term, selections of each sequence); the last two are 0 unless `counting`."""

    @staticmethod
    def forward(ctx, x_ND, weight_ED, bias_E, choice_NK, n_sequences, rule, counting):
        expert_NK, weight_NK, score = forward(x_ND, weight_ED, bias_E, choice_NK, rule)
        if counting:
            count_SE, term = balance(expert_NK, score, n_sequences, rule)
        else:
            count_SE, term = weight_NK.new_zeros(n_sequences, rule.n_experts), weight_NK.new_zeros(())
        ctx.save_for_backward(x_ND, weight_ED, expert_NK, score, count_SE)
        ctx.rule = rule
        ctx.mark_non_differentiable(expert_NK, count_SE)
        return expert_NK, weight_NK, term, count_SE

    @staticmethod
    @once_differentiable
    def backward(ctx, _expert, dweight_NK, dbalance, _count):
        dx_ND, dweight_ED = backward(dweight_NK.contiguous(), dbalance, *ctx.saved_tensors, ctx.rule)
        return dx_ND, dweight_ED, None, None, None, None, None
