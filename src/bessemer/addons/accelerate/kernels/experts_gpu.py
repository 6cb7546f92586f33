"""SwiGLU of routed experts on a GPU with dispatch and combine, as one operation (`model.moe`).

Its backward is hand-written: it recomputes the activation instead of storing it (V3 3.2.3 stores the inputs of SwiGLU
and recomputes its output), and the gate weight is applied between the two matrices, where rows are narrowest. Weight
gradients go directly to the parameters' float32 gradients if `deferred.own_gradient` allows. `grouped` has the
products.

Shapes: N tokens, K experts per token, M = N K routed rows in expert order, D hidden, E experts, F inner width; count_E
is the rows per expert; order_M is the number n K + k of each row's choice. x is [N, D], or [M, D] already in expert
order if order_M is None.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.kernels import deferred, grouped
from bessemer.addons.accelerate.kernels.operation import operation
from bessemer.model.moe import expert_order, slots


def serves(x_ND: Tensor, choice: Tensor, other: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether grouped products take the arguments of `expert_ffn` and `routed_ffn`."""
    return grouped.serves(x_ND, w13, w2)


def combine(rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
    """`model.moe.combine`; rows that are in no slot get no gradient."""
    return _Combine.apply(rows_MD, slot_NK)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_NK)
        ctx.rows = len(rows_MD)
        return grouped.combine(rows_MD, slot_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND: Tensor) -> tuple[Tensor, None]:
        (slot_NK,) = ctx.saved_tensors
        slot_M, (N, K) = slot_NK.flatten(), slot_NK.shape
        if ctx.rows == len(slot_M):
            return dy_ND.index_select(0, slots(slot_M) // K), None
        token_M = slot_M.new_full((ctx.rows,), N)  # the other rows are padding (`fp8_layers.Filled`)
        token_M[slot_M] = torch.arange(N, device=slot_M.device).repeat_interleave(K)
        return F.pad(dy_ND, (0, 0, 0, 1)).index_select(0, token_M), None


def _choices(order_M: Tensor, n_tokens: int) -> int:
    return len(order_M) // n_tokens if n_tokens else 1


class _Rows:
    """Tokens and gates in the form that grouped products need: rows in expert order."""

    def __init__(
        self, x_ND: Tensor, count_E: Tensor, order_M: Tensor | None, weight: Tensor | None = None
    ):  # fmt: skip
        self.x_ND, self.order_M, self.n_tokens = x_ND, order_M, len(x_ND)
        self.end_E = grouped.ends(count_E)
        self.weight = weight

    @cached_property
    def rows_MD(self) -> Tensor:
        return self.of(self.x_ND)

    @cached_property
    def token_M(self) -> Tensor:
        assert self.order_M is not None
        return self.order_M // _choices(self.order_M, self.n_tokens)

    @cached_property
    def slot_M(self) -> Tensor:
        assert self.order_M is not None
        return slots(self.order_M)

    @cached_property
    def weight_M(self) -> Tensor:
        assert self.weight is not None
        return self.weight if self.order_M is None else self.weight.flatten()[self.order_M]

    def of(self, x_ND: Tensor) -> Tensor:
        return x_ND if self.order_M is None else x_ND.index_select(0, self.token_M)

    def summed(self, rows_MD: Tensor) -> Tensor:
        """Rows in expert order, summed per token."""
        if self.order_M is None:
            return rows_MD
        return grouped.combine(
            rows_MD, self.slot_M.view(self.n_tokens, -1) if self.n_tokens else self.slot_M.view(0, 1)
        )

    def of_choices(self, dweight_M: Tensor) -> Tensor:
        """The gradient of the gates, in their shape and dtype."""
        assert self.weight is not None
        if self.order_M is not None:
            dweight_M = dweight_M[self.slot_M].view(self.weight.shape)
        return dweight_M.to(self.weight.dtype)


@operation("expert_ffn")
def _forward(
    x_ND: Tensor, weight: Tensor, count_E: Tensor, order_M: Tensor | None, w13: Tensor, w2: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Returns (y [N, D], h [M, 2F]); h is for backward and is empty without `keep`."""
    r = _Rows(x_ND, count_E, order_M, weight)
    y_MD, h_MH = grouped.forward(r.rows_MD, r.weight_M, r.end_E, w13, w2)
    return r.summed(y_MD), h_MH if keep else h_MH.new_empty(0, 2 * w2.shape[-1])


@torch.library.register_fake(_forward)
def _(x_ND, weight, count_E, order_M, w13, w2, keep):
    rows = x_ND.shape[0] if order_M is None else order_M.shape[0]  # `len` would fix the size in a compiled graph
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(rows if keep else 0, 2 * w2.shape[-1])


@operation("expert_ffn_backward")
def _backward(
    dy_ND: Tensor, x_ND: Tensor, weight: Tensor, count_E: Tensor, order_M: Tensor | None, w13: Tensor, w2: Tensor,
    h_MH: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gates, w13 and w2; gathers rows only once."""
    r = _Rows(x_ND, count_E, order_M, weight)
    dy_MD = r.of(dy_ND)
    drows, dweight_M, act_MF, dh_MH = grouped.backward(dy_MD, r.weight_M, r.end_E, w13, w2, h_MH)
    dw2 = grouped.weight_gradient(dy_MD, act_MF, r.end_E)
    return r.summed(drows), r.of_choices(dweight_M), grouped.weight_gradient(dh_MH, r.rows_MD, r.end_E), dw2


@torch.library.register_fake(_backward)
def _(dy_ND, x_ND, weight, count_E, order_M, w13, w2, h_MH):
    return x_ND.new_empty(x_ND.shape), torch.empty_like(weight), torch.empty_like(w13), torch.empty_like(w2)


def _setup(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.set_materialize_grads(False)  # h has no gradient; filling zeros of its size would cost one more pass
    ctx.save_for_backward(*tensors, output[1])


def _grad(ctx, dy_ND, _dh):
    if dy_ND is None:
        return (None,) * 7
    dy_ND, saved = dy_ND.contiguous(), ctx.saved_tensors
    x_ND, weight, count_E, order_M, w13, w2, h_MH = saved
    if deferred.store_of(w13) is not None:
        r = _Rows(x_ND, count_E, order_M, weight)
        drows, dweight_M, act_MF, dh_MH = grouped.backward(r.of(dy_ND), r.weight_M, r.end_E, w13, w2, h_MH)
        dx, dweight = r.summed(drows), r.of_choices(dweight_M)
        dw2 = deferred.gradient(w2, lambda: _later(dy_ND, act_MF, count_E, order_M, tokens_first=True))
        dw13 = deferred.gradient(w13, lambda: _later(x_ND, dh_MH, count_E, order_M, tokens_first=False))
    else:
        dx, dweight, dw13, dw2 = _backward(dy_ND, *saved)
        own = [deferred.own_gradient(w) for w in (w13, w2)]
        if own[0] is not None and own[1] is not None:
            own[0].add_(dw13)
            own[1].add_(dw2)
            dw13 = dw2 = None
    return dx, dweight, None, None, dw13, dw2, None


torch.library.register_autograd(_forward, _grad, setup_context=_setup)


def _later(
    tokens_ND: Tensor, inner_MX: Tensor, count_E: Tensor, order_M: Tensor | None, tokens_first: bool
) -> Tensor:  # fmt: skip
    """w2's gradient dy^T act, or w13's dh^T x, from tokens that are not yet in expert order."""
    r = _Rows(tokens_ND, count_E, order_M)
    pair = (r.rows_MD, inner_MX) if tokens_first else (inner_MX, r.rows_MD)
    return grouped.weight_gradient(*pair, r.end_E)


def expert_ffn(rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`model.moe.expert_ffn`."""
    return _forward(rows_MD, weight_M, count_E, None, w13, w2, torch.is_grad_enabled())[0]


def routed_ffn(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`model.moe.routed_ffn`."""
    order_M, count_E = expert_order(expert_NK, len(w2))
    return _forward(x_ND, weight_NK, count_E, order_M, w13, w2, torch.is_grad_enabled())[0]
