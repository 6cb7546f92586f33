"""The kernels over rows of logits against float64."""

import pytest
import torch
import torch.nn.functional as F

from bessemer.addons.accelerate.kernels import loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def close(a, b, tolerance):
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


def rows(C, V, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(C, V, generator=generator) * 4).to(dtype)
    return logits, torch.randint(0, V, (C,), generator=generator), torch.rand(C, generator=generator)


@DTYPES
def test_cross_entropy_equals_float64(instructions, dtype):
    for C, V in ((1, 1), (3, 5), (7, 64), (9, 1000), (4, 4097)):
        logits, target, weight = rows(C, V, dtype)
        exact = logits.double().requires_grad_()
        nll = F.cross_entropy(exact, target, reduction="none")
        (nll * weight.double()).sum().backward()
        work = logits.clone()
        close(-loss.cross_entropy(work, target, weight, gradient=False)[0], nll, 1e-5)
        assert torch.equal(work, logits), "without a gradient the logits stay"
        logp, gradient = loss.cross_entropy(work, target, weight, gradient=True)
        close(-logp, nll, 1e-5)
        close(gradient, exact.grad, 1e-6 if dtype == torch.float32 else 4e-3)


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_logprobs_equal_float64(instructions, dtype, temperature, with_entropy):
    for C, V in ((1, 2), (5, 33), (6, 2048)):
        logits, target, weight = rows(C, V, dtype)
        logits[0, 0] = -torch.inf  # an impossible token, which adds nothing to the entropy
        target[0] = 1
        exact = logits.double().requires_grad_()
        logp = (exact / temperature).log_softmax(-1)
        chosen = logp.gather(1, target[:, None]).squeeze(1)
        p = logp.exp()
        entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
        actual, lse, found_entropy = loss.logprobs(logits, target, temperature, with_entropy)
        close(actual, chosen, 1e-5)
        close(lse, (exact / temperature).logsumexp(-1), 1e-5)
        if with_entropy:
            close(found_entropy, entropy, 1e-5)
        other = torch.linspace(-1, 1, C)
        # autograd gives NaN for the masked token, hence the formulas
        one_hot = F.one_hot(target, V).double()
        expected = weight[:, None] * (one_hot - p)
        if with_entropy:
            expected -= other[:, None] * torch.where(p > 0, p * (logp + entropy[:, None]), 0.0)
        work = logits.clone()
        result = loss.logprobs_backward_(
            work, target, temperature, lse, found_entropy, weight, other if with_entropy else None
        )
        assert result is work
        close(result, expected / temperature, 2e-6 if dtype == torch.float32 else 8e-3)


def test_extreme_rows(instructions):
    logits = torch.tensor([[1e4, -1e4, 0.0], [torch.nan, 0.0, 0.0], [torch.inf, 0.0, 0.0], [-1e30, -1e30, -2e30]])
    logp, _ = loss.cross_entropy(logits, torch.tensor([0, 1, 1, 0]), torch.ones(4), gradient=True)
    nll = -logp
    close(nll[[0, 3]], torch.tensor([0.0, 0.6931472]), 1e-6)
    assert nll[1].isnan()
    assert nll[2].isnan()
    close(logits[0], torch.zeros(3), 0.0)
    close(logits[3], torch.tensor([-0.5, 0.5, 0.0]), 1e-6)
    assert logits[1:3].isnan().all()


def test_what_does_not_fit_goes_to_torch(instructions):
    logits = torch.randn(4, 6)
    assert loss.serves(logits)
    assert not loss.serves(logits.t())
    assert not loss.serves(logits.double())
    assert not loss.serves(logits[:0])
