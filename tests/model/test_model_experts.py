"""The grouped SwiGLU: equation, hand-written backward and float64 agree, empty experts included."""

import pytest
import torch
from model_cases import relative

from bessemer.model.moe import expert_ffn

COUNTS = [[3, 2, 4], [0, 9, 0], [0, 0, 0, 5], [1, 0, 3, 0, 0], [0, 0], [40, 3, 0, 75]]


def case(counts, dtype, D=6, inner=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    E, M = len(counts), sum(counts)
    return draw(M, D), draw(M), torch.tensor(counts), draw(E, 2 * inner, D), draw(E, D, inner)


def in_float64(arguments):
    return [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments]


def run(function, arguments):
    """Output and the gradients of rows, weights, w13, w2 under a fixed random cotangent."""
    out = function(*arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    leaves = [argument for argument in arguments if argument.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_equation_row_by_row(counts):
    """In float64: y = weight * W2 (silu(W1 x) * W3 x)."""
    rows, weights, count, w13, w2 = case(counts, torch.float64)
    expert = [e for e, n in enumerate(counts) for _ in range(n)]
    actual = expert_ffn.equation(rows, weights, count, w13, w2)
    for m, e in enumerate(expert):
        gate, up = w13[e, :5] @ rows[m], w13[e, 5:] @ rows[m]
        expected = weights[m] * (w2[e] @ (gate / (1 + torch.exp(-gate)) * up))
        torch.testing.assert_close(actual[m], expected)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_implementations_equal_the_equation_in_value_and_gradient(counts, dtype, bound):
    """Against the equation in float64; the bounds are a few roundings of the dtype."""
    exact = run(expert_ffn.equation, in_float64(case(counts, dtype)))
    for actual, expected in zip(run(expert_ffn, case(counts, dtype)), exact, strict=True):
        assert actual.shape == expected.shape and actual.dtype == dtype
        if expected.norm():
            assert relative(actual, expected) < bound
        else:
            assert not actual.any()


@pytest.mark.parametrize("counts", COUNTS[:4], ids=str)
def test_gradcheck(counts):
    rows, weights, count, w13, w2 = case(counts, torch.float64, D=3, inner=2)
    assert torch.autograd.gradcheck(lambda a, b, c, d: expert_ffn(a, b, count, c, d), (rows, weights, w13, w2))


def test_an_empty_expert_gets_zero_gradient():
    out = run(expert_ffn, case([4, 0, 2], torch.float32))
    dw13, dw2 = out[3], out[4]
    assert not dw13[1].any() and not dw2[1].any() and dw13[0].any() and dw2[2].any()


def test_mixed_dtypes_as_in_training():
    """Rows in BF16, gates in float32: the gate's gradient stays float32."""
    rows, weights, count, w13, w2 = case([3, 2, 4], torch.bfloat16)
    weights = weights.detach().float().requires_grad_()
    expert_ffn(rows, weights, count, w13, w2).float().sum().backward()
    assert weights.grad.dtype == torch.float32 and rows.grad.dtype == torch.bfloat16
    exact = in_float64((rows, weights, count, w13, w2))
    expert_ffn.equation(*exact).sum().backward()
    assert relative(weights.grad, exact[1].grad) < 3e-2


def test_custom_op_is_registered_properly():
    """Schema, fake tensors and autograd registration, as torch.compile needs them."""
    from bessemer.addons.accelerate.kernels import experts_gpu

    rows, weights, count, w13, w2 = case([3, 2, 4], torch.float32, D=8, inner=8)
    order = torch.tensor([2, 0, 1, 4, 3, 8, 7, 6, 5])
    torch.library.opcheck(experts_gpu._forward, (rows, weights, count, None, w13, w2, True))
    torch.library.opcheck(experts_gpu._forward, (rows[:3], weights.view(3, 3), count, order, w13, w2, True))


def test_the_compiler_never_looks_inside():
    """torch.compile gives up on parameters whose gradients have another dtype, as the optimizer makes them for BF16. It
    then falls back to the functions called from there."""
    from bessemer.addons.accelerate.kernels import experts_gpu

    rows, weights, count, w13, w2 = case([3, 2, 4], torch.bfloat16, D=8, inner=8)
    parameters = [torch.nn.Parameter(w.detach()) for w in (w13, w2)]
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros(parameter.shape)

    def function(rows):
        return experts_gpu.expert_ffn(rows, weights, count, *parameters)

    actual = torch.compile(function, backend="eager")(rows)
    assert torch.equal(actual, function(rows))
