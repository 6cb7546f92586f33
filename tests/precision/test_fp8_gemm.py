"""FP8 operands and GEMMs against loops in float64, the loss of a short accumulator, and a Linear's three products."""

import math

import pytest
import torch
from fp8_layers import fp8_grouped_linear, fp8_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.accelerate.precision import backends
from bessemer.addons.accelerate.precision.block_fp8 import quantise_blocks
from bessemer.addons.accelerate.precision.emulation import reference_gemm
from bessemer.addons.accelerate.precision.formats import round_mantissa
from bessemer.addons.accelerate.precision.fp8_linear import FP8_RECIPES, FP8Recipe
from bessemer.addons.accelerate.precision.operand import TILE, Operand, as_float32, quantise, transpose

torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(actual, expected):
    """Relative distance as in DeepGEMM's calc_diff: 1 - 2 <a, b> / (|a|^2 + |b|^2)."""
    actual, expected = actual.double(), expected.double()
    return float(1 - 2 * (actual * expected).sum() / (actual.square().sum() + expected.square().sum()))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 200), columns=st.integers(1, 300), seed=st.integers(0, 99),
    group=st.sampled_from(["tile", "block", "tensor"]), power_of_two=st.booleans(),
)  # fmt: skip
def test_quantise_equals_a_loop(rows, columns, seed, group, power_of_two):
    x = normal(rows, columns, seed=seed) * torch.logspace(-3, 3, columns)
    actual = quantise(x, group, power_of_two)
    height = {"tile": 1, "block": TILE, "tensor": rows}[group]
    width = columns if group == "tensor" else TILE
    for top in range(0, rows, height):
        for column in range(0, columns, width):
            part = x[top : top + height, column : column + width]
            factor = (part.abs().max() / 448.0).double()
            if power_of_two:
                factor = 2.0 ** torch.ceil(torch.log2(factor))
            expected = (part / factor.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(actual.value_MK[top : top + height, column : column + width].float(), expected.float())
            scales = actual.scale_MJ[top : top + height, column // TILE : -(-(column + part.shape[1]) // TILE)]
            assert torch.equal(scales, factor.float().expand_as(scales))


def test_weights_are_quantised_as_in_checkpoints():
    weight = normal(300, 200)
    value, scale = quantise_blocks(weight)
    operand = quantise(weight, "block")
    assert torch.equal(operand.value_MK.view(torch.uint8), value.view(torch.uint8))
    assert torch.equal(operand.scale_MJ[::TILE], scale)


def test_powers_of_two_are_exact_and_no_larger_than_needed():
    x = torch.tensor([[448.0], [448.1], [224.0], [447.9], [1e-30]])
    assert quantise(x, power_of_two=True).scale_MJ.flatten().tolist()[:4] == [1.0, 2.0, 0.5, 1.0]


def test_edge_values():
    x = torch.zeros(4, 2 * TILE)
    x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), 1e-44
    dequantised = quantise(x).dequantise()
    assert dequantised[0].eq(0).all() and dequantised[3].eq(0).all() and quantise(x).scale_MJ[0].tolist() == [1.0, 1.0]
    for row in (1, 2):
        assert dequantised[row, :TILE].isnan().all() and dequantised[row, TILE:].eq(0).all()
    for bad in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="is a matrix of floats"):
            quantise(bad)
    for empty in (torch.zeros(0, 200), torch.zeros(200, 0)):
        assert quantise(empty).dequantise().shape == empty.shape


@pytest.mark.parametrize("group", ["tile", "block", "tensor"])
def test_a_stack_is_quantised_matrix_by_matrix(group):
    stack = normal(3, 140, 200) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    stacked = quantise(stack, group)
    for g in range(3):
        alone = quantise(stack[g], group)
        assert torch.equal(stacked.scale_MJ[g], alone.scale_MJ)
        assert torch.equal(stacked.dequantise()[g], alone.dequantise())


