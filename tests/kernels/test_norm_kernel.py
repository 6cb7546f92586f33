"""The RMSNorm kernel against float64."""

import pytest
import torch

from bessemer.addons.accelerate.kernels import norm

EPS = 1e-6


def reference(x, weight):
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def close(a, b, dtype, scale=1.0):
    tolerance = (4e-6 if dtype == torch.float32 else 8e-3) * scale
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_equal_float64(instructions, dtype):
    generator = torch.Generator().manual_seed(0)
    for N, D in ((1, 1), (3, 7), (64, 64), (65, 100), (130, 256), (200, 48)):
        x = (torch.randn(N, D, generator=generator) * 3).to(dtype)
        weight, dy = torch.randn(D, generator=generator), torch.randn(N, D, generator=generator).to(dtype)
        assert norm.serves(x, weight)
        x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
        y = reference(x64, w64)
        y.backward(dy.double())
        dx, dweight = norm.rms_norm_backward(dy, x, weight, EPS)
        close(norm.rms_norm(x, weight, EPS), y, dtype)
        close(dx, x64.grad, dtype, 3.0)
        close(dweight, w64.grad, torch.float32, N**0.5)


def test_rows_of_a_wider_tensor_are_read_in_place(instructions):
    wide, weight = torch.randn(2, 70, 80), torch.rand(64)
    columns = wide[..., 8:72]
    assert torch.equal(norm.rms_norm(columns, weight, EPS), norm.rms_norm(columns.contiguous(), weight, EPS))
    turned = wide.transpose(1, 2)[..., :64]
    assert torch.equal(norm.rms_norm(turned, weight, EPS), norm.rms_norm(turned.contiguous(), weight, EPS))


def test_extreme_numbers(instructions):
    x = torch.zeros(6, 40)
    x[1], x[2, 3], x[3, 3], x[4], x[5] = 1e18, torch.nan, torch.inf, 1e-30, -1e-3
    y, weight = norm.rms_norm(x, torch.ones(40), EPS), torch.ones(40)
    assert torch.equal(y[0], torch.zeros(40))
    close(y[[1, 4, 5]], reference(x, weight)[[1, 4, 5]], torch.float32)
    assert y[2].isnan().all()
    assert y[3, 3].isnan()
    assert not torch.isnan(y[[0, 1, 4, 5]]).any()


def test_bits_do_not_depend_on_threads(instructions):
    x, dy, weight = torch.randn(1000, 96), torch.randn(1000, 96), torch.rand(96)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((norm.rms_norm(x, weight, EPS), *norm.rms_norm_backward(dy, x, weight, EPS)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_does_not_fit_goes_to_torch(instructions):
    assert not norm.serves(torch.randn(3, 4, dtype=torch.float64), torch.ones(4))
    assert not norm.serves(torch.randn(0, 4), torch.ones(4))
    assert not norm.serves(torch.randn(3, 4), torch.ones(4, dtype=torch.bfloat16))
