"""Block FP8 against element-by-element loops: ragged edges, both scale formats, the direction of the scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.accelerate.precision.block_fp8 import quantise_blocks
from bessemer.errors import UserError
from bessemer.hf.safetensors_reader import dequantise_blocks, scale_shape

torch.set_num_threads(1)


def normal(*shape, seed=0, std=0.006):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


@pytest.mark.parametrize(
    "shape, expected",
    [((1536, 7168), (12, 56)), ((24576, 1536), (192, 12)), ((576, 7168), (5, 56)), ((32768, 512), (256, 4)),
     ((7168, 16384), (56, 128)), ((18432, 7168), (144, 56)), ((7168, 2048), (56, 16))],
)  # fmt: skip
def test_published_scale_shapes(shape, expected):
    """Reference B.1; kv_a has five rows of tiles, and the last is half empty."""
    assert scale_shape(shape) == expected


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), block=st.integers(1, 9), seed=st.integers(0, 99))
def test_dequantise_equals_a_loop(rows, columns, block, seed):
    weight = normal(rows, columns, seed=seed, std=20).to(torch.float8_e4m3fn)
    scale = normal(*scale_shape((rows, columns), block), seed=seed + 1).abs()
    actual = dequantise_blocks(weight, scale, block, torch.float32)
    for r in range(rows):
        for c in range(columns):
            assert actual[r, c].item() == (weight[r, c].float() * scale[r // block, c // block]).item()


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (5, 129), (576, 64)])
def test_round_trip_error_matches_that_of_e4m3(shape, ue8m0):
    """Three mantissa bits: at most 1/16 of the value, or half the smallest step (2^-9 * S / 2) near zero."""
    weight = normal(*shape)
    stored, scale = quantise_blocks(weight, ue8m0=ue8m0)
    assert stored.dtype == torch.float8_e4m3fn and tuple(scale.shape) == scale_shape(shape)
    error = (dequantise_blocks(stored, scale, dtype=torch.float32) - weight).abs()
    assert (error <= weight.abs() / 16 + scale.max() * 2.0**-10).all()
    assert error.max() > 0
    again, same = quantise_blocks(dequantise_blocks(stored, scale, dtype=torch.float32), ue8m0=ue8m0)
    first = dequantise_blocks(stored, scale, dtype=torch.float32)
    assert torch.equal(dequantise_blocks(again, same, dtype=torch.float32), first)


def test_the_largest_value_of_a_tile_becomes_448():
    weight = normal(256, 256)
    stored, scale = quantise_blocks(weight)
    assert (stored.float().abs().view(2, 128, 2, 128).amax((1, 3)) == 448).all()
    torch.testing.assert_close(scale * 448, weight.abs().view(2, 128, 2, 128).amax((1, 3)))


def test_ue8m0_scales_are_powers_of_two_rounded_up():
    weight = normal(300, 140)
    _, plain = quantise_blocks(weight)
    stored, scale = quantise_blocks(weight, ue8m0=True)
    assert torch.equal(scale, torch.exp2(torch.log2(plain).ceil()))
    assert (scale >= plain).all() and (scale < 2 * plain).all()
    exponent_bytes = scale.to(torch.float8_e8m0fnu)
    assert torch.equal(dequantise_blocks(stored, exponent_bytes), dequantise_blocks(stored, scale))


def test_zero_tile_stays_zero():
    stored, scale = quantise_blocks(torch.zeros(130, 3))
    assert torch.equal(dequantise_blocks(stored, scale), torch.zeros(130, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_result_dtype_is_rounded_once(dtype):
    stored, scale = quantise_blocks(normal(64, 200))
    exact = dequantise_blocks(stored, scale, dtype=torch.float32)
    actual = dequantise_blocks(stored, scale, dtype=dtype)
    assert actual.dtype == dtype and torch.equal(actual, exact.to(dtype))


@pytest.mark.parametrize("wrong", [(4, 1), (5,), (5, 2), (1, 5)])
def test_scales_of_the_wrong_shape(wrong):
    with pytest.raises(UserError, match=r"\[576, 64\] in tiles of 128: expected \[5, 1\]"):
        dequantise_blocks(torch.zeros(576, 64).to(torch.float8_e4m3fn), torch.ones(wrong))
