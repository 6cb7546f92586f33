"""The Newton-Schulz kernel against the plain iterations in float64."""

import torch

from bessemer.kernels import muon
from bessemer.train import update_rules


def test_equals_float64_for_wide_tall_and_odd_matrices(instructions):
    for N, R, C in ((1, 1, 1), (3, 5, 9), (2, 64, 128), (2, 130, 70), (1, 33, 33)):
        x = torch.randn(N, R, C, generator=torch.Generator().manual_seed(R))
        before = x.clone()
        assert muon.serves(x)
        found = muon.newton_schulz(x, update_rules.STEPS, update_rules.COEFFICIENTS)
        torch.testing.assert_close(
            found.double(), update_rules.newton_schulz(x.double(), torch.float64), atol=2e-5, rtol=0
        )
        assert torch.equal(x, before)


def test_zero_stays_zero_and_nan_stays_in_its_matrix(instructions):
    x = torch.randn(3, 20, 30)
    x[0], x[2, 3, 4] = 0.0, torch.nan
    found = muon.newton_schulz(x, update_rules.STEPS, update_rules.COEFFICIENTS)
    assert not found[0].any()
    assert found[1].isfinite().all()
    assert found[2].isnan().any()


def test_bits_do_not_depend_on_threads_or_neighbours(instructions):
    x = torch.randn(7, 40, 24).transpose(1, 2)
    whole = muon.newton_schulz(x, update_rules.STEPS, update_rules.COEFFICIENTS)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(muon.newton_schulz(x, update_rules.STEPS, update_rules.COEFFICIENTS), whole)
    torch.set_num_threads(before)
    assert torch.equal(muon.newton_schulz(x[2:3], update_rules.STEPS, update_rules.COEFFICIENTS), whole[2:3])
    assert not muon.serves(torch.empty(0, 4, 4))
