"""The gate (MoE 3, V3 2.1.2): the experts and weights of each token, with auxiliary-loss-free balancing.

The bias b affects only the choice of experts; gates come from unbiased scores. Excluded groups are masked with -inf (0
would let an excluded expert win when biases are negative).

A caller may pass in a choice made elsewhere (in RL, by the sampler). Gate weights still come from the scores of this
pass, so the gradient reaches the router.

`routing` is the equation and `Gate` the module, which owns the weight, the bias and the counts.

Shapes: N tokens, S sequences of T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.ops import operation

_COUNTING = Lock()
"""Micro-batches may run concurrently in threads; no count may be lost."""


class Routing(NamedTuple):
    """The gate's decision for N tokens."""

    expert_NK: Tensor
    """Chosen experts, int64."""
    weight_NK: Tensor
    """Their gates g, float32; gradient flows through them."""
    balance: Tensor
    """Sum over sequences of sum_i f_i P_i, scalar (V3 eq. 17-20, alpha not applied)."""


class Gate(nn.Module):
    """Scores every token against the experts and chooses K of them."""

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
        self.counted_BT: Tensor | None = None
        """Which tokens of the next forward pass count in the loads, [B, T]; None: all."""
        self.sum_counts: Callable[[Tensor], Tensor] | None = None
        """Maps counts [S, E] of this rank's pieces of sequences to those of whole sequences; None if none are split."""

    def scores(self, x_ND: Tensor) -> Tensor:
        """Affinity s_i of each token to each expert, float32 [N, E]."""
        return scores(x_ND, self.weight, self.cfg)

    def choose(self, score_NE: Tensor) -> Tensor:
        """Experts of each token by biased score, from its best groups only, [N, K]."""
        return choose(score_NE, self.bias_E, self.cfg)

    def forward(self, x_ND: Tensor, n_sequences: int, choice_NK: Tensor | None = None) -> Routing:
        """Routes N = n_sequences * T tokens. Entries of `choice_NK` that are at least 0 override the gate's choice."""
        counting = self.training and torch.is_grad_enabled()
        expert_NK, weight_NK, balance, count_SE = routing(
            x_ND, self.weight, self.bias_E, choice_NK, n_sequences, self.cfg, counting, self.sum_counts
        )
        if counting:
            assert count_SE is not None
            # a lock would break a compiled graph, whose kernels run in the order of their stream
            with nullcontext() if torch.compiler.is_compiling() else _COUNTING:
                self.load_E += self._counted(expert_NK, count_SE)
        return Routing(expert_NK, weight_NK, balance)

    def _counted(self, expert_NK: Tensor, count_SE: Tensor) -> Tensor:
        """The load of a forward pass, [E]."""
        if self.counted_BT is None:
            return count_SE.sum(0)
        counts_X = self.counted_BT.flatten().float().repeat_interleave(expert_NK.shape[1])
        return torch.zeros_like(self.load_E).scatter_add_(0, expert_NK.flatten(), counts_X)


def scores(x_ND: Tensor, weight_ED: Tensor, cfg: ModelConfig) -> Tensor:
    """`Gate.scores`."""
    logits = F.linear(x_ND.to(weight_ED.dtype), weight_ED)
    return logits.sigmoid() if cfg.score_func == "sigmoid" else logits.softmax(-1)


def choose(score_NE: Tensor, bias_E: Tensor | None, cfg: ModelConfig) -> Tensor:
    """`Gate.choose`."""
    z_NE = score_NE.detach()
    if bias_E is not None:
        z_NE = z_NE + bias_E
    if cfg.topk_method != "greedy" and cfg.n_expert_groups > 1:
        z_NGE = z_NE.unflatten(-1, (cfg.n_expert_groups, -1))
        rating_NG = z_NGE.topk(cfg.n_rated_experts, dim=-1).values.sum(-1)
        keep = rating_NG.topk(cfg.n_limited_groups, dim=-1).indices
        excluded_NG = torch.ones_like(rating_NG, dtype=torch.bool).scatter_(-1, keep, False)
        z_NE = z_NGE.masked_fill(excluded_NG.unsqueeze(-1), float("-inf")).flatten(-2)
    return z_NE.topk(cfg.n_activated_experts, dim=-1).indices


@operation
def routing(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, n_sequences: int,
    cfg: ModelConfig, counting: bool, sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(experts [N, K], gates [N, K], balance term, selections of each sequence [S, E]); the term is 0 and the
    selections may be None unless `counting`. `choice_NK` and `sum_counts` are as in `Gate`."""
    score_NE = scores(x_ND, weight_ED, cfg)
    expert_NK = choose(score_NE, bias_E, cfg)
    if choice_NK is not None:
        expert_NK = torch.where(choice_NK < 0, expert_NK, choice_NK.long())
    weight_NK = score_NE.gather(-1, expert_NK)
    if cfg.norm_topk_prob:
        weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
    weight_NK = weight_NK * cfg.route_scale
    if not counting:
        return expert_NK, weight_NK, score_NE.new_zeros(()), None
    count_SE = selections(expert_NK, n_sequences, cfg.n_routed_experts)
    total_SE = None if sum_counts is None else sum_counts(count_SE)
    balance = sequence_balance(score_NE, count_SE, cfg.n_activated_experts, total_SE)
    return expert_NK, weight_NK, balance, count_SE


def selections(expert_NK: Tensor, n_sequences: int, n_experts: int) -> Tensor:
    """How often each sequence chose each expert, [S, E], float32, no gradient."""
    chosen_SX = expert_NK.view(n_sequences, -1)
    ones = torch.ones_like(chosen_SX, dtype=torch.float32)
    return torch.zeros(n_sequences, n_experts, device=expert_NK.device).scatter_add_(1, chosen_SX, ones)


def sequence_balance(score_NE: Tensor, count_SE: Tensor, n_activated: int, total_SE: Tensor | None = None) -> Tensor:
    """Sum over sequences of sum_i f_i P_i (V3 eq. 17-20), scalar; equals the number of sequences when balanced.

    f_i = E / (K T) * selections, without gradient; P_i = mean over the sequence of scores normalised over experts. The
    selections are those made, as in DeepSeek's published training trace; eq. 18 as printed counts the top K of the
    scores without bias. If sequences are split over ranks, `total_SE` holds the selections of all pieces; the result is
    this piece's addend.
    """
    n_sequences, n_experts = count_SE.shape
    share_STE = (score_NE / score_NE.sum(-1, keepdim=True)).view(n_sequences, -1, n_experts)
    if total_SE is not None:
        T_S1 = total_SE.sum(1, keepdim=True) / n_activated
        return (total_SE * (n_experts / n_activated) / T_S1 * (share_STE.sum(1) / T_S1)).sum()
    T = share_STE.shape[1]
    f_SE = count_SE * (n_experts / (n_activated * T))
    return (f_SE * share_STE.mean(1)).sum()
