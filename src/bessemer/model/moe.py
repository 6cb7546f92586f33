"""DeepSeekMoE (MoE 3, V3 2.1.2): shared and fine-grained routed experts. `gate` chooses experts; this module sends
tokens to them and combines the results. No token is ever dropped.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert inner width, M = N*K routed rows sorted by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.model import fp8, grouped
from bessemer.model.config import ModelConfig
from bessemer.model.experts import Combine, Spread, dense_ffn, expert_ffn, expert_order, routed_ffn, slots
from bessemer.model.gate import Gate, Routing
from bessemer.precision.fp8_linear import FP8Recipe
from bessemer.precision.operand import Operand

EXPERTS = ".experts."
"""Occurs in the name of every tensor that stacks the routed experts."""


class Unsent(NamedTuple):
    """Tokens whose experts are all on this device. Nothing is sent: the experts' operation gathers and sums rows."""

    x_ND: Tensor
    routing: Routing


class Dispatched(NamedTuple):
    """Routed rows in expert order."""

    rows_MD: Tensor
    weight_M: Tensor
    count_E: Tensor
    """Rows per expert, int64, padding included."""
    slot_NK: Tensor
    """Row of each (token, choice)."""
    operand: Operand | None = None
    """The rows in FP8 training; `rows_MD` is then a tensor without storage that only carries the gradient back."""
    filled: bool = False
    """Whether the rows of every expert are padded (`fp8.Filled`)."""


def dispatch(x_ND: Tensor, routing: Routing, n_experts: int, recipe: FP8Recipe | None = None) -> Dispatched:
    """Copies each token once per chosen expert, sorted by expert (ties in token order); in FP8 if there is a recipe."""
    N, K = routing.expert_NK.shape
    order_M, count_E = expert_order(routing.expert_NK, n_experts)
    token_M, weight_M, slot_NK = order_M // K, routing.weight_NK.flatten()[order_M], slots(order_M).view(N, K)
    if recipe is not None:
        fill = fp8.filled(count_E, len(order_M)) if fp8.fills(recipe, x_ND.device) else None
        if fill is not None:
            count_E, token_M, weight_M = fill.rows_E, fill.spread(token_M, N), fill.spread(weight_M, 0.0)
            slot_NK = fill.place_M[slot_NK]
        rows_MD, operand = fp8.send(x_ND, token_M, recipe, slot_NK, fill is not None)
        return Dispatched(rows_MD, weight_M, count_E, slot_NK, operand, fill is not None)
    return Dispatched(Spread.apply(x_ND, token_M, slot_NK), weight_M, count_E, slot_NK)


def combine(rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
    """Sums the K weighted expert outputs of every token, [N, D]."""
    return Combine.apply(rows_MD, slot_NK)


class Experts(nn.Module):
    """The routed experts of one layer, stacked: w13 [E, 2F, D] (gate rows, then up rows), w2 [E, D, F]."""

    fp8: FP8Recipe | None = None

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        E, D, inner = cfg.n_routed_experts, cfg.dim, cfg.moe_inter_dim
        self.w13 = nn.Parameter(torch.empty(E, 2 * inner, D))
        self.w2 = nn.Parameter(torch.empty(E, D, inner))

    def forward(self, sent: Dispatched | Unsent) -> Tensor:
        """weight * W_2 (silu(W_1 x) * W_3 x): [M, D] for rows in expert order; for `Unsent` tokens, the sum over their
        experts [N, D]."""
        if isinstance(sent, Unsent):
            return routed_ffn(sent.x_ND, sent.routing.expert_NK, sent.routing.weight_NK, self.w13, self.w2)
        if sent.operand is not None:
            assert self.fp8 is not None
            count = fp8.counts(sent.count_E, len(sent.rows_MD), self.fp8, sent.filled)
            return fp8.expert_swiglu(sent.rows_MD, sent.operand, self.w13, self.w2, self.fp8, sent.weight_M, count)
        return expert_ffn(sent.rows_MD, sent.weight_M, sent.count_E, self.w13, self.w2)


def _plain(linear: nn.Module) -> bool:
    """Whether calling the module only applies its weight: it has not been replaced and has no hooks."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return isinstance(linear, nn.Linear) and not hooks


class FFN(nn.Module):
    """SwiGLU: W_2 (silu(W_1 x) * (W_3 x)), with W_1 and W_3 stacked in w13. Used by dense layers and shared experts."""

    fp8: FP8Recipe | None = None

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None and self.training:
            return fp8.swiglu(x, self.w13.weight, self.w2.weight, self.fp8)
        if x.device.type == "cpu" and _plain(self.w13) and _plain(self.w2):
            return dense_ffn(x.flatten(0, -2), self.w13.weight, self.w2.weight).view(x.shape)
        if x.device.type in ("cuda", "meta") and not torch.compiler.is_compiling():
            h = self.w13(x)
            return self.w2(grouped.activation(h.flatten(0, -2)).view(*h.shape[:-1], -1))
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class MoE(nn.Module):
    """Gate, routed experts and shared expert of one layer."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        self.shared = FFN(cfg.dim, cfg.shared_width) if cfg.n_shared_experts else None
