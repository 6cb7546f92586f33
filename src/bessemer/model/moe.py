"""DeepSeekMoE (MoE 3, V3 2.1.2): shared and fine-grained routed experts. `gate` chooses experts; this module sends
tokens to them and combines the results. No token is ever dropped.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert inner width, M = N*K routed rows in expert order;
count_E is the rows of each expert, order_M the number n K + k of each row's choice, slot_NK the row of each choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.gate import Gate, Routing
from bessemer.model.ops import Linear, operation

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
    operand: Any = None
    """The rows in another number format; `rows_MD` is then a tensor without storage that only carries the gradient
    back."""
    filled: bool = False
    """Whether the rows of every expert are padded."""


@operation
def expert_order(expert_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """(order_M, count_E): the choices sorted by expert, ties in token order, and the rows per expert."""
    expert_M, order_M = expert_NK.flatten().sort(stable=True)
    return order_M, expert_M.new_zeros(n_experts).scatter_add_(0, expert_M, torch.ones_like(expert_M))


def slots(order_M: Tensor) -> Tensor:
    """The row of each choice, [M]: the inverse permutation of `order_M`."""
    slot_M = torch.empty_like(order_M)
    slot_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return slot_M


@operation
def expert_ffn(rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """y_m = weight_m * W2_e (silu(W1_e x_m) * W3_e x_m), where e is the expert of row m; [M, D]."""
    count, out = count_E.tolist(), []
    for rows, weights, w13_e, w2_e in zip(rows_MD.split(count), weight_M.split(count), w13, w2, strict=True):
        gate, up = F.linear(rows, w13_e).chunk(2, -1)
        out.append(weights.unsqueeze(-1).to(rows.dtype) * F.linear(F.silu(gate) * up, w2_e))
    return torch.cat(out)


@operation
def combine(rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
    """Sums the K expert outputs of every token, [N, D], in float32 or wider and in ascending order of experts."""
    dtype = torch.promote_types(rows_MD.dtype, torch.float32)
    total_ND = rows_MD.new_zeros(len(slot_NK), rows_MD.shape[1], dtype=dtype)
    for slot_N in slot_NK.sort(1).values.t():
        total_ND = total_ND + rows_MD.index_select(0, slot_N)
    return total_ND.to(rows_MD.dtype)


@operation
def routed_ffn(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Each token's weighted sum over its K experts, [N, D]."""
    N, K = expert_NK.shape
    order_M, count_E = expert_order(expert_NK, len(w2))
    rows_MD = expert_ffn(x_ND.index_select(0, order_M // K), weight_NK.flatten()[order_M], count_E, w13, w2)
    return combine(rows_MD, slots(order_M).view(N, K))


@operation
def dispatch(x_ND: Tensor, routing: Routing, experts: Experts) -> Unsent | Dispatched:
    """Tokens on their way to the experts of one device."""
    return Unsent(x_ND, routing)


@operation
def run_experts(sent: Dispatched | Unsent, experts: Experts) -> Tensor:
    """weight * W_2 (silu(W_1 x) * W_3 x): [M, D] for rows in expert order; for `Unsent` tokens, the sum over their
    experts [N, D]."""
    if isinstance(sent, Unsent):
        return routed_ffn(sent.x_ND, sent.routing.expert_NK, sent.routing.weight_NK, experts.w13, experts.w2)
    return expert_ffn(sent.rows_MD, sent.weight_M, sent.count_E, experts.w13, experts.w2)


class Experts(nn.Module):
    """The routed experts of one layer, stacked: w13 [E, 2F, D] (gate rows, then up rows), w2 [E, D, F]."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        E, D, inner = cfg.n_routed_experts, cfg.dim, cfg.moe_inter_dim
        self.w13 = nn.Parameter(torch.empty(E, 2 * inner, D))
        self.w2 = nn.Parameter(torch.empty(E, D, inner))

    def forward(self, sent: Dispatched | Unsent) -> Tensor:
        return run_experts(sent, self)


@operation
def swiglu(x: Tensor, ffn: FFN) -> Tensor:
    """W_2 (silu(W_1 x) * (W_3 x))."""
    gate, up = ffn.w13(x).chunk(2, -1)
    return ffn.w2(F.silu(gate) * up)


class FFN(nn.Module):
    """SwiGLU with W_1 and W_3 stacked in w13. Used by dense layers and shared experts."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.w13 = Linear(dim, 2 * inner)
        self.w2 = Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self)


class MoE(nn.Module):
    """Gate, routed experts and shared expert of one layer."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        self.shared = FFN(cfg.dim, cfg.shared_width) if cfg.n_shared_experts else None
