"""The experts' kernel with dispatch and combine, on rows in expert order, and with one expert: against the plain loop
in float64."""

import pytest
import torch
from torch.nn import Parameter

from bessemer.addons.accelerate.kernels import experts as kernel
from bessemer.model.moe import FFN, expert_ffn, routed_ffn, swiglu

SHAPES = [(1, 1, 1, 1, 1), (50, 6, 5, 5, 2), (40, 40, 7, 24, 1), (300, 96, 8, 48, 3), (2500, 32, 2, 20, 2)]
"""N, D, E, F, K; in the last shape one expert has more rows than one task sums."""
BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def relative(actual, expected):
    """Distance relative to the norm of the expected tensor."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def routed_reference(x_ND, expert_NK, weight_NK, w13, w2):
    """Token by token and expert by expert."""
    order = expert_NK.flatten().argsort(stable=True)
    count = torch.bincount(expert_NK.flatten(), minlength=len(w2))
    rows = expert_ffn.equation(x_ND[order // expert_NK.shape[1]], weight_NK.flatten()[order], count, w13, w2)
    return torch.zeros_like(x_ND).index_add(0, order // expert_NK.shape[1], rows)


def dense_reference(x_ND, w13, w2):
    ones = torch.ones(len(x_ND), dtype=x_ND.dtype)
    return expert_ffn.equation(x_ND, ones, torch.tensor([len(x_ND)]), w13[None], w2[None])


def dense_ffn(x_ND, w13, w2):
    ffn = FFN(1, 1)
    ffn.w13.weight, ffn.w2.weight = (w if isinstance(w, Parameter) else Parameter(w) for w in (w13, w2))
    return swiglu(x_ND, ffn)


def case(N, D, E, F, K, dtype, choice=None):
    generator = torch.Generator().manual_seed(N + D)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    if choice is None:
        choice = torch.rand(N, E, generator=generator).topk(K).indices
    return draw(N, D), choice, draw(N, K, dtype=torch.float32), draw(E, 2 * F, D), draw(E, D, F)


def run(function, arguments):
    """Output and gradients under a fixed cotangent."""
    out = function(*arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    leaves = [a for a in arguments if a.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def in_float64(arguments):
    return [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments]


def assert_near(function, reference, arguments, dtype):
    for actual, expected in zip(run(function, arguments), run(reference, in_float64(arguments)), strict=True):
        assert relative(actual, expected) < BOUND[dtype] if expected.any() else not actual.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_float64(instructions, dtype):
    for N, D, E, F, K in SHAPES:
        x, choice, gate, w13, w2 = arguments = case(N, D, E, F, K, dtype)
        assert kernel.serves(x, w13, w2)
        assert_near(routed_ffn, routed_reference, arguments, dtype)
        sorted_rows = (x, gate[:, 0].detach().requires_grad_(), torch.bincount(choice[:, 0], minlength=E), w13, w2)
        assert_near(expert_ffn, expert_ffn.equation, sorted_rows, dtype)
        dense = (x, Parameter(w13[0].detach()), Parameter(w2[0].detach()))
        assert_near(dense_ffn, dense_reference, dense, dtype)


@pytest.mark.parametrize("expert", [[0], [4], [4, 0]], ids=str)
def test_all_tokens_on_few_experts(instructions, expert):
    """The other experts have no rows, and zero gradients."""
    choice = torch.tensor(expert).expand(70, -1)
    arguments = case(70, 24, 5, 12, len(expert), torch.float32, choice)
    assert_near(routed_ffn, routed_reference, arguments, torch.float32)
    *_, dw13, dw2 = run(routed_ffn, arguments)
    for e in range(5):
        assert bool(dw13[e].any()) is bool(dw2[e].any()) is (e in expert)


def test_columns_of_a_wider_tensor(instructions):
    x, choice, gate, w13, w2 = case(60, 24, 5, 12, 2, torch.float32)
    wide = torch.cat((x, x), -1).detach().requires_grad_()
    assert torch.equal(routed_ffn(wide[:, 24:], choice, gate, w13, w2), routed_ffn(x, choice, gate, w13, w2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_row_reaches_its_own_token_only(instructions, dtype, bad):
    x, choice, gate, w13, w2 = case(70, 32, 4, 16, 2, dtype)
    poisoned = x.detach().clone()
    poisoned[11] = bad
    poisoned.requires_grad_()
    clean, actual = (run(routed_ffn, (t, choice, gate, w13, w2)) for t in (x, poisoned))
    others = torch.arange(70) != 11
    assert not actual[0][11].isfinite().any()
    for i in (0, 1, 2):  # output, gradients of tokens and of gates
        assert torch.equal(clean[i][others], actual[i][others])
    used = torch.zeros(4, dtype=torch.bool)
    used[choice[11]] = True
    assert not actual[3][used].isfinite().all() and torch.equal(clean[3][~used], actual[3][~used])


def test_large_and_tiny_gates(instructions):
    """SwiGLU in its tails: silu(-200) is 0 for all purposes, silu(200) is 200."""
    x, w13, w2 = torch.tensor([[200.0], [-200.0], [1e-30], [-1e-3]]), torch.ones(2, 1), torch.ones(1, 1)
    torch.testing.assert_close(dense_ffn(x, w13, w2).double(), x.double() * torch.nn.functional.silu(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_nothing_but_the_numbers(instructions, dtype):
    """They do not depend on threads or other rows, and deferred gradients (`weight_gradient`) equal immediate ones."""
    x, choice, gate, w13, w2 = case(5000, 32, 3, 24, 2, dtype)
    order, count = kernel.sort(choice, 3)
    routes, dy = kernel.Routes(count, order, gate.detach()), torch.randn(5000, 32).to(dtype)
    x, w13, w2 = x.detach(), w13.detach(), w2.detach()
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, h = kernel.forward(x, routes, w13, w2, True)
        dw = torch.empty(w13.shape), torch.empty(w2.shape)
        results.append((y, h, *dw, *kernel.backward(dy, x, routes, w13, w2, h, *dw)[:2]))
        dx, dgate, act, dh = kernel.backward(dy, x, routes, w13, w2, h, None, None, operands=True)
        later = torch.empty(w13.shape), torch.empty(w2.shape)
        kernel.weight_gradient(x, routes, dh, later[0], True)
        kernel.weight_gradient(dy, routes, act, later[1], False)
        results.append((y, h, *later, dx, dgate))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    some = slice(100, 130)  # nor do rows depend on each other
    order, count = kernel.sort(choice[some], 3)
    alone, _ = kernel.forward(x[some], kernel.Routes(count, order, gate.detach()[some].contiguous()), w13, w2, False)
    assert torch.equal(alone, results[0][0][some])


def test_gradients_are_added_where_they_belong(instructions):
    """Straight into the float32 gradient of a BF16 weight; torch.autograd.grad returns them and adds nothing."""
    x, choice, gate, w13, w2 = case(90, 32, 4, 16, 2, torch.bfloat16)
    weights = [torch.nn.Parameter(w.detach()) for w in (w13, w2)]
    returned = torch.autograd.grad(routed_ffn(x, choice, gate, *weights).sum(), weights)
    for weight in weights:
        weight.grad_dtype = torch.float32
        weight.grad = torch.full(weight.shape, 0.5)
    before = [weight.grad for weight in weights]
    assert all(map(torch.equal, returned, torch.autograd.grad(routed_ffn(x, choice, gate, *weights).sum(), weights)))
    assert all(bool((grad == 0.5).all()) for grad in before)
    for times in (1, 2):
        routed_ffn(x, choice, gate, *weights).sum().backward()
        for weight, earlier, grad in zip(weights, before, returned, strict=True):
            assert weight.grad is earlier
            assert relative(earlier - 0.5, times * grad.float()) < 3e-3
    exact = [grad.clone() for grad in before]
    weights[0].register_hook(lambda grad: grad * 0)  # a hook still sees the gradient before it is added
    routed_ffn(x, choice, gate, *weights).sum().backward()
    assert torch.equal(weights[0].grad, exact[0]) and not torch.equal(weights[1].grad, exact[1])


def test_what_does_not_fit_goes_to_torch(instructions):
    x, choice, gate, w13, w2 = case(9, 8, 4, 4, 2, torch.float32)
    assert not kernel.serves(x.double(), w13.double(), w2.double())
    assert not kernel.serves(x, w13.bfloat16(), w2)
    assert not kernel.serves(x[:0], w13, w2)
    assert not kernel.serves(x.t(), w13, w2)
    assert routed_ffn(x[:0], choice[:0], gate[:0], w13, w2).shape == (0, 8)
    with pytest.raises(IndexError, match="not one of the 4"):
        routed_ffn(x, choice + 3, gate, w13, w2)
