"""SwiGLU of the routed experts (rows sorted by expert, one set of weights each) and of a dense FFN (one expert), with a
hand-written backward.

`model.moe` has the equations. The backward here recomputes the activation instead of storing it (V3 3.2.3 stores the
inputs of SwiGLU and recomputes its output), and the gate weight is applied between the two matrices, where rows are
narrowest. `routed_ffn` adds dispatch and combine, so that a layer on one device maps tokens to tokens. `dense_ffn` has
one expert and no gate.

All three are one operation. `experts` computes it on a CPU, block by block and without ever storing the rows [M, D];
`grouped` on a GPU, without a loop over experts; torch's loop below everywhere else. Its backward adds weight gradients
directly to the parameters' float32 gradients if `deferred.own_gradient` allows.

Shapes: N tokens, K experts per token, M = N K routed rows in expert order, D hidden, E experts, F inner width; count_E
is the rows per expert; order_M is the number n K + k of each row's choice. x is [N, D], or [M, D] already in expert
order if order_M is None.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bessemer.kernels import deferred, grouped
from bessemer.kernels import experts as kernel
from bessemer.kernels.operation import operation
from bessemer.model.moe import FFN, slots


@operation("expert_order")
def expert_order(expert_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """(order_M, count_E): the choices sorted by expert, ties in token order, and the rows per expert."""
    if kernel.sorts(expert_NK):
        return kernel.sort(expert_NK, n_experts)
    expert_M, order_M = expert_NK.flatten().sort(stable=True)
    # not bincount: it makes the host wait for the GPU
    return order_M, expert_M.new_zeros(n_experts).scatter_add_(0, expert_M, torch.ones_like(expert_M))


@torch.library.register_fake(expert_order)
def _(expert_NK, n_experts):
    return expert_NK.new_empty(expert_NK.numel()), expert_NK.new_empty(n_experts)


def _combined(rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
    """Rows summed over the choices of each token, [N, D], as the kernel does: in float32 (float64 stays) and in
    ascending order of experts, which is also that of their rows."""
    if rows_MD.device.type != "cpu":
        return grouped.combine(rows_MD, slot_NK)
    slot_KN = slot_NK.sort(1).values.t()
    dtype = torch.promote_types(rows_MD.dtype, torch.float32)
    total_ND = rows_MD.new_zeros(len(slot_NK), rows_MD.shape[1], dtype=dtype)
    for slot_N in slot_KN:
        total_ND += rows_MD.index_select(0, slot_N)
    return total_ND.to(rows_MD.dtype)


def combine(rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
    """`model.moe.combine`; rows that are in no slot get no gradient."""
    return _Combine.apply(rows_MD, slot_NK)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_NK)
        ctx.rows = len(rows_MD)
        return _combined(rows_MD, slot_NK)

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
    """Tokens, gates and weights in the form torch's version needs: rows in expert order, stacked weights."""

    def __init__(
        self, x_ND: Tensor, weight: Tensor | None, count_E: Tensor | None, order_M: Tensor | None, w13: Tensor,
        w2: Tensor,
    ):  # fmt: skip
        self.x_ND, self.order_M, self.n_tokens = x_ND, order_M, len(x_ND)
        self.count_E = count_E if count_E is not None else torch.tensor([len(x_ND)])
        if weight is None:
            self.weight_M = x_ND.new_ones(len(x_ND))
        else:
            self.weight_M = weight if order_M is None else weight.flatten()[order_M]
        self.w13, self.w2 = (w.view(-1, *w.shape[-2:]) for w in (w13, w2))

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
    def end_E(self) -> Tensor:
        return grouped.ends(self.count_E)

    def of(self, x_ND: Tensor) -> Tensor:
        return x_ND if self.order_M is None else x_ND.index_select(0, self.token_M)

    def summed(self, rows_MD: Tensor) -> Tensor:
        """Rows in expert order, summed per token."""
        if self.order_M is None:
            return rows_MD
        return _combined(rows_MD, self.slot_M.view(self.n_tokens, -1) if self.n_tokens else self.slot_M.view(0, 1))

    def of_choices(self, dweight_M: Tensor, weight: Tensor | None) -> Tensor | None:
        """The gradient of the gates, in the shape of `weight`."""
        if weight is None:
            return None
        return dweight_M if self.order_M is None else dweight_M[self.slot_M].view(weight.shape)


