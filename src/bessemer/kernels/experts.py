"""SwiGLU of routed experts with dispatch and combine, or of one dense FFN (`expert_ffn`).

Rows are sorted by expert, `count_E` rows each. With an order, row m is choice order_M[m] = n * K + k of token n, and
results are summed per token; without an order it is row m of x. `gate` holds the float32 weight of each choice; None:
1. A dense FFN is one expert: w13 [2F, D] and w2 [D, F].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.kernels.library import DTYPES, available, call, fits, threads


def serves(x_ND: Tensor, w13: Tensor, w2: Tensor) -> bool:
    return (
        fits(x_ND, w13, w2)
        and x_ND.stride(-1) == 1
        and w13.is_contiguous()
        and w2.is_contiguous()
        and min(x_ND.numel(), w2.numel()) > 0
    )


def sorts(expert_NK: Tensor) -> bool:
    return expert_NK.device.type == "cpu" and expert_NK.dtype == torch.int64 and available()


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
