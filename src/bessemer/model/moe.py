"""DeepSeekMoE (MoE 3, V3 2.1.2): shared and fine-grained routed experts, auxiliary-loss-free balancing.

The bias b takes part in the choice of experts only; gates are made from unbiased scores. Excluded groups are masked
with -inf (0 would let an excluded expert win when biases are negative). No token is ever dropped.

A caller may pass the gate a choice made elsewhere (RL: the sampler's). Gate weights still come from the scores of this
pass, so gradient reaches the router.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert inner width, M = N*K routed rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.model import fp8
from bessemer.model.config import ModelConfig
from bessemer.model.experts import expert_ffn
from bessemer.precision.fp8_linear import FP8Recipe
from bessemer.precision.operand import Operand

EXPERTS = ".experts."
"""Part of the name of every tensor that has one row per routed expert."""

_COUNTING = Lock()
"""Micro-batches may run concurrently in threads; their counts must not be lost."""


class Routing(NamedTuple):
    """Decision of the gate for N tokens."""

    expert_NK: Tensor
    """Chosen experts, int64."""
    weight_NK: Tensor
    """Their gates g, float32; gradient flows through them."""
    balance: Tensor
    """Sum over sequences of sum_i f_i P_i, scalar (V3 eq. 17-20, alpha not applied)."""


class Dispatched(NamedTuple):
    """Routed rows in expert order."""

    rows_MD: Tensor
    weight_M: Tensor
    count_E: Tensor
    """Rows per expert, int64."""
    slot_NK: Tensor
    """Row of each (token, choice)."""
    operand: Operand | None = None
    """The rows in FP8 training. `rows_MD` is then a tensor without memory that only carries the gradient back."""


class Gate(nn.Module):
    """Affinity of tokens to experts and the choice of K of them."""

    bias_E: Tensor | None
    load_E: Tensor

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.dim, dtype=torch.float32))  # e_i
        if cfg.topk_method == "noaux_tc":
            self.register_buffer("bias_E", torch.zeros(cfg.n_routed_experts, dtype=torch.float32))
        else:
            self.bias_E = None
        # Tokens per expert since the trainer last read it; the trainer sums over ranks and clears it.
        self.register_buffer("load_E", torch.zeros(cfg.n_routed_experts, dtype=torch.float32), persistent=False)
        self.sum_counts: Callable[[Tensor], Tensor] | None = None
        """[S, E] of this rank's pieces of sequences -> of the whole sequences; None if sequences are not split."""

    def scores(self, x_ND: Tensor) -> Tensor:
        """s_i in float32, [N, E]."""
        logits = F.linear(x_ND.float(), self.weight)
        return logits.sigmoid() if self.cfg.score_func == "sigmoid" else logits.softmax(-1)

    def choose(self, score_NE: Tensor) -> Tensor:
        """Experts of each token, [N, K]."""
        cfg = self.cfg
        z_NE = score_NE.detach()
        if self.bias_E is not None:
            z_NE = z_NE + self.bias_E
        if cfg.topk_method != "greedy" and cfg.n_expert_groups > 1:
            z_NGE = z_NE.unflatten(-1, (cfg.n_expert_groups, -1))
            rating_NG = z_NGE.topk(cfg.n_rated_experts, dim=-1).values.sum(-1)
            keep = rating_NG.topk(cfg.n_limited_groups, dim=-1).indices
            excluded_NG = torch.ones_like(rating_NG, dtype=torch.bool).scatter_(-1, keep, False)
            z_NE = z_NGE.masked_fill(excluded_NG.unsqueeze(-1), float("-inf")).flatten(-2)
        return z_NE.topk(cfg.n_activated_experts, dim=-1).indices

    def forward(self, x_ND: Tensor, n_sequences: int, choice_NK: Tensor | None = None) -> Routing:
        """Routes N = n_sequences * T tokens. Entries of `choice_NK` that are at least 0 override the gate's choice."""
        cfg = self.cfg
        score_NE = self.scores(x_ND)
        expert_NK = self.choose(score_NE)
        if choice_NK is not None:
            expert_NK = torch.where(choice_NK < 0, expert_NK, choice_NK.long())
        weight_NK = score_NE.gather(-1, expert_NK)
        if cfg.norm_topk_prob:
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        weight_NK = weight_NK * cfg.route_scale
        balance = score_NE.new_zeros(())
        if self.training and torch.is_grad_enabled():
            count_SE = selections(expert_NK, n_sequences, cfg.n_routed_experts)
            with _COUNTING:
                self.load_E += count_SE.sum(0)
            total_SE = None if self.sum_counts is None else self.sum_counts(count_SE)
            balance = sequence_balance(score_NE, count_SE, cfg.n_activated_experts, total_SE)
        return Routing(expert_NK, weight_NK, balance)


