"""The Newton-Schulz kernel against the plain iterations in float64 and in BF16."""

import torch

from bessemer.addons.accelerate.kernels import muon
from bessemer.train import update_rules

BF16 = ("amx", "emulated-amx", "avx512bf16")
"""Instruction sets with products of BF16."""
SHAPES = ((1, 1, 1), (3, 5, 9), (2, 64, 128), (2, 130, 70), (1, 33, 33))


def iterated(x, dtype=torch.float32, scale=1.0):
    x = x.clone(memory_format=torch.contiguous_format)
    assert muon.serves(x)
    muon.newton_schulz_(x, update_rules.STEPS, update_rules.COEFFICIENTS, dtype, scale)
    return x


def test_equals_float64_for_wide_tall_and_odd_matrices(instructions):
    for N, R, C in SHAPES:
        x = torch.randn(N, R, C, generator=torch.Generator().manual_seed(R))
        exact = update_rules.newton_schulz(x.double(), torch.float64)
        torch.testing.assert_close(iterated(x).double(), exact, atol=2e-5, rtol=0)
        torch.testing.assert_close(iterated(x, scale=3.0), 3 * iterated(x), atol=1e-6, rtol=1e-6)


def test_bf16_is_as_near_as_torchs_iterations_in_bf16(instructions):
    """Rounded operands in some terms only, and exact ones in others, would be off by 1.7 times as much."""
    for N, R, C in SHAPES[2:]:
        x = torch.randn(N, R, C, generator=torch.Generator().manual_seed(R))
        exact = update_rules.newton_schulz(x.double(), torch.float64)
        actual, plain = iterated(x, torch.bfloat16), update_rules.newton_schulz(x, torch.bfloat16)
        assert (actual - exact).norm() < 1.15 * (plain - exact).norm()
        assert torch.equal(actual, iterated(x)) == (instructions not in BF16)  # elsewhere BF16 gains nothing


def test_zero_stays_zero_and_nan_stays_in_its_matrix(instructions):
    x = torch.randn(3, 20, 30)
    x[0], x[2, 3, 4] = 0.0, torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        actual = iterated(x, dtype)
        assert not actual[0].any()
        assert actual[1].isfinite().all()
        assert actual[2].isnan().any()


def test_bits_do_not_depend_on_threads_or_neighbours(instructions):
    x = torch.randn(7, 24, 40)
    for dtype in (torch.float32, torch.bfloat16):
        stacked = iterated(x, dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        assert torch.equal(iterated(x, dtype), stacked)
        torch.set_num_threads(before)
        assert torch.equal(iterated(x[2:3], dtype), stacked[2:3])
    assert not muon.serves(torch.empty(0, 4, 4)) and not muon.serves(x.transpose(1, 2))
