"""The kernel of MLA's softmax core against float64, on every instruction set this machine can run or emulate."""

import platform

import pytest
import torch

from bessemer.addons.accelerate.kernels import attention as kernel

FLOAT, BF16 = torch.float32, torch.bfloat16
SHAPES = [  # B, T, H, N, R, V: the presets', tests', ragged ones, and around blocks of 32, 48, 64
    (2, 130, 2, 32, 16, 32), (1, 97, 2, 128, 64, 128), (2, 9, 3, 7, 4, 6), (1, 2, 1, 32, 16, 32),
    (1, 200, 1, 20, 2, 33), (1, 64, 2, 16, 8, 48), (1, 49, 1, 16, 16, 16), (3, 33, 1, 5, 6, 1),
]  # fmt: skip


def drawn(B, T, H, N, R, V, dtype=FLOAT, seed=0, rows=False, S=None):
    """q, kv, k_rope, a rotation table (`rows`: one for each row), and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    S = S or T
    shapes = (B, T, H, N + R), (B, S, H, N + V), (B, S, R), (B, T, H, V)
    q, kv, k_rope, dout = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    angle = torch.randn(*((B,) if rows else ()), S, R // 2, generator=generator)
    return q, kv, k_rope, torch.stack((angle.cos(), angle.sin()), -1), dout


def reference(q, kv, k_rope, q_table, k_table, segments, scale):
    """The equation, in float64."""
    q, kv, k_rope = q.double(), kv.double(), k_rope.double()
    R, T, S = k_rope.shape[-1], q.shape[1], kv.shape[1]
    N = q.shape[-1] - R

    def turned(x, table):
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = table.double().unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    score = torch.einsum("bthn,bshn->bhts", q[..., :N], kv[..., :N])
    q_rope = turned(q[..., N:].transpose(1, 2), q_table if q_table.dim() == 3 else q_table.unsqueeze(1))
    score = (score + torch.einsum("bhtr,bsr->bhts", q_rope, turned(k_rope, k_table))) * scale
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if segments is not None:
        seen = (seen & (segments[:, S - T :, None] == segments[:, None])).unsqueeze(1)
    score = score.masked_fill(~seen, float("-inf"))
    out = torch.einsum("bhts,bshv->bthv", score.softmax(-1), kv[..., N:])
    return out, score.logsumexp(-1).flatten(0, 1)


def close(actual, expected, bound):
    return float((actual.double() - expected).norm()) <= bound * max(1.0, float(expected.norm()))


def segments_of(kind, B, T):
    if kind == "none":
        return None
    if kind == "rising":
        return (torch.arange(T) // 37).expand(B, -1)
    return torch.randint(-(2**40), 2**40, (3,), generator=torch.Generator().manual_seed(1))[
        torch.randint(0, 3, (B, -(-T // 11)), generator=torch.Generator().manual_seed(2)).repeat_interleave(11, 1)[
            :, :T
        ]
    ]


@pytest.mark.parametrize("dtype, bound", [(FLOAT, 3e-6), (BF16, 1.2e-2)])
@pytest.mark.parametrize("kind", ["none", "rising", "any"])
def test_equals_the_equation(instructions, dtype, bound, kind):
    for seed, shape in enumerate(SHAPES):
        q, kv, k_rope, table, dout = drawn(*shape, dtype, seed, rows=seed % 2 == 1)
        segments = segments_of(kind, *shape[:2])
        assert kernel.serves(q, kv, k_rope, segments, 0.3)
        exact = [x.double().requires_grad_() for x in (q, kv, k_rope)]
        expected, wanted_lse = reference(*exact, table, table, segments, 0.3)
        gradients = torch.autograd.grad(expected, exact, dout.double())
        out, lse = kernel.attention(q, kv, k_rope, table, table, segments, 0.3)
        actual = kernel.attention_backward(dout, q, kv, k_rope, table, segments, 0.3, out, lse)
        assert out.dtype == dtype and lse.dtype == FLOAT
        assert close(out, expected.detach(), bound) and close(lse, wanted_lse.detach(), bound), shape
        for a, b in zip(actual, gradients, strict=True):
            assert a.dtype == dtype and close(a, b, bound), shape


def test_new_queries_after_cached_keys(instructions):
    """Bit for bit what the same queries give among all: a prompt in pieces gives what the whole prompt gives."""
    q, kv, k_rope, table, _ = drawn(2, 150, 2, 32, 16, 32)
    full, whole_lse = kernel.attention(q, kv, k_rope, table, table, None, 0.3)
    for T in (1, 30, 97):
        out, lse = kernel.attention(q[:, -T:], kv, k_rope, table[-T:], table, None, 0.3)
        assert torch.equal(out, full[:, -T:]) and torch.equal(lse, whole_lse[:, -T:])
    expected, _ = reference(q[:, -30:], kv, k_rope, table[-30:], table, None, 0.3)
    plain = torch.stack((torch.ones(150, 8), torch.zeros(150, 8)), -1)
    rotated = torch.view_as_complex(k_rope.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
    rotated = torch.view_as_real(rotated).flatten(-2)
    assert close(kernel.attention(q[:, -30:], kv, rotated, table[-30:], None, None, 0.3)[0], expected, 1e-6)
    assert close(kernel.attention(q[:, -30:], kv, rotated, table[-30:], plain, None, 0.3)[0], expected, 1e-6)


def test_results_depend_on_neither_threads_nor_other_rows(instructions):
    q, kv, k_rope, table, dout = drawn(3, 70, 2, 32, 16, 32)
    results = []
    for threads, rows in ((1, slice(None)), (2, slice(None)), (1, slice(1, 2))):
        torch.set_num_threads(threads)
        try:
            own_inputs = [x[rows] for x in (q, kv, k_rope)]
            out, lse = kernel.attention(*own_inputs, table, table, None, 0.3)
            results.append((out, *kernel.attention_backward(dout[rows], *own_inputs, table, None, 0.3, out, lse)))
        finally:
            torch.set_num_threads(1)
    for single_thread, two_threads, alone in zip(*results, strict=True):
        assert torch.equal(single_thread, two_threads) and torch.equal(single_thread[1:2], alone)


def test_scores_far_apart_and_tiny(instructions):
    """With scores in the thousands, equal ones share the weight and others get exactly 0. Scores of 1e-20 all share."""
    generator = torch.Generator().manual_seed(0)
    q, kv, k_rope, _, dout = drawn(1, 100, 2, 32, 16, 32)
    kv[..., :32] = torch.randint(-1, 2, kv[..., :32].shape, generator=generator)
    k_rope, signs = (torch.randint(-1, 2, x.shape, generator=generator).float() for x in (k_rope, q))
    table = torch.eye(2)[torch.randint(0, 2, (100, 8), generator=generator)]  # none, or a quarter turn
    for scaled, bound in ((signs * 1000, None), (signs * 16, 3e-5), (q * 1e-20, 3e-6)):
        exact = [x.double().requires_grad_() for x in (scaled, kv, k_rope)]
        expected, _ = reference(*exact, table, table, None, 0.3)
        out, lse = kernel.attention(scaled, kv, k_rope, table, table, None, 0.3)
        assert close(out, expected.detach(), 1e-6)
        if bound:  # at thousands, float32 stores the log-sum-exp to three decimal places
            actual = kernel.attention_backward(dout, scaled, kv, k_rope, table, None, 0.3, out, lse)
            for a, b in zip(actual, torch.autograd.grad(expected, exact, dout.double()), strict=True):
                assert close(a, b, bound)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 is slow at denormal numbers")
def test_no_denormal_numbers(instructions):
    """Small probabilities times small gradients made backward 20 times slower. Outside the kernel denormals remain."""
    q, kv, k_rope, table, dout = drawn(1, 256, 2, 32, 16, 32)
    out, lse = kernel.attention(q * 20, kv, k_rope, table, table, None, 0.14)
    actual = kernel.attention_backward(dout * 1e-20, q * 20, kv, k_rope, table, None, 0.14, out, lse)
    smallest = torch.finfo(FLOAT).tiny
    for x in (out, *actual):
        assert x.any() and not ((x != 0) & (x.abs() < smallest)).any()
    assert torch.full((64,), smallest).mul(0.5).all()


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("column, value", [(3, float("nan")), (35, float("nan")), (35, float("inf"))])
def test_non_finite_values_reach_their_readers(instructions, dtype, column, value):
    """NaN and infinity in a key and in a value."""
    q, kv, k_rope, table, dout = drawn(2, 150, 2, 32, 16, 32, dtype)
    clean, _ = kernel.attention(q, kv, k_rope, table, table, None, 0.3)
    kv[0, 140, 1, column] = value
    out, lse = kernel.attention(q, kv, k_rope, table, table, None, 0.3)
    assert not out[0, 140:, 1].isfinite().all(-1).any()
    assert torch.equal(out[0, :, 0], clean[0, :, 0]) and torch.equal(out[1], clean[1])
    assert torch.equal(out[0, :96, 1], clean[0, :96, 1])  # blocks that do not read that key
    dq, dkv, dk_rope = kernel.attention_backward(dout, q, kv, k_rope, table, None, 0.3, out, lse)
    assert not dq[0, 140:, 1].isfinite().all(-1).any() and dq[1].isfinite().all() and dkv[1].isfinite().all()
    assert not dkv[0, :141, 1].isfinite().all(-1).any() and not dk_rope[0, :141].isfinite().all(-1).any()


def test_inputs_need_not_be_contiguous(instructions):
    q, kv, k_rope, table, dout = drawn(2, 50, 2, 32, 16, 32)
    strided = [torch.stack((x, x), -1)[..., 0] for x in (q, kv, k_rope, table, dout)]
    assert not any(x.is_contiguous() for x in strided)
    segments = (torch.arange(50) // 20).expand(2, -1)
    for a, b in zip(*(
        (*(forward := kernel.attention(*x[:3], x[3], x[3], segments, 0.3)),
         *kernel.attention_backward(x[4], *x[:3], x[3], segments, 0.3, *forward))
        for x in ((q, kv, k_rope, table, dout), strided)
    ), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_what_is_not_served(instructions):
    q, kv, k_rope, table, _ = drawn(1, 4, 1, 32, 16, 32)
    assert kernel.serves(q, kv, k_rope, table, 0.3)
    assert not kernel.serves(q[:0], kv[:0], k_rope[:0], table, 0.3)
    assert not kernel.serves(q.double(), kv.double(), k_rope.double(), table, 0.3)
    assert not kernel.serves(q, kv.bfloat16(), k_rope, table, 0.3)
    assert not kernel.serves(q, kv, k_rope, table, 0.0)
    assert not kernel.serves(q, kv, k_rope, table, 0.3, torch.zeros(1, 4, dtype=torch.int32))
