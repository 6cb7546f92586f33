"""SwiGLU of routed experts with dispatch and combine, or of one dense FFN, on a CPU (`model.moe`): block by block and
without ever storing the rows [M, D]. Backward recomputes the activation instead of storing it (V3 3.2.3).

Rows are sorted by expert, `count_E` rows each. With an order, row m is choice order_M[m] = n * K + k of token n, and
results are summed per token; without an order it is row m of x. `gate` holds the float32 weight of each choice; None:
1. A dense FFN is one expert: w13 [2F, D] and w2 [D, F].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.kernels import deferred
from bessemer.addons.accelerate.kernels.library import DTYPES, available, call, fits, threads
from bessemer.model.moe import FFN, expert_order


def serves(x_ND: Tensor, w13: Tensor, w2: Tensor) -> bool:
    return (
        fits(x_ND, w13, w2)
        and x_ND.stride(-1) == 1
        and w13.is_contiguous()
        and w2.is_contiguous()
        and min(x_ND.numel(), w2.numel()) > 0
    )


def serves_routed(x_ND: Tensor, choice: Tensor, other: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """`serves` for the arguments of `expert_ffn` and `routed_ffn`."""
    return serves(x_ND, w13, w2)


def sorts(expert_NK: Tensor, n_experts: int) -> bool:
    """Whether `sort` takes these choices."""
    on_cpu = expert_NK.device.type == "cpu" and expert_NK.dtype == torch.int64
    return on_cpu and not torch.compiler.is_compiling() and available()


def sort(expert_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """(order_M, count_E), int64, of the choices sorted by expert, ties in token order."""
    order_M, count_E = torch.empty(expert_NK.numel(), dtype=torch.int64), torch.empty(n_experts, dtype=torch.int64)
    call("experts_order", "piipp", expert_NK.contiguous(), len(order_M), n_experts, count_E, order_M)
    if int(count_E.sum()) != len(order_M):
        raise IndexError(f"a token chose an expert that is not one of the {n_experts}")
    return order_M, count_E


class Routes(NamedTuple):
    count_E: Tensor
    order_M: Tensor | None
    gate: Tensor | None

    def arguments(self, n_tokens: int) -> tuple[Tensor | int | None, ...]:
        """As kernel arguments; the last one is K."""
        choices = 1 if self.order_M is None else len(self.order_M) // n_tokens
        return self.count_E, self.order_M, self.gate, choices


def _sizes(x_ND: Tensor, w2: Tensor) -> tuple[int, ...]:
    D, F = w2.shape[-2:]
    return len(x_ND), D, w2.numel() // (D * F), F, threads()


def forward(x_ND: Tensor, routes: Routes, w13: Tensor, w2: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Returns (y [N, D], h = W13 x [M, 2F] for `backward`); h is empty without `keep`."""
    N, D, _, F, _ = sizes = _sizes(x_ND, w2)
    M = N if routes.order_M is None else len(routes.order_M)
    y_ND, h_MH = x_ND.new_empty(N, D), x_ND.new_empty(M if keep else 0, 2 * F)
    call(
        f"experts_{DTYPES[x_ND.dtype]}", "pi" + "pppi" + "pppp" + "iiiii",
        x_ND, x_ND.stride(0), *routes.arguments(N), w13, w2, y_ND, h_MH if keep else None, *sizes,
    )  # fmt: skip
    return y_ND, h_MH


