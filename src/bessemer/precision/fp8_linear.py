"""A Linear whose three GEMMs are in FP8, as an autograd function over the emulated GEMM (V3 3.3.1, 3.3.2; reference
D.3, D.5).

    fprop   y  = x W^T      x by tiles, W by blocks
    dgrad   dx = dy W       dy by tiles along the outputs, W by the same blocks, turned round
    wgrad   dW = dy^T x     both by tiles along the tokens: what is kept of x is FP8 already, so it is read back, turned
                            and quantised again, and dy likewise

x is kept for wgrad in FP8, one byte an element. Outputs have x's dtype, dW float32 wherever the weight is (the master's
precision); the sum over micro-batches is the caller's.

Shapes: T tokens, K inputs, N outputs, G experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.precision.fp8_gemm import gemm
from bessemer.precision.tiles import Group, Operand, quantise, transpose


@dataclass(frozen=True)
class Recipe:
    """How operands are quantised and summed; the defaults are the paper's."""

    activation: Group = "tile"
    gradient: Group = "tile"
    """"block" is the variant that diverged on a 16B model (V3 App. B.2)."""
    weight: Group = "block"
    power_of_two: bool = False
    bits: int | None = None
    """Significant bits of the accumulator inside a block; None: float32."""


PAPER = Recipe()


def fp8_linear(x_TK: Tensor, weight_NK: Tensor, recipe: Recipe = PAPER) -> Tensor:
    """x W^T in x's dtype, [..., N], for x [..., K]."""
    return _Linear.apply(x_TK.flatten(0, -2), weight_NK, recipe).unflatten(0, x_TK.shape[:-1])


def fp8_grouped_linear(x_TK: Tensor, count: Sequence[int], weight_GNK: Tensor, recipe: Recipe = PAPER) -> Tensor:
    """Tokens in the order of their experts, `count` of each, through each expert's own matrix, [T, N]. Tiles do not
    reach from one expert's tokens into the next one's."""
    if sum(count) != len(x_TK) or len(count) != len(weight_GNK):
        raise ValueError(
            f"{len(count)} groups of {sum(count)} tokens in all do not fit {len(x_TK)} tokens and {len(weight_GNK)} "
            "matrices"
        )
    parts = zip(x_TK.split(list(count)), weight_GNK.unbind(), strict=True)
    return torch.cat([_Linear.apply(x, weight, recipe) for x, weight in parts])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
        if x_TK.shape[-1] != weight_NK.shape[-1]:
            raise ValueError(f"{x_TK.shape[-1]} inputs for a weight of {weight_NK.shape[-1]}")
        x = quantise(x_TK, recipe.activation, recipe.power_of_two)
        w = quantise(weight_NK, recipe.weight, recipe.power_of_two)
        ctx.recipe, ctx.dtypes = recipe, (x_TK.dtype, weight_NK.dtype)
        ctx.save_for_backward(*x, *w)
        return gemm(x, w, recipe.bits).to(x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        recipe, (x_dtype, weight_dtype) = ctx.recipe, ctx.dtypes
        value_TK, scale_TJ, value_NK, scale_NJ = ctx.saved_tensors
        x, w = Operand(value_TK, scale_TJ), Operand(value_NK, scale_NJ)
        dy = quantise(dy_TN, recipe.gradient, recipe.power_of_two)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = gemm(dy, transpose(w), recipe.bits).to(x_dtype)
        if ctx.needs_input_grad[1]:
            turned = (_along_tokens(operand, group, recipe) for operand, group in (
                (dy, recipe.gradient), (x, recipe.activation)))  # fmt: skip
            dw = gemm(*turned, recipe.bits).to(weight_dtype)
        return dx, dw, None


def _along_tokens(operand: Operand, group: Group, recipe: Recipe) -> Operand:
    """From tiles of 1 x 128 to tiles of 128 x 1; blocks and whole tensors only turn."""
    if group != "tile":
        return transpose(operand)
    return quantise(operand.dequantise().t(), "tile", recipe.power_of_two)