def test_the_order_in_memory_changes_nothing():
    x = normal(200, 150) * torch.logspace(-3, 3, 150)
    turned, straight = quantise(x.t()), quantise(x.t().contiguous())
    assert torch.equal(turned.scale_MJ, straight.scale_MJ)
    assert torch.equal(turned.dequantise(), straight.dequantise())


def test_every_value_of_the_format_is_read_back():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = ~every.float().isnan()
    assert torch.equal(as_float32(every)[finite], every.float()[finite])


@pytest.mark.parametrize("shape", [(256, 384), (70, 300), (1, 1), (129, 127)])
@pytest.mark.parametrize("group", ["block", "tensor"])
def test_blocks_turn_without_rounding(shape, group):
    operand = quantise(normal(*shape), group)
    assert torch.equal(transpose(operand).dequantise(), operand.dequantise().t())


@pytest.mark.parametrize("M, N, K", [(5, 7, 128), (130, 140, 300), (1, 1, 1), (33, 257, 129)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_gemm_against_float64(M, N, K, power_of_two):
    x, w = quantise(normal(M, K), "tile", power_of_two), quantise(normal(N, K, seed=1), "block", power_of_two)
    exact = x.dequantise().double() @ w.dequantise().double().t()
    assert (reference_gemm(x, w) - exact).abs().max() < 1e-6 * exact.abs().max() + 1e-5
    assert apart(reference_gemm(x, w), normal(M, K).double() @ normal(N, K, seed=1).double().t()) < 2e-3


def test_a_short_accumulator_and_its_cure():
    """V3 3.3.2: K = 4096, random matrices, errors near 2 % with about 14 bits; promotion every 128 cures it."""
    x, w = quantise(normal(256, 4096), "tensor"), quantise(normal(256, 4096, seed=1), "tensor")
    exact = x.dequantise().double() @ w.dequantise().double().t()

    def largest(**how):
        return float((reference_gemm(x, w, **how).double() - exact).abs().max() / exact.square().mean().sqrt())

    assert 0.01 < largest(bits=14, promote=None) < 0.03
    assert largest(bits=14) < 0.001 and largest(bits=14, promote=32) < largest(bits=14)
    assert largest() < 1e-5


@pytest.mark.parametrize("bits", [6, 11, 14])
def test_a_short_accumulator_equals_a_loop(bits):
    """Exact sums of 32 products in float64, each truncated to `bits` bits in turn. All values are whole numbers that
    float32 holds, so nothing else is rounded."""
    draw = torch.Generator().manual_seed(0)

    def operand(rows):
        integers = torch.randint(-8, 17, (rows, 256), generator=draw)
        integers[:, ::50] = 448  # large, so that the sums after it run out of bits
        return Operand(integers.to(torch.float8_e4m3fn), 2.0 ** torch.randint(-2, 3, (rows, 2), generator=draw))

    x, w = operand(5), operand(7)
    products, changed = reference_gemm(x, w, bits), 0
    for m in range(5):
        for n in range(7):
            y = 0.0
            for j in range(2):
                total = 0.0
                for start in range(TILE * j, TILE * (j + 1), 32):
                    for k in range(start, start + 32):
                        total += float(x.value_MK[m, k]) * float(w.value_MK[n, k])
                    mantissa, exponent = math.frexp(total)
                    short = math.ldexp(math.trunc(mantissa * 2**bits), exponent - bits)
                    changed += short != total
                    total = short
                y += total * float(x.scale_MJ[m, j]) * float(w.scale_MJ[n, j])
            assert float(products[m, n]) == y
    assert changed > 20


def test_two_mantissa_bits_and_none():
    """The controls' rounding against values computed by hand; about twice the error of E4M3."""
    x = torch.tensor([1.0, 1.12, 1.13, -1.375, 1.125, 0.0, 1.2 * 2.0**-66, float("inf")])
    assert round_mantissa(x, 2).tolist() == [1.0, 1.0, 1.25, -1.5, 1.0, 0.0, 1.25 * 2.0**-66, float("inf")]
    assert round_mantissa(x, 0).tolist() == [1.0, 1.0, 1.0, -1.0, 1.0, 0.0, 2.0**-66, float("inf")]
    assert round_mantissa(torch.tensor([1.51, -3.2]), 0).tolist() == [2.0, -4.0]
    x = normal(64, 256)
    error = {name: apart(FP8_RECIPES[name].quantised(x).dequantise(), x) for name in ("paper", "coarse", "coarsest")}
    assert 3.5 < error["coarse"] / error["paper"] < 6  # squares of errors, with E4M3's own on top
    assert 8 < error["coarsest"] / error["coarse"] < 16  # steps four times as wide; E4M3's own counts below the line


def test_controls_without_their_own_factors():
    """`unscaled` has no factors: values below E4M3's smallest vanish, and values above 448 are clipped. `outlier` takes
    its range from all other values: it gives exactly what per-tensor quantisation with an outlier would give."""
    x = torch.tensor([[2.0**-11, -(2.0**-9), 1.0, 500.0, -1e6]])
    assert FP8_RECIPES["unscaled"].quantised(x).dequantise().tolist() == [[0.0, -(2.0**-9), 1.0, 448.0, -448.0]]
    x = normal(64, 256)
    larger = x.clone()
    larger[:, 0] *= 1000
    actual, like = FP8_RECIPES["outlier"].quantised(x).dequantise(), quantise(larger, "tensor").dequantise()
    assert torch.equal(actual[:, 1:], like[:, 1:])
    assert (actual[:, 1:] == 0).float().mean() > 0.002 and (
        FP8_RECIPES["per-tensor"].quantised(x).dequantise() != 0
    ).all()
    stack = torch.stack([normal(40, 60), 9 * normal(40, 60, seed=1)])
    by_matrix = [FP8_RECIPES["outlier"].quantised_weight(matrix) for matrix in stack]
    stacked = FP8_RECIPES["outlier"].quantised_weight(stack)
    assert all(torch.equal(stacked.scale_MJ[g], by_matrix[g].scale_MJ) for g in range(2))


def test_what_cannot_be_multiplied():
    x, w = quantise(normal(4, 256)), quantise(normal(4, 128))
    with pytest.raises(ValueError, match="256 and 128 columns"):
        reference_gemm(x, w)
    with pytest.raises(ValueError, match="multiple of 32"):
        reference_gemm(x, x, promote=48)
    with pytest.raises(ValueError, match="quantise by tensor"):
        reference_gemm(x, x, promote=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_and_its_gradients(dtype):
    x, weight, dy = normal(3, 50, 300).to(dtype), normal(200, 300, seed=1), normal(3, 50, 200, seed=2).to(dtype)
    x.requires_grad_(), weight.requires_grad_()
    y = fp8_linear(x, weight)
    y.backward(dy)
    flat_x, flat_dy = x.detach().double().flatten(0, 1), dy.double().flatten(0, 1)
    assert y.dtype == x.grad.dtype == dtype and weight.grad.dtype == torch.float32 and y.shape == dy.shape
    assert apart(y.detach().flatten(0, 1), flat_x @ weight.detach().double().t()) < 2e-3
    assert apart(x.grad.flatten(0, 1), flat_dy @ weight.detach().double()) < 2e-3
    assert apart(weight.grad, flat_dy.t() @ flat_x) < 3e-3
    turned = [quantise(quantise(t.float()).dequantise().t()) for t in (flat_dy, flat_x)]
    assert apart(weight.grad, reference_gemm(*turned)) < 1e-12  # re-tiled from what was kept, not the original


@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_serves_a_cpu_is_the_gemm(power_of_two):
    """One float32 GEMM of the dequantised operands against the block-by-block reference, experts included."""
    x, w = quantise(normal(60, 300), "tile", power_of_two), quantise(normal(3, 90, 300, seed=1), "block", power_of_two)
    by_group = [Operand(w.value_MK[g], w.scale_MJ[g]) for g in range(3)]
    for group in ("tile", "block"):
        assert apart(backends.gemm(x, by_group[0], torch.float32, group), reference_gemm(x, by_group[0])) < 1e-12
    count = [25, 0, 35]
    actual = backends.grouped_gemm(x, count, w, torch.float32, "block")
    rows = [Operand(x.value_MK[part], x.scale_MJ[part]) for part in (slice(0, 25), slice(25, 60))]
    assert apart(actual[:25], reference_gemm(rows[0], by_group[0])) < 1e-12
    assert apart(actual[25:], reference_gemm(rows[1], by_group[2])) < 1e-12


@pytest.mark.parametrize("gradient", ["tile", "block", "tensor"])
@pytest.mark.parametrize("bits", [None, 12])
def test_experts_whose_rows_begin_anywhere(gradient, bits):
    """Groups of 70, 0 and 130 rows: no block of the gradient may be read with another block's factor."""
    recipe, count = FP8Recipe(gradient=gradient, bits=bits), [70, 0, 130]
    x, weight = normal(200, 160).requires_grad_(), normal(3, 140, 160, seed=1).requires_grad_()
    dy = normal(200, 140, seed=2) * torch.logspace(0, 3, 200)[:, None]
    y = fp8_grouped_linear(x, count, weight, recipe)
    y.backward(dy)
    start = 0
    for g, rows in enumerate(count):
        part = slice(start, start + rows)
        start += rows
        exact_x, exact_w = x.detach()[part].double(), weight.detach()[g].double()
        if rows:
            assert apart(y.detach()[part], exact_x @ exact_w.t()) < 2e-3
            assert apart(x.grad[part], dy[part].double() @ exact_w) < 3e-3
            assert apart(weight.grad[g], dy[part].double().t() @ exact_x) < 3e-3
    assert weight.grad[1].eq(0).all()


def test_outliers_hurt_blocks_more_than_tiles():
    """With outliers in the gradient's tokens, shows why 128 x 128 is not for gradients (V3 App. B.2). E4M3 itself spans
    2^18, so a block loses its other tokens only at factors beyond 10^4."""
    x, weight, dy = normal(256, 256), normal(256, 256, seed=1).requires_grad_(), normal(256, 256, seed=2)
    dy[::64] *= 1e5
    error = {}
    for group in ("tile", "block", "tensor"):
        y = fp8_linear(x.requires_grad_(), weight, FP8Recipe(gradient=group))
        x.grad = None
        y.backward(dy)
        error[group] = apart(x.grad[1::64], dy[1::64].double() @ weight.detach().double())
    assert error["tile"] < 2e-3 and min(error["block"], error["tensor"]) > 100 * error["tile"]


def test_experts_do_not_share_tiles():
    x, weight = normal(300, 130).requires_grad_(), normal(3, 70, 130, seed=1).requires_grad_()
    count = [100, 0, 200]
    y = fp8_grouped_linear(x, count, weight)
    y.square().sum().backward()
    for g, rows in ((0, slice(0, 100)), (2, slice(100, 300))):
        own_x, own_w = x.detach()[rows].requires_grad_(), weight.detach()[g].requires_grad_()
        own = fp8_linear(own_x, own_w)
        own.square().sum().backward()
        assert torch.equal(y[rows], own) and torch.equal(x.grad[rows], own_x.grad)
        # Shared tiles would differ by E4M3 rounding, some 1e-2. Where rows begin in memory decides which GEMM kernel
        # serves, and so the order of these sums: the last bits of float32 may differ (they do on an AMD EPYC).
        assert (weight.grad[g] - own_w.grad).norm() <= 1e-6 * own_w.grad.norm()
    assert weight.grad[1].eq(0).all()
    with pytest.raises(ValueError, match="do not fit 300 tokens"):
        fp8_grouped_linear(x, [1, 2, 3], weight)