def backward(
    dy_ND: Tensor, x_ND: Tensor, routes: Routes, w13: Tensor, w2: Tensor, h_MH: Tensor,
    dw13: Tensor | None, dw2: Tensor | None, add: bool = False, operands: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns the gradients of x and of the gates, and with `operands` act [M, F] and dh [M, 2F] for `weight_gradient`.
    Gradients of the weights are written to `dw13` and `dw2`, or with `add` added to them; both are float32 or both have
    the dtype of the weights."""
    dx_ND = torch.empty_like(dy_ND)
    dgate = None if routes.gate is None else torch.empty_like(routes.gate)
    act_MF = h_MH.new_empty(len(h_MH), w2.shape[-1]) if operands else None
    dh_MH = torch.empty_like(h_MH) if operands or threads() > 1 else None  # threads share dx by token, not by expert
    _call(
        x_ND.dtype, dy_ND, x_ND, x_ND.stride(0), routes, w13, w2, h_MH, dx_ND, dgate, dw13, dw2, add, act_MF, dh_MH,
        False, *_sizes(x_ND, w2),
    )  # fmt: skip
    return dx_ND, dgate, act_MF, dh_MH


def weight_gradient(tokens_ND: Tensor, routes: Routes, inner_MX: Tensor, dw: Tensor, by_inner: bool) -> None:
    """Writes dw2 = dy^T act for `tokens_ND` = dy, or with `by_inner` dw13 = dh^T x for `tokens_ND` = x."""
    N, D, E, F = len(tokens_ND), tokens_ND.shape[1], routes.count_E.numel(), inner_MX.shape[1]
    sizes = (N, D, E, F // 2 if by_inner else F, threads())
    dy_ND, act_MF, dw2 = (None, None, None) if by_inner else (tokens_ND, inner_MX, dw)
    x_ND, dh_MH, dw13 = (tokens_ND, inner_MX, dw) if by_inner else (None, None, None)
    _call(
        tokens_ND.dtype, dy_ND, x_ND, tokens_ND.stride(0), routes, *(None,) * 5, dw13, dw2, False, act_MF, dh_MH, True,
        *sizes,
    )  # fmt: skip


def _call(dtype: torch.dtype, dy_ND: Tensor | None, x_ND: Tensor | None, ldx: int, routes: Routes, *rest) -> None:
    *tensors, dw13, dw2, add, act_MF, dh_MH, ready, N, D, E, F, n = rest
    wide = all(dw is None or dw.dtype == torch.float32 for dw in (dw13, dw2))
    call(
        f"experts_backward_{DTYPES[dtype]}", "ppi" + "pppi" + "ppp" + "pppp" + "ii" + "ppi" + "iiiii",
        dy_ND, x_ND, ldx, *routes.arguments(N), *tensors, dw13, dw2, wide, add, act_MF, dh_MH, ready, N, D, E, F, n,
    )  # fmt: skip


# --- as one operation ------------------------------------------------------------------------------------------------


def expert_ffn(rows_MD: Tensor, weight_M: Tensor, count_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`model.moe.expert_ffn`."""
    return _Experts.apply(rows_MD, weight_M, count_E, None, w13, w2, torch.is_grad_enabled())


def routed_ffn(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`model.moe.routed_ffn`."""
    order_M, count_E = expert_order(expert_NK, len(w2))
    return _Experts.apply(x_ND, weight_NK, count_E, order_M, w13, w2, torch.is_grad_enabled())


def swiglu(x: Tensor, ffn: FFN) -> Tensor:
    """`model.moe.swiglu`."""
    x_ND = x.flatten(0, -2)
    count_E = torch.tensor([len(x_ND)])
    y_ND = _Experts.apply(x_ND, None, count_E, None, ffn.w13.weight, ffn.w2.weight, torch.is_grad_enabled())
    return y_ND.view(x.shape)


def serves_dense(x: Tensor, ffn: FFN) -> bool:
    """Whether calling the matrices of an FFN only applies their weights, which the kernel takes."""
    return _plain(ffn.w13) and _plain(ffn.w2) and serves(x.flatten(0, -2), ffn.w13.weight, ffn.w2.weight)


def _plain(linear: nn.Module) -> bool:
    """Whether the module has not been replaced and has no hooks."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return isinstance(linear, nn.Linear) and not hooks


class _Experts(torch.autograd.Function):
    """Saves its arguments and h. Backward adds weight gradients directly to the parameters' float32 gradients if
    `deferred.own_gradient` allows."""

    @staticmethod
    def forward(ctx, x_ND, weight, count_E, order_M, w13, w2, keep):
        routes = _routes(weight, count_E, order_M)
        y_ND, h_MH = forward(x_ND, routes, w13, w2, keep)
        ctx.save_for_backward(x_ND, weight, count_E, order_M, w13, w2, h_MH)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND):
        x_ND, weight, count_E, order_M, w13, w2, h_MH = ctx.saved_tensors
        dy_ND, routes = dy_ND.contiguous(), _routes(weight, count_E, order_M)
        dw13 = dw2 = None
        if deferred.store_of(w13) is not None:
            dx, dweight, act, dh = backward(dy_ND, x_ND, routes, w13, w2, h_MH, None, None, operands=True)
            assert act is not None and dh is not None
            dw2 = deferred.gradient(w2, lambda: _later(dy_ND, act, routes, w2, by_inner=False))
            dw13 = deferred.gradient(w13, lambda: _later(x_ND, dh, routes, w13, by_inner=True))
        elif (own13 := deferred.own_gradient(w13)) is not None and (own2 := deferred.own_gradient(w2)) is not None:
            dx, dweight = backward(dy_ND, x_ND, routes, w13, w2, h_MH, own13, own2, add=True)[:2]
        else:
            dw13, dw2 = torch.empty_like(w13), torch.empty_like(w2)
            dx, dweight = backward(dy_ND, x_ND, routes, w13, w2, h_MH, dw13, dw2)[:2]
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None, dw13, dw2, None


def _routes(weight: Tensor | None, count_E: Tensor, order_M: Tensor | None) -> Routes:
    return Routes(count_E.contiguous(), order_M, None if weight is None else weight.float().contiguous())


def _later(tokens_ND: Tensor, inner_MX: Tensor, routes: Routes, w: Tensor, by_inner: bool) -> Tensor:
    """`weight_gradient` in a tensor of its own."""
    dw = torch.empty_like(w, dtype=torch.float32)
    weight_gradient(tokens_ND, routes._replace(gate=None), inner_MX, dw, by_inner)
    return dw
