"""Chunked cross entropy and token log-probabilities against the plain formulas."""

import pytest
import torch

from bessemer.train import loss
from bessemer.train.loss import Kept, cross_entropy, cross_entropy_reference, token_logprobs, token_logprobs_reference

N, D, V = 70, 24, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Use several chunks, the last one partial."""
    monkeypatch.setattr(loss, "chunk_rows", lambda weight: 16)


def inputs(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    target = torch.randint(V, (N,), generator=g)
    weights = torch.rand(N, generator=g)
    weights[::3] = 0
    return hidden, weight, target, weights


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_cross_entropy_equals_reference(dtype, bound):
    """The bounds: all sums are float32, and bfloat16 has 8 significant bits in logits and gradients."""
    hidden, weight, target, weights = inputs(dtype)
    ours = cross_entropy(hidden, weight, target, weights)
    (ours * 0.7).backward()
    grads, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reference = (torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target, reduction="none") * weights).sum()
    (reference * 0.7).backward()
    assert relative(ours, reference) < bound
    for a, b in zip(grads, exact, strict=True):
        assert a.dtype == dtype and relative(a, b.grad) < bound


def test_reference_is_the_plain_formula():
    hidden, weight, target, weights = inputs()
    assert (
        relative(
            cross_entropy(hidden, weight, target, weights), cross_entropy_reference(hidden, weight, target, weights)
        )
        < 1e-6
    )


def test_cross_entropy_takes_any_leading_shape_and_zero_tokens():
    hidden, weight, target, weights = inputs()
    folded = cross_entropy(hidden.view(7, 10, D), weight, target.view(7, 10), weights.view(7, 10))
    assert torch.equal(folded, cross_entropy(hidden, weight, target, weights))
    nothing = cross_entropy(hidden, weight, target, weights * 0)
    nothing.backward()
    assert nothing == 0 and hidden.grad.abs().sum() == 0


def test_never_all_logits_at_once():
    hidden, weight, target, weights = inputs()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == V:
                largest = max(largest, out.shape[0])
            return out

    with Watch():
        cross_entropy(hidden, weight, target, weights + 1).backward()
        token_logprobs(hidden, weight, target, entropy=True).logp.sum().backward()
    assert 0 < largest <= D, "only [chunk, V] and views of the [V, D] weight"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
def test_logprobs_equal_reference(temperature, entropy):
    hidden, weight, target, _ = inputs()
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(N, generator=g), torch.randn(N, generator=g)
    results = []
    for function in (token_logprobs, token_logprobs_reference):
        hidden.grad = weight.grad = None
        out = function(hidden, weight, target, temperature=temperature, entropy=entropy)
        total = (out.logp * a).sum() + ((out.entropy * b).sum() if entropy else 0)
        total.backward()
        results.append([out.logp, *([out.entropy] if entropy else []), hidden.grad, weight.grad])
        assert (out.entropy is not None) == entropy
    for ours, reference in zip(*results, strict=True):
        assert relative(ours, reference) < 2e-6


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("way", ["kernel", "torch", "reference"])
def test_masked_logprobs_match_those_of_the_kept_logits_alone(way, temperature, monkeypatch):
    """Against a float64 softmax over the kept tokens, row by row; the other logits get no gradient at all."""
    hidden, weight, target, _ = inputs()
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(N, generator=g), torch.randn(N, generator=g)
    rows = [sorted({int(t), *torch.randint(V - 10, (n % 7 * 3,), generator=g).tolist()}) for n, t in enumerate(target)]
    shuffled = [(n, v) for n, ids in enumerate(rows) for v in ids] + [(-1, 0), (N, 3)]  # the last two belong to no row
    shuffled = [shuffled[i] for i in torch.randperm(len(shuffled), generator=g)]
    kept = Kept(torch.tensor([v for _, v in shuffled]), torch.tensor([n for n, _ in shuffled]))
    if way == "torch":
        for operation in (loss.logprobs_of_logits, loss.logprobs_gradient):
            monkeypatch.setattr(operation, "implementations", [])
    function = token_logprobs_reference if way == "reference" else token_logprobs
    out = function(hidden, weight, target, temperature, entropy=True, kept=kept)
    ((out.logp * a).sum() + (out.entropy * b).sum()).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logp, entropy = [], []
    for n, ids in enumerate(rows):
        of_row = (exact[0][n] @ exact[1][ids].T / temperature).log_softmax(-1)
        logp.append(of_row[ids.index(int(target[n]))])
        entropy.append(-(of_row.exp() * of_row).sum())
    logp, entropy = torch.stack(logp), torch.stack(entropy)
    ((logp * a).sum() + (entropy * b).sum()).backward()
    actual = (out.logp, out.entropy, hidden.grad, weight.grad)
    for ours, reference in zip(actual, (logp, entropy, exact[0].grad, exact[1].grad), strict=True):
        assert relative(ours, reference) < 3e-6
    unused = [v for v in range(V) if all(v not in ids for ids in rows)]
    assert unused and not weight.grad[unused].any()
    assert out.logp[0].abs() < 1e-6 and out.entropy[0].abs() < 1e-6, "one token is certain"
