"""The three GEMMs of a linear layer in FP8 (V3 3.3.1, 3.3.2).

    forward           y  = x W^T      x by tiles, W by blocks
    input_gradient    dx = dy W       dy by tiles along the outputs, W by the same blocks, transposed
    weight_gradient   dW = dy^T x     both by tiles along the tokens: an operand saved in FP8 is dequantised and
                                      quantised again, one saved in higher precision is quantised once

Requantising rounds a second time, unless old and new factors are powers of two (V3 3.3.3): then only values below 2^-15
of the new tile's largest, for which that tile is too coarse, change.

Each works on one matrix, or with `count` on the matrices of G experts with rows in expert order; tiles never span two
experts. `fp8_layers` decides which activations a layer saves, and in which format; `weights` keeps the weights'
operands for a step.

Shapes: T tokens, K inputs, N outputs, G experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bessemer.addons.accelerate.precision import backends, emulation, weights
from bessemer.addons.accelerate.precision.block_fp8 import factor
from bessemer.addons.accelerate.precision.formats import round_mantissa
from bessemer.addons.accelerate.precision.operand import TILE, Counts, DeviceCounts, Group, Operand, quantise_by


@dataclass(frozen=True)
class FP8Recipe:
    """How operands are quantised and summed; the defaults are the paper's."""

    activation: Group = "tile"
    gradient: Group = "tile"
    """"block" is the variant that diverged on a 16B model (V3 App. B.2)."""
    weight: Group = "block"
    power_of_two: bool = False
    """Round every factor up to a power of two. The paper's cases (dispatched activations, attention's output) always
    are."""
    bits: int | None = None
    """Significant bits of the accumulator inside a block (an H800 keeps about 14); None: float32."""
    kept_bits: int | None = None
    """First round every activation, gradient and weight to so many mantissa bits: controls that must hurt training."""
    scaling: Literal["own", "none", "outlier"] = "own"
    """How a group gets its factor. Two controls have one factor per tensor. none: a factor of 1, so that most of a
    gradient vanishes. outlier: the factor the tensor would need if its first channel were OUTLIER times as large.
    E4M3's exponent absorbs most of that: only values below a 250th of the other channels' largest vanish."""

    @property
    def by_tiles(self) -> bool:
        """Whether activations and gradients are quantised by tiles, unmodified, so that fused kernels can do it."""
        return self.activation == self.gradient == "tile" and self.kept_bits is None and self.scaling == "own"

    def quantised(self, x: Tensor, power_of_two: bool = False) -> Operand:
        """Quantises an activation [..., K] as the rows of an operand."""
        return self._quantised(x.flatten(0, -2), self.activation, power_of_two)

    def quantised_gradient(self, dy: Tensor, power_of_two: bool = False) -> Operand:
        return self._quantised(dy.flatten(0, -2), self.gradient, power_of_two)

    def quantised_weight(self, weight: Tensor) -> Operand:
        return self._quantised(weight, self.weight)

    def _quantised(self, x: Tensor, group: Group, power_of_two: bool = False) -> Operand:
        x = x if self.kept_bits is None else round_mantissa(x.detach(), self.kept_bits)
        return self.scaled(x, group, power_of_two)

    def scaled(self, x: Tensor, group: Group, power_of_two: bool = False) -> Operand:
        """Quantises x with the recipe's factors."""
        if self.scaling == "own" or not x.numel():
            return backends.quantise(x, group, self.power_of_two or power_of_two)
        if self.scaling == "none":
            return quantise_by(x, x.new_ones((), dtype=torch.float32))
        largest = torch.maximum(x.detach().abs().amax((-2, -1)), OUTLIER * x.detach()[..., 0].abs().amax(-1))
        return quantise_by(x, factor(largest.float()))


OUTLIER = 1000.0
PAPER = FP8Recipe()
FP8_RECIPES = {
    "paper": PAPER,
    "power-of-two": FP8Recipe(power_of_two=True),
    "block-gradients": FP8Recipe(gradient="block"),
    "per-tensor": FP8Recipe(activation="tensor", gradient="tensor", weight="tensor"),
    "short-sums": FP8Recipe(bits=14),
    "coarse": FP8Recipe(kept_bits=2),
    "coarsest": FP8Recipe(kept_bits=0),
    "unscaled": FP8Recipe("tensor", "tensor", "tensor", scaling="none"),
    "outlier": FP8Recipe("tensor", "tensor", "tensor", scaling="outlier"),
}
"""Values of the key `fp8`: the paper's recipe; all factors powers of two (as in V3.1); the variant that diverged (V3
App. B.2); one factor per tensor, with which others needed E5M2 for gradients; an H800's accumulator; and controls:
twice and eight times the rounding error, no factors, and one channel that takes up the range of all others."""
Count = Counts | None


