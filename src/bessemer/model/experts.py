"""The grouped SwiGLU of the routed experts: rows sorted by expert, one weight set per group.

`expert_ffn_reference` is the plain loop; `expert_ffn` is the same function with a hand-written backward that keeps each
expert's rows in cache and recomputes the activation instead of storing it (V3 3.2.3 stores the inputs of SwiGLU and
recomputes its output). The gate weight is applied between the two matrices, where rows are narrowest.

Shapes: M routed rows in expert order, D hidden, E experts, F inner width; count_E rows per expert, sum M.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.model import deferred
from bessemer.model.operation import operation


def expert_ffn_reference(rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """y_m = weight_m * W2_e (silu(W1_e x_m) * W3_e x_m), e the expert of row m."""
    out = []
    weights = weight_M.split(count_E.tolist())
    for e, rows in enumerate(rows_MD.split(count_E.tolist())):
        gate, up = F.linear(rows, w13[e]).chunk(2, -1)
        out.append(weights[e].unsqueeze(-1).to(rows.dtype) * F.linear(F.silu(gate) * up, w2[e]))
    return torch.cat(out)


@operation("expert_ffn")
def _forward(rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (y [M, D], h [M, 2F]); h is saved for backward."""
    inner = w2.shape[2]
    h_MH = rows_MD.new_empty(rows_MD.shape[0], 2 * inner)
    y_MD = torch.empty_like(rows_MD)
    for e, rows, window, mine in _segments(count_E, rows_MD):
        h = _product(rows_MD[window], w13[e].t(), h_MH[rows], mine)
        act = F.silu(h[:, :inner]).mul_(h[:, inner:]).mul_(weight_M[window, None])
        _product(act, w2[e].t(), y_MD[rows], mine)
    return y_MD, h_MH


PADDED = 32
"""Rows of a window are a multiple of this, for BF16 on a CPU."""


def _segments(count_E: Tensor, rows_MD: Tensor) -> Iterator[tuple[int, slice, slice, slice]]:
    """(expert, its rows, a window of rows around them, position of its rows in the window) of every expert in use.

    GEMMs run on the window. It equals the rows except for BF16 on a CPU: oneDNN compiles a kernel for every number of
    rows, a millisecond each, so windows come in multiples of 32 and extend into neighbouring rows.
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
    """a b; the expert's own rows are written to `out`."""
    if len(out) == len(a):
        return torch.mm(a, b, out=out)
    y = torch.mm(a, b)
    out.copy_(y[mine])
    return y


@torch.library.register_fake(_forward)
def _(rows_MD, weight_M, count_E, w13, w2):
    return torch.empty_like(rows_MD), rows_MD.new_empty(rows_MD.shape[0], 2 * w2.shape[2])


@operation("expert_ffn_backward")
def _backward(
    dy_MD: Tensor, rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor, h_MH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, weights, w13 and w2."""
    drows, dweight = torch.empty_like(rows_MD), torch.empty_like(weight_M)
    dw13, dw2 = torch.zeros_like(w13), torch.zeros_like(w2)
    for e, rows, window, mine in _segments(count_E, rows_MD):
        dy = _own_rows(dy_MD, rows, window, mine)
        weight = weight_M[window, None].to(dy.dtype)
        act, dh, dweight[rows] = _activation_backward(dy, weight, h_MH[window], w2[e], mine)
        torch.mm(dy.t(), act, out=dw2[e])
        _product(dh, w13[e], drows[rows], mine)
        torch.mm(dh.t(), rows_MD[window], out=dw13[e])
    return drows, dweight, dw13, dw2


def _own_rows(x_MX: Tensor, rows: slice, window: slice, mine: slice) -> Tensor:
    """A window of gradients with zeros for neighbouring rows, which then add nothing to sums over rows."""
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
    dy_MD: Tensor, rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor, h_MH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows and weights, and act and dh, from which those of w2 and w13 follow with dy and rows."""
    drows, dweight = torch.empty_like(rows_MD), torch.empty_like(weight_M)
    act_MF, dh_MH = h_MH.new_empty(len(h_MH), w2.shape[2]), torch.empty_like(h_MH)
    for e, rows, window, mine in _segments(count_E, rows_MD):
        dy = _own_rows(dy_MD, rows, window, mine)
        weight = weight_M[window, None].to(dy.dtype)
        act, dh, dweight[rows] = _activation_backward(dy, weight, h_MH[window], w2[e], mine)
        _product(dh, w13[e], drows[rows], mine)
        act_MF[rows], dh_MH[rows] = act[mine], dh[mine]
    return drows, dweight, act_MF, dh_MH


def _weight_gradient(dy_MX: Tensor, x_MY: Tensor, count_E: Tensor, weight: Tensor) -> Tensor:
    """dy^T x of every expert's rows, [E, X, Y]."""
    dw = torch.zeros_like(weight)
    for e, rows, window, mine in _segments(count_E, x_MY):
        torch.mm(_own_rows(dy_MX, rows, window, mine).t(), x_MY[window], out=dw[e])
    return dw


@torch.library.register_fake(_backward)
def _(dy_MD, rows_MD, weight_M, count_E, w13, w2, h_MH):
    return tuple(torch.empty_like(t) for t in (rows_MD, weight_M, w13, w2))


def _setup(ctx, inputs, output):
    rows_MD, weight_M, count_E, w13, w2 = inputs
    ctx.set_materialize_grads(False)  # h has no gradient; zeros of its size would cost one more pass
    ctx.save_for_backward(rows_MD, weight_M, count_E, w13, w2, output[1])


def _grad(ctx, dy_MD, _dh):
    if dy_MD is None:
        return None, None, None, None, None
    dy_MD, saved = dy_MD.contiguous(), ctx.saved_tensors
    rows_MD, _, count_E, w13, w2, _ = saved
    if deferred.store_of(w13) is None:
        drows, dweight, dw13, dw2 = _backward(dy_MD, *saved)
    else:
        drows, dweight, act_MF, dh_MH = _backward_input(dy_MD, *saved)
        dw2 = deferred.gradient(w2, lambda: _weight_gradient(dy_MD, act_MF, count_E, w2))
        dw13 = deferred.gradient(w13, lambda: _weight_gradient(dh_MH, rows_MD, count_E, w13))
    return drows, dweight, None, dw13, dw2


torch.library.register_autograd(_forward, _grad, setup_context=_setup)


def expert_ffn(rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`expert_ffn_reference`, fast; same arguments and result."""
    return _forward(rows_MD, weight_M, count_E, w13, w2)[0]