def selections(expert_NK: Tensor, n_sequences: int, n_experts: int) -> Tensor:
    """How often each sequence chose each expert, [S, E], float32, no gradient."""
    chosen_SX = expert_NK.view(n_sequences, -1)
    ones = torch.ones_like(chosen_SX, dtype=torch.float32)
    return torch.zeros(n_sequences, n_experts, device=expert_NK.device).scatter_add_(1, chosen_SX, ones)


def sequence_balance(score_NE: Tensor, count_SE: Tensor, n_activated: int, total_SE: Tensor | None = None) -> Tensor:
    """Sum over sequences of sum_i f_i P_i (V3 eq. 17-20); equals the number of sequences when balanced.

    f_i = E / (K T) * selections, without gradient; P_i = mean over the sequence of scores normalised over experts.
    Where sequences are split over ranks and `total_SE` holds the selections of all pieces, this piece's addend.
    """
    n_sequences, n_experts = count_SE.shape
    share_STE = (score_NE / score_NE.sum(-1, keepdim=True)).view(n_sequences, -1, n_experts)
    if total_SE is not None:
        T_S1 = total_SE.sum(1, keepdim=True) / n_activated
        return (total_SE * (n_experts / n_activated) / T_S1 * (share_STE.sum(1) / T_S1)).sum()
    T = share_STE.shape[1]
    f_SE = count_SE * (n_experts / (n_activated * T))
    return (f_SE * share_STE.mean(1)).sum()


def dispatch(x_ND: Tensor, routing: Routing, n_experts: int, recipe: FP8Recipe | None = None) -> Dispatched:
    """Copies each token once per chosen expert, sorted by expert (ties in token order); with a recipe in FP8."""
    N, K = routing.expert_NK.shape
    expert_M, order_M = routing.expert_NK.flatten().sort(stable=True)
    slot_M = torch.empty_like(order_M)
    slot_M[order_M] = torch.arange(N * K, device=order_M.device)
    count_E = torch.bincount(expert_M, minlength=n_experts)
    token_M, weight_M, slot_NK = order_M // K, routing.weight_NK.flatten()[order_M], slot_M.view(N, K)
    if recipe is not None:
        rows_MD, operand = fp8.send(x_ND, token_M, recipe)
        return Dispatched(rows_MD, weight_M, count_E, slot_NK, operand)
    return Dispatched(x_ND.index_select(0, token_M), weight_M, count_E, slot_NK)


def combine(rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
    """Sums the K weighted expert outputs of every token, [N, D]."""
    N, K = slot_NK.shape
    return rows_MD.index_select(0, slot_NK.flatten()).view(N, K, -1).sum(1)


class Experts(nn.Module):
    """The routed experts of one layer, stacked: w13 [E, 2F, D] (gate rows, then up rows), w2 [E, D, F]."""

    fp8: FP8Recipe | None = None

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        E, D, inner = cfg.n_routed_experts, cfg.dim, cfg.moe_inter_dim
        self.w13 = nn.Parameter(torch.empty(E, 2 * inner, D))
        self.w2 = nn.Parameter(torch.empty(E, D, inner))

    def forward(self, sent: Dispatched) -> Tensor:
        """weight * W_2 (silu(W_1 x) * W_3 x) for rows in expert order, [M, D]."""
        if sent.operand is not None:
            assert self.fp8 is not None
            return fp8.expert_swiglu(
                sent.rows_MD, sent.operand, self.w13, self.w2, self.fp8, sent.weight_M, sent.count_E.tolist()
            )
        return expert_ffn(sent.rows_MD, sent.weight_M, sent.count_E, self.w13, self.w2)


class FFN(nn.Module):
    """SwiGLU: W_2 (silu(W_1 x) * (W_3 x)), with W_1 and W_3 stacked in w13. Dense layers and shared experts."""

    fp8: FP8Recipe | None = None

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None and self.training:
            return fp8.swiglu(x, self.w13.weight, self.w2.weight, self.fp8)
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class MoE(nn.Module):
    """Gate, routed experts and shared expert of one layer."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        self.shared = FFN(cfg.dim, cfg.n_shared_experts * cfg.moe_inter_dim) if cfg.n_shared_experts else None