def forward(x: Operand, weight: Tensor, recipe: FP8Recipe, count: Count = None) -> Tensor:
    """x W^T in W's dtype, [T, N]; weight [N, K], or [G, N, K] with `count`."""
    return _product(x, weights.operand(weight, recipe), weight.dtype, recipe, count)


def input_gradient(dy: Operand, weight: Tensor, recipe: FP8Recipe, count: Count = None) -> Tensor:
    """dy W in W's dtype, [T, K]."""
    return _product(dy, weights.turned(weight, recipe), weight.dtype, recipe, count)


def _product(x: Operand, w: Operand, dtype: torch.dtype, recipe: FP8Recipe, count: Count) -> Tensor:
    if recipe.bits is not None:
        return _short_product(x, w, recipe.bits, count).to(dtype)
    w_group: Group = "block" if recipe.weight == "block" else "tile"
    if count is None:
        return backends.gemm(x, w, dtype, w_group)
    return backends.grouped_gemm(x, count, w, dtype, w_group)


def _short_product(x: Operand, w: Operand, bits: int, count: Count) -> Tensor:
    """`reference_gemm`, which models a short accumulator; one per expert."""
    if count is None:
        return emulation.reference_gemm(x, w, bits)
    assert not isinstance(count, DeviceCounts), "a product for every group needs the counts"
    rows = zip(*(part.split(list(count)) for part in x), *w, strict=True)
    return torch.cat([emulation.reference_gemm(Operand(vx, sx), Operand(vw, sw), bits) for vx, sx, vw, sw in rows])


class TokenTiles(NamedTuple):
    """A matrix [T, K] transposed and quantised along its tokens: all that a weight gradient needs of it."""

    operand: Operand


def token_tiles(x: Tensor, recipe: FP8Recipe, count: Count = None, power_of_two: bool = False) -> TokenTiles:
    """Quantises along the tokens an activation that was saved in higher precision than FP8."""
    return TokenTiles(_along_tokens(x, recipe, recipe.activation, power_of_two, count))


def weight_gradient(
    dy: Operand | TokenTiles, x: Operand | TokenTiles, recipe: FP8Recipe, count: Count = None, dy_powers: bool = False,
    x_powers: bool = False, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dy^T x in float32, [N, K] or [G, N, K]. `dy_powers`, `x_powers`: the operand was quantised with powers of two and
    is re-tiled with them. `add_to`: the result is added to this tensor, which saves one of its size."""
    if isinstance(dy, TokenTiles):
        dy_operand = dy.operand
    else:
        dy_operand = _along_tokens(dy, recipe, recipe.gradient, dy_powers, count)
    if isinstance(x, TokenTiles):
        right = x.operand
    else:
        right = _along_tokens(x, recipe, recipe.activation, x_powers, count)
    if recipe.bits is not None:
        assert not isinstance(count, DeviceCounts), "a product for every group needs the counts"
        ends = None if count is None else [-(-tokens // TILE) for tokens in count]
        parts = zip(_columns(dy_operand, ends), _columns(right, ends), strict=True)
        products = [emulation.reference_gemm(*part, recipe.bits) for part in parts]
        product = products[0] if count is None else torch.stack(products)
        return product if add_to is None else add_to.add_(product)
    if count is None:
        return backends.gemm(dy_operand, right, torch.float32, add_to=add_to)
    return backends.grouped_wgrad(dy_operand, right, count, add_to=add_to)


def _along_tokens(x: Operand | Tensor, recipe: FP8Recipe, group: Group, power_of_two: bool, count: Count) -> Operand:
    """The operand of a `TokenTiles`: groups run along the tokens, and each expert's tokens are padded to 128."""
    if isinstance(x, Operand) and group == "tile":
        return backends.retile(x, count, recipe.power_of_two or power_of_two)
    values = x.dequantise() if isinstance(x, Operand) else x
    return recipe.scaled(emulation.pad_groups(values, count).t(), group, power_of_two)


def _columns(operand: Operand, numbers: list[int] | None) -> list[Operand]:
    """Splits the columns into parts of `numbers` tiles each; None: not at all."""
    if numbers is None:
        return [operand]
    values = operand.value_MK.split([n * TILE for n in numbers], 1)
    return [Operand(*part) for part in zip(values, operand.scale_MJ.split(numbers, 1), strict=True)]
