"""An FP8 linear layer as one autograd function: x is saved in FP8, and backward quantises W again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.precision.fp8_linear import PAPER, FP8Recipe, forward, input_gradient, weight_gradient
from bessemer.addons.accelerate.precision.operand import Operand


def fp8_linear(x_TK: Tensor, weight_NK: Tensor, recipe: FP8Recipe = PAPER) -> Tensor:
    """x W^T in x's dtype, [..., N], for x [..., K]."""
    return _Linear.apply(x_TK.flatten(0, -2), None, weight_NK, recipe).unflatten(0, x_TK.shape[:-1])


def fp8_grouped_linear(x_TK: Tensor, count: Sequence[int], weight_GNK: Tensor, recipe: FP8Recipe = PAPER) -> Tensor:
    """Tokens grouped by expert, `count` for each, through each expert's own matrix, [T, N]."""
    if sum(count) != len(x_TK) or len(count) != len(weight_GNK):
        raise ValueError(
            f"{len(count)} groups of {sum(count)} tokens in all do not fit {len(x_TK)} tokens and {len(weight_GNK)} "
            "matrices"
        )
    return _Linear.apply(x_TK, count, weight_GNK, recipe)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK: Tensor, count: Sequence[int] | None, weight: Tensor, recipe: FP8Recipe) -> Tensor:
        if x_TK.shape[-1] != weight.shape[-1]:
            raise ValueError(f"{x_TK.shape[-1]} inputs for a weight of {weight.shape[-1]}")
        x = recipe.quantised(x_TK)
        ctx.recipe, ctx.count, ctx.dtype = recipe, count, x_TK.dtype
        ctx.save_for_backward(*x, weight)
        return forward(x, weight, recipe, count).to(x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        *x, weight = ctx.saved_tensors
        dy = ctx.recipe.quantised_gradient(dy_TN)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(dy, weight, ctx.recipe, ctx.count).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            dw = weight_gradient(dy, Operand(*x), ctx.recipe, ctx.count)
        return dx, None, dw, None
