"""The gate (MoE 3, V3 2.1.2): the experts and weights of each token, with auxiliary-loss-free balancing.

The bias b affects only the choice of experts; gates come from unbiased scores. Excluded groups are masked with -inf (0
would let an excluded expert win when biases are negative).

A caller may pass in a choice made elsewhere (in RL, by the sampler). Gate weights still come from the scores of this
pass, so the gradient reaches the router.

`Gate.forward` holds the plain version; `kernels.gate` does the same in one pass on a CPU, and `gate_gpu` on a GPU.

Shapes: N tokens, S sequences of T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bessemer.kernels import gate as kernel
from bessemer.model import gate_gpu
from bessemer.model.config import ModelConfig

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
        logits = F.linear(x_ND.float(), self.weight)
        return logits.sigmoid() if self.cfg.score_func == "sigmoid" else logits.softmax(-1)

    def choose(self, score_NE: Tensor) -> Tensor:
        """Experts of each token by biased score, from its best groups only, [N, K]."""
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
        if self.sum_counts is None and kernel.serves(x_ND, self.weight, rule := _rule(cfg)):
            choice_NK = None if choice_NK is None else choice_NK.long().contiguous()
            arguments = x_ND, self.weight, self.bias_E, choice_NK, n_sequences, rule
            if not torch.is_grad_enabled():
                return Routing(*kernel.forward(*arguments[:4], rule)[:2], x_ND.new_zeros((), dtype=torch.float32))
            expert_NK, weight_NK, balance, count_SE = _KernelGate.apply(*arguments, self.training)
            if self.training:
                with _COUNTING:
                    self.load_E += self._counted(expert_NK, count_SE)
            return Routing(expert_NK, weight_NK, balance)
        if self.sum_counts is None and x_ND.device.type in ("cuda", "meta"):
            logit_NE = F.linear(x_ND.float(), self.weight)
            training = self.training and torch.is_grad_enabled()
            expert_NK, weight_NK, balance, count_SE = gate_gpu.choose(
                logit_NE, self.bias_E, choice_NK, n_sequences, *_rule(cfg), training
            )
            if training:  # one kernel, ordered by its stream; a lock would break the compiler's graph
                self.load_E += self._counted(expert_NK, count_SE.detach())
            return Routing(expert_NK, weight_NK, balance)
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
                self.load_E += self._counted(expert_NK, count_SE)
            total_SE = None if self.sum_counts is None else self.sum_counts(count_SE)
            balance = sequence_balance(score_NE, count_SE, cfg.n_activated_experts, total_SE)
        return Routing(expert_NK, weight_NK, balance)

    def _counted(self, expert_NK: Tensor, count_SE: Tensor) -> Tensor:
        """The load of a forward pass, [E]."""
        if self.counted_BT is None:
            return count_SE.sum(0)
        counts_X = self.counted_BT.flatten().float().repeat_interleave(expert_NK.shape[1])
        return torch.zeros_like(self.load_E).scatter_add_(0, expert_NK.flatten(), counts_X)


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


def _rule(cfg: ModelConfig) -> kernel.Rule:
    grouped = cfg.topk_method != "greedy" and cfg.n_expert_groups > 1
    return kernel.Rule(
        cfg.n_routed_experts, cfg.n_activated_experts, cfg.n_expert_groups if grouped else 1, cfg.n_limited_groups,
        cfg.n_rated_experts, cfg.score_func == "softmax", cfg.norm_topk_prob, cfg.route_scale,
    )  # fmt: skip


class _KernelGate(torch.autograd.Function):
    """(experts, gates, balance term, selections of each sequence); the last two are 0 unless training."""

    @staticmethod
    def forward(ctx, x_ND, weight_ED, bias_E, choice_NK, n_sequences, rule, training):
        expert_NK, weight_NK, score = kernel.forward(x_ND, weight_ED, bias_E, choice_NK, rule)
        if training:
            count_SE, balance = kernel.balance(expert_NK, score, n_sequences, rule)
        else:
            count_SE, balance = weight_NK.new_zeros(n_sequences, rule.n_experts), weight_NK.new_zeros(())
        ctx.save_for_backward(x_ND, weight_ED, expert_NK, score, count_SE)
        ctx.rule = rule
        ctx.mark_non_differentiable(expert_NK, count_SE)
        return expert_NK, weight_NK, balance, count_SE

    @staticmethod
    @once_differentiable
    def backward(ctx, _expert, dweight_NK, dbalance, _count):
        dx_ND, dweight_ED = kernel.backward(dweight_NK.contiguous(), dbalance, *ctx.saved_tensors, ctx.rule)
        return dx_ND, dweight_ED, None, None, None, None, None