def _routes(weight: Tensor | None, count_E: Tensor | None, order_M: Tensor | None, x_ND: Tensor) -> kernel.Routes:
    count_E = torch.tensor([len(x_ND)]) if count_E is None else count_E.contiguous()
    return kernel.Routes(count_E, order_M, None if weight is None else weight.float().contiguous())


@operation("expert_ffn")
def _forward(
    x_ND: Tensor, weight: Tensor | None, count_E: Tensor | None, order_M: Tensor | None, w13: Tensor, w2: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (y [N, D], h [M, 2F]); h is for backward and is empty without `keep`."""
    if kernel.serves(x_ND, w13, w2):
        return kernel.forward(x_ND, _routes(weight, count_E, order_M, x_ND), w13, w2, keep)
    r, inner = _Rows(x_ND, weight, count_E, order_M, w13, w2), w2.shape[-1]
    if grouped.serves(x_ND, w13, w2):
        y_MD, h_MH = grouped.forward(r.rows_MD, r.weight_M, r.end_E, w13, w2)
        return r.summed(y_MD), h_MH if keep else h_MH.new_empty(0, 2 * inner)
    h_MH = x_ND.new_empty(len(r.rows_MD), 2 * inner)
    y_MD = torch.empty_like(r.rows_MD)
    for e, rows, window, mine in _segments(r.count_E, r.rows_MD):
        h = _product(r.rows_MD[window], r.w13[e].t(), h_MH[rows], mine)
        act = F.silu(h[:, :inner]).mul_(h[:, inner:]).mul_(r.weight_M[window, None])
        _product(act, r.w2[e].t(), y_MD[rows], mine)
    return r.summed(y_MD), h_MH if keep else h_MH.new_empty(0, 2 * inner)


PADDED = 32
"""For BF16 on a CPU, the rows of a window are a multiple of this."""


def _segments(count_E: Tensor, rows_MD: Tensor) -> Iterator[tuple[int, slice, slice, slice]]:
    """Yields, per expert in use, (expert, its rows, a window of rows around them, position of its rows in the window).

    GEMMs run on the window. It equals the rows except for BF16 on a CPU: oneDNN compiles a kernel for every number of
    rows, which takes a millisecond, so windows are multiples of 32 rows and extend into neighbouring rows.
    """
    total = len(rows_MD)
    padded = PADDED if rows_MD.dtype == torch.bfloat16 and rows_MD.device.type == "cpu" else 1
    start = 0
    for e, count in enumerate(count_E.tolist()):
        if not count:
            continue
        size = min(-(-count // padded) * padded, total)
        low = min(start, total - size)
        yield e, slice(start, start + count), slice(low, low + size), slice(start - low, start - low + count)
        start += count


def _product(a: Tensor, b: Tensor, out: Tensor, mine: slice) -> Tensor:
    """Returns a b, and writes the expert's own rows to `out`."""
    if len(out) == len(a):
        return torch.mm(a, b, out=out)
    y = torch.mm(a, b)
    out.copy_(y[mine])
    return y


@torch.library.register_fake(_forward)
def _(x_ND, weight, count_E, order_M, w13, w2, keep):
    rows = x_ND.shape[0] if order_M is None else order_M.shape[0]  # `len` would fix the size in a compiled graph
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(rows if keep else 0, 2 * w2.shape[-1])


@operation("expert_ffn_backward")
def _backward(
    dy_ND: Tensor, x_ND: Tensor, weight: Tensor | None, count_E: Tensor | None, order_M: Tensor | None, w13: Tensor,
    w2: Tensor, h_MH: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gates (empty if there are none), w13 and w2."""
    if kernel.serves(x_ND, w13, w2):
        routes = _routes(weight, count_E, order_M, x_ND)
        dw13, dw2 = torch.empty_like(w13), torch.empty_like(w2)
        dx_ND, dweight = kernel.backward(dy_ND.contiguous(), x_ND, routes, w13, w2, h_MH, dw13, dw2)[:2]
    elif grouped.serves(x_ND, w13, w2):  # gathers rows only once
        r = _Rows(x_ND, weight, count_E, order_M, w13, w2)
        dy_MD = r.of(dy_ND)
        drows, dweight_M, act_MF, dh_MH = grouped.backward(dy_MD, r.weight_M, r.end_E, w13, w2, h_MH)
        dx_ND, dweight = r.summed(drows), r.of_choices(dweight_M, weight)
        dw2 = grouped.weight_gradient(dy_MD, act_MF, r.end_E)
        dw13 = grouped.weight_gradient(dh_MH, r.rows_MD, r.end_E)
    else:
        dx_ND, dweight, act_MF, dh_MH = _backward_input(dy_ND, x_ND, weight, count_E, order_M, w13, w2, h_MH)
        dw2 = _weight_gradient(dy_ND, act_MF, count_E, order_M, w2, by_inner=False)
        dw13 = _weight_gradient(x_ND, dh_MH, count_E, order_M, w13, by_inner=True)
    return dx_ND, x_ND.new_empty(0) if weight is None or dweight is None else dweight.to(weight.dtype), dw13, dw2


def _own_rows(x_MX: Tensor, rows: slice, window: slice, mine: slice) -> Tensor:
    """A window of gradients with neighbouring rows zeroed, so that they add nothing to sums over rows."""
    x = x_MX[window]
    if mine.stop - mine.start < len(x):
        x = torch.zeros_like(x)
        x[mine] = x_MX[rows]
    return x


def _activation_backward(
    dy: Tensor, weight: Tensor, h: Tensor, w2: Tensor, mine: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of W2 and the activation of one expert: the input of W2, the gradient of h, and that of the gates."""
    inner = w2.shape[1]
    gate, up = h[:, :inner], h[:, inner:]
    sig = torch.sigmoid(gate)
    silu = gate * sig
    act = silu * up
    dact = torch.mm(dy, w2)
    dweight = (dact[mine] * act[mine]).sum(-1)
    dact *= weight
    dh = torch.empty_like(h)
    torch.mul(dact, silu, out=dh[:, inner:])
    # d silu(g) = sig (1 + g (1 - sig)) = sig + silu (1 - sig)
    torch.mul(dact.mul_(up), sig + silu * (1 - sig), out=dh[:, :inner])
    return act.mul_(weight), dh, dweight


def _backward_input(
    dy_ND: Tensor, x_ND: Tensor, weight: Tensor | None, count_E: Tensor | None, order_M: Tensor | None, w13: Tensor,
    w2: Tensor, h_MH: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and gates, then act and dh, which with dy and x give the gradients of w2 and w13."""
    if kernel.serves(x_ND, w13, w2):
        routes = _routes(weight, count_E, order_M, x_ND)
        dx, dweight, act, dh = kernel.backward(dy_ND, x_ND, routes, w13, w2, h_MH, None, None, operands=True)
        assert act is not None and dh is not None
        return dx, dweight, act, dh
    r = _Rows(x_ND, weight, count_E, order_M, w13, w2)
    dy_MD = r.of(dy_ND)
    if grouped.serves(x_ND, w13, w2):
        drows, dweight, act_MF, dh_MH = grouped.backward(dy_MD, r.weight_M, r.end_E, w13, w2, h_MH)
        return r.summed(drows), r.of_choices(dweight, weight), act_MF, dh_MH
    drows, dweight = torch.empty_like(r.rows_MD), torch.empty_like(r.weight_M)
    act_MF, dh_MH = h_MH.new_empty(len(h_MH), w2.shape[-1]), torch.empty_like(h_MH)
    for e, rows, window, mine in _segments(r.count_E, r.rows_MD):
        dy = _own_rows(dy_MD, rows, window, mine)
        gate = r.weight_M[window, None].to(dy.dtype)
        act, dh, dweight[rows] = _activation_backward(dy, gate, h_MH[window], r.w2[e], mine)
        _product(dh, r.w13[e], drows[rows], mine)
        act_MF[rows], dh_MH[rows] = act[mine], dh[mine]
    return r.summed(drows), r.of_choices(dweight, weight), act_MF, dh_MH


def _weight_gradient(
    tokens_ND: Tensor, inner_MX: Tensor, count_E: Tensor | None, order_M: Tensor | None, w: Tensor, by_inner: bool
) -> Tensor:
    """tokens^T inner over each expert's rows: w2's gradient from dy and act. With `by_inner`, inner^T tokens: w13's
    from x and dh."""
    if kernel.serves(tokens_ND, w, w):
        dw = torch.empty_like(w, dtype=torch.float32)
        kernel.weight_gradient(tokens_ND, _routes(None, count_E, order_M, tokens_ND), inner_MX, dw, by_inner)
        return dw
    r = _Rows(tokens_ND, None, count_E, order_M, w, w)
    left, right = (inner_MX, r.rows_MD) if by_inner else (r.rows_MD, inner_MX)
    if grouped.serves(tokens_ND, w, w):
        return grouped.weight_gradient(left, right, r.end_E)
    dw = torch.zeros_like(r.w2)
    for e, rows, window, mine in _segments(r.count_E, right):
        torch.mm(_own_rows(left, rows, window, mine).t(), right[window], out=dw[e])
    return dw.view_as(w)


@torch.library.register_fake(_backward)
def _(dy_ND, x_ND, weight, count_E, order_M, w13, w2, h_MH):
    dweight = x_ND.new_empty(0) if weight is None else torch.empty_like(weight)
    return x_ND.new_empty(x_ND.shape), dweight, torch.empty_like(w13), torch.empty_like(w2)


def _setup(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.set_materialize_grads(False)  # h has no gradient; filling zeros of its size would cost one more pass
    ctx.save_for_backward(*tensors, output[1])


def _grad(ctx, dy_ND, _dh):
    if dy_ND is None:
        return (None,) * 7
    dy_ND, saved = dy_ND.contiguous(), ctx.saved_tensors
    x_ND, weight, count_E, order_M, w13, w2, h_MH = saved
    own = [deferred.own_gradient(w) for w in (w13, w2)]
    if deferred.store_of(w13) is not None:
        dx, dweight, act_MF, dh_MH = _backward_input(dy_ND, *saved)
        dw2 = deferred.gradient(w2, lambda: _weight_gradient(dy_ND, act_MF, count_E, order_M, w2, by_inner=False))
        dw13 = deferred.gradient(w13, lambda: _weight_gradient(x_ND, dh_MH, count_E, order_M, w13, by_inner=True))
    elif own[0] is not None and own[1] is not None and kernel.serves(x_ND, w13, w2):
        routes = _routes(weight, count_E, order_M, x_ND)
        dx, dweight = kernel.backward(dy_ND, x_ND, routes, w13, w2, h_MH, *own, add=True)[:2]
        dw13 = dw2 = None
    elif own[0] is not None and own[1] is not None and grouped.serves(x_ND, w13, w2):
        dx, dweight, dw13, dw2 = _backward(dy_ND, *saved)
        own[0].add_(dw13)
        own[1].add_(dw2)
        dw13 = dw2 = None
    else:
        dx, dweight, dw13, dw2 = _backward(dy_ND, *saved)
    if weight is not None and dweight is not None:
        dweight = dweight.to(weight.dtype)
    return dx, None if weight is None else dweight, None, None, dw13, dw2, None


torch.library.register_autograd(_forward, _grad, setup_context=_setup)


def _called(
    x_ND: Tensor, weight: Tensor | None, count_E: Tensor | None, order_M: Tensor | None, w13: Tensor, w2: Tensor
) -> Tensor:  # fmt: skip
    return _forward(x_ND, weight, count_E, order_M, w13, w2, torch.is_grad_enabled())[0]


def expert_ffn(rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`model.moe.expert_ffn`."""
    return _called(rows_MD, weight_M, count_E, None, w13, w2)


def routed_ffn(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`model.moe.routed_ffn`."""
    order_M, count_E = expert_order(expert_NK, w2.shape[0])
    return _called(x_ND, weight_NK, count_E, order_M, w13, w2)


def dense_ffn(x_ND: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """W2 (silu(W1 x) * W3 x), [N, D], for w13 [2F, D] and w2 [D, F]."""
    return _called(x_ND, None, None, None, w13, w2)


def serves_dense(x: Tensor, ffn: FFN) -> bool:
    """Whether calling the matrices of an FFN on a CPU only applies their weights."""
    return x.device.type == "cpu" and _plain(ffn.w13) and _plain(ffn.w2)


def _plain(linear: nn.Module) -> bool:
    """Whether the module has not been replaced and has no hooks."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return isinstance(linear, nn.Linear) and not hooks


def swiglu(x: Tensor, ffn: FFN) -> Tensor:
    """`model.moe.swiglu`."""
    return dense_ffn(x.flatten(0, -2), ffn.w13.weight, ffn.w2.weight).view(x.shape)
