"""A Linear whose three GEMMs are in FP8 (V3 3.3.1, 3.3.2; reference D.3, D.5).

    forward           y  = x W^T      x by tiles, W by blocks
    input_gradient    dx = dy W       dy by tiles along the outputs, W by the same blocks, turned round
    weight_gradient   dW = dy^T x     both by tiles along the tokens: what was kept in FP8 is read back and quantised
                                      again, what was kept better is quantised once

Each works for one matrix, or with `count` for the matrices of G experts on rows in expert order; tiles never reach from
one expert's tokens into the next one's. `fp8_linear` and `fp8_grouped_linear` join the three for autograd: x is kept in
FP8, W is quantised again in backward. What a layer of the network keeps is decided in `model/fp8`.

Shapes: T tokens, K inputs, N outputs, G experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.precision import backends, emulation, fp8_gemm
from bessemer.precision.tiles import TILE, Group, Operand, transpose


@dataclass(frozen=True)
class Recipe:
    """How operands are quantised and summed; the defaults are the paper's."""

    activation: Group = "tile"
    gradient: Group = "tile"
    """"block" is the variant that diverged on a 16B model (V3 App. B.2)."""
    weight: Group = "block"
    power_of_two: bool = False
    """Of every factor; those the paper wants so (what is sent to the experts, what attention keeps) are so anyway."""
    bits: int | None = None
    """Significant bits of the accumulator inside a block; None: float32."""

    def quantised(self, x: Tensor, power_of_two: bool = False) -> Operand:
        """An activation [..., K] as rows of an operand."""
        return backends.quantise(x.flatten(0, -2), self.activation, self.power_of_two or power_of_two)

    def quantised_gradient(self, dy: Tensor, power_of_two: bool = False) -> Operand:
        return backends.quantise(dy.flatten(0, -2), self.gradient, self.power_of_two or power_of_two)

    def quantised_weight(self, weight: Tensor) -> Operand:
        return backends.quantise(weight, self.weight, self.power_of_two)


PAPER = Recipe()
RECIPES = {
    "paper": PAPER,
    "power-of-two": Recipe(power_of_two=True),
    "block-gradients": Recipe(gradient="block"),
    "per-tensor": Recipe(activation="tensor", gradient="tensor", weight="tensor"),
}
"""What a recipe may ask for: the paper's; all factors powers of two (as V3.1 does); the variant that diverged (V3 App.
B.2); and one factor for a whole tensor, which needed E5M2 for gradients elsewhere."""
Count = Sequence[int] | None


def forward(x: Operand, weight: Tensor, recipe: Recipe, count: Count = None) -> Tensor:
    """x W^T in W's dtype, [T, N]; weight [N, K], or [G, N, K] with `count`."""
    return _product(x, recipe.quantised_weight(weight), weight.dtype, recipe, count)


def input_gradient(dy: Operand, weight: Tensor, recipe: Recipe, count: Count = None) -> Tensor:
    """dy W in W's dtype, [T, K]."""
    return _product(dy, transpose(recipe.quantised_weight(weight)), weight.dtype, recipe, count)


def _product(x: Operand, w: Operand, dtype: torch.dtype, recipe: Recipe, count: Count) -> Tensor:
    if recipe.bits is not None:
        return _short_product(x, w, recipe.bits, count).to(dtype)
    w_group: Group = "block" if recipe.weight == "block" else "tile"
    if count is None:
        return backends.gemm(x, w, dtype, w_group)
    return backends.grouped_gemm(x, count, w, dtype, w_group)


def _short_product(x: Operand, w: Operand, bits: int, count: Count) -> Tensor:
    """By the reference, which can show a short accumulator."""
    if count is None:
        return fp8_gemm.gemm(x, w, bits)
    rows = zip(*(part.split(list(count)) for part in x), *w, strict=True)
    return torch.cat([fp8_gemm.gemm(Operand(vx, sx), Operand(vw, sw), bits) for vx, sx, vw, sw in rows])


class Turned(NamedTuple):
    """A matrix [T, K] quantised along its tokens, on its side: all that a weight gradient reads of it."""

    operand: Operand


def turned(x: Tensor, recipe: Recipe, count: Count = None, power_of_two: bool = False) -> Turned:
    """Of what was kept better than in FP8."""
    return Turned(_along_tokens(x, recipe.activation, recipe.power_of_two or power_of_two, count))


def weight_gradient(dy: Operand, x: Operand | Turned, recipe: Recipe, count: Count = None) -> Tensor:
    """dy^T x in float32, [N, K] or [G, N, K]."""
    left = _along_tokens(dy, recipe.gradient, recipe.power_of_two, count)
    right = x.operand if isinstance(x, Turned) else _along_tokens(x, recipe.activation, recipe.power_of_two, count)
    if recipe.bits is not None:
        ends = [None] if count is None else [-(-tokens // TILE) for tokens in count]
        parts = zip(_columns(left, ends), _columns(right, ends), strict=True)
        found = [fp8_gemm.gemm(*part, recipe.bits) for part in parts]
        return found[0] if count is None else torch.stack(found)
    if count is None:
        return backends.gemm(left, right, torch.float32)
    return backends.grouped_wgrad(left, right, count)


def _along_tokens(x: Operand | Tensor, group: Group, power_of_two: bool, count: Count) -> Operand:
    """Turned, in tiles (or the recipe's groups) along the tokens, those of every expert filled up to 128."""
    if isinstance(x, Operand) and group == "tile":
        return backends.turn(x, count, power_of_two)
    back = x.dequantise() if isinstance(x, Operand) else x
    return backends.quantise(emulation.filled(back, count).t(), group, power_of_two)


def _columns(operand: Operand, numbers: list[int | None]) -> list[Operand]:
    """Cut after so many tiles of columns; None: not at all."""
    if numbers == [None]:
        return [operand]
    values = operand.value_MK.split([n * TILE for n in numbers], 1)
    return [Operand(*part) for part in zip(values, operand.scale_MJ.split(numbers, 1), strict=True)]


def fp8_linear(x_TK: Tensor, weight_NK: Tensor, recipe: Recipe = PAPER) -> Tensor:
    """x W^T in x's dtype, [..., N], for x [..., K]."""
    return _Linear.apply(x_TK.flatten(0, -2), None, weight_NK, recipe).unflatten(0, x_TK.shape[:-1])


def fp8_grouped_linear(x_TK: Tensor, count: Sequence[int], weight_GNK: Tensor, recipe: Recipe = PAPER) -> Tensor:
    """Tokens in the order of their experts, `count` of each, through each expert's own matrix, [T, N]."""
    if sum(count) != len(x_TK) or len(count) != len(weight_GNK):
        raise ValueError(
            f"{len(count)} groups of {sum(count)} tokens in all do not fit {len(x_TK)} tokens and {len(weight_GNK)} "
            "matrices"
        )
    return _Linear.apply(x_TK, count, weight_GNK, recipe)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK: Tensor, count: Count, weight: Tensor, recipe: Recipe) -> Tensor:
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
