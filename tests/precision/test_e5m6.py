"""The 12-bit format against its definition, and packing."""

import pytest
import torch

from bessemer.addons.accelerate.precision.formats import E5M6_MAX, pack_e5m6, round_e5m6
from bessemer.addons.accelerate.precision.operand import quantise


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_value():
    """All finite values of the format, from its definition."""
    man = torch.arange(64, dtype=torch.float64)
    subnormal = man * 2.0**-20
    return torch.cat([subnormal, *((1 + man / 64) * 2.0**e for e in range(-14, 16))])


def test_named_values():
    """Six bits of mantissa after the leading one, subnormals in steps of 2^-20, saturation."""
    x = torch.tensor([1.0, 1 + 2**-6, 1 + 2**-7, 1 + 3 * 2**-7, -3.1415926, 2**-14, 2**-20, 2**-22, 7e4, float("inf")])
    expected = [1.0, 1 + 2**-6, 1.0, 1 + 2**-5, -3.15625, 2**-14, 2**-20, 0.0, E5M6_MAX, float("inf")]
    assert round_e5m6(x).tolist() == expected
    assert round_e5m6(torch.tensor([float("nan")])).isnan().all() and every_value().max() == E5M6_MAX


def test_rounding_is_to_the_nearest_value_and_ties_to_even():
    """Against a search through the list of all values, half-way points included."""
    values = every_value()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * (1 + 2**-20), normal(5000).double().abs() * torch.logspace(-7, 4, 5000)])
    x = x[x < E5M6_MAX].float().double()
    above = torch.searchsorted(values, x).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    up, down = values[above] - x, x - values[below]
    even = torch.where(above % 2 == 0, above, below)  # one of two neighbours has an even last bit
    expected = values[torch.where(up < down, above, torch.where(down < up, below, even))]
    assert torch.equal(round_e5m6(x.float()).double(), expected)
    assert torch.equal(round_e5m6(-x.float()).double(), -expected)


@pytest.mark.parametrize("shape", [(5, 256), (3, 300), (4, 7), (0, 128)])
def test_packed_is_rounded_and_takes_a_byte_and_a_half(shape):
    x = (normal(*shape) * torch.logspace(-6, 6, shape[1])).bfloat16()
    scale = quantise(x, power_of_two=True).scale_MJ
    packed = pack_e5m6(x, scale)
    assert packed.code.dtype == torch.uint8 and packed.code.shape == (shape[0], 3 * (-(-shape[1] // 2)))
    spread = scale.repeat_interleave(128, 1)[:, : shape[1]]
    assert torch.equal(packed.unpack(shape[1], torch.float32), round_e5m6(x.float() / spread) * spread)
    assert torch.equal(packed.unpack(shape[1], torch.bfloat16).float(), packed.unpack(shape[1], torch.float32))


def test_a_tile_that_is_not_finite_comes_back_as_nan():
    x = normal(2, 256)
    x[1, 3] = float("inf")
    unpacked = pack_e5m6(x, quantise(x, power_of_two=True).scale_MJ).unpack(256, torch.float32)
    assert unpacked[1, :128].isnan().all() and unpacked[0].isfinite().all() and unpacked[1, 128:].isfinite().all()
