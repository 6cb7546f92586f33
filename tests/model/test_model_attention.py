"""MLA: the fused core against the equation, segments, and the absorbed form against the expanded one."""

import pytest
import torch
from allocator import live_and_highest, live_bytes
from model_cases import YARN, random_model, relative, tiny

from bessemer.addons.accelerate.kernels import library
from bessemer.addons.accelerate.kernels.attention_gpu import causal_mask
from bessemer.addons.accelerate.kernels.cores import attention_backward, attention_forward
from bessemer.model.mla import (
    MLA,
    latent_attention,
    rope_table,
)

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5]])
NOPE, ROPE, VALUE = 7, 4, 6


def projections(T=9, dtype=torch.float32, B=2, H=3):
    """q, kv and k_rope as MLA's matrices produce them, and the table of rotations."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, H, NOPE + ROPE), (B, T, H, NOPE + VALUE), (B, T, ROPE)
    angle = torch.randn(T, ROPE // 2, generator=generator)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes], torch.stack(
        (angle.cos(), angle.sin()), -1
    )


def two_segments(T):
    return (torch.arange(T) >= T // 3).long().expand(2, -1)


def mla_of(cfg) -> MLA:
    return random_model(cfg).layers[0].attn


def absorbed_reference(mla: MLA, x_BTD: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """`MLA.absorbed` over a whole sequence with its own latent; equals `MLA.forward`."""
    T = x_BTD.shape[1]
    visible = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril().expand(x_BTD.shape[0], -1, -1)
    return mla.absorbed(x_BTD, mla.latent(x_BTD, rope), visible, rope)


# one query, part of a block, exactly one and two blocks of 64, and a ragged third block
LENGTHS = [1, 9, 64, 128, 150]


@pytest.fixture(params=["kernel", "equation"])
def form(request, monkeypatch):
    """The kernel, if this machine has a compiler, and the equation, which serves without one."""
    if request.param == "equation":
        monkeypatch.setattr(latent_attention, "implementations", [])
    elif not library.available():
        pytest.skip(library.status().why)
    return request.param


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_core_equals_the_equation(form, T, dtype, bound):
    inputs, table = projections(T, dtype)
    for segments in (None, two_segments(T)):
        expected = in_float64(*(x.double() for x in inputs), table, segments)
        actual = latent_attention(*inputs, table, 0.3, segments)
        assert actual.dtype == dtype and relative(actual, expected) < bound


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_the_core(form, T, dtype, bound):
    inputs, table = projections(T, dtype)
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    cotangent = torch.randn(2, T, 3, VALUE, generator=torch.Generator().manual_seed(1)).to(dtype)
    for segments in (None, two_segments(T)):
        actual = torch.autograd.grad(latent_attention(*inputs, table, 0.3, segments), inputs, cotangent)
        expected = torch.autograd.grad(in_float64(*exact, table, segments), exact, cotangent.double())
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert relative(a, b) < bound if b.norm() > 1e-9 else a.norm() < bound  # one key has no score gradient


@pytest.mark.parametrize("T", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("segmented", [False, True])
def test_attention_without_a_graph(T, segmented):
    """Values and gradients against float64; rounding the output moves the gradient by as much."""
    inputs, table = projections(T)
    segments = two_segments(T) if segmented else None
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = in_float64(*exact, table, segments)
    plain = [x.detach() for x in inputs]
    out, lse = attention_forward(*plain, table, 0.3, segments)
    assert relative(out, expected) < 1e-6
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    actual = attention_backward(cotangent, *plain, table, 0.3, segments, out, lse)
    for a, b in zip(actual, torch.autograd.grad(expected, exact, cotangent.double()), strict=True):
        assert relative(a, b) < 2e-6 if b.norm() > 1e-9 else a.norm() < 2e-6


def in_float64(q, kv, k_rope, table, segments):
    turn = torch.view_as_complex(table.double())

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    q_rope = rotated(q[..., NOPE:].transpose(1, 2)).transpose(1, 2)
    score = torch.einsum("bthn,bshn->bhts", q[..., :NOPE], kv[..., :NOPE])
    score = (score + torch.einsum("bthr,bsr->bhts", q_rope, rotated(k_rope))) * 0.3
    score = score.masked_fill(~causal_mask(q.shape[1], segments, q.device), float("-inf"))
    return torch.einsum("bhts,bshv->bthv", score.softmax(-1), kv[..., NOPE:])


def test_rotations_may_differ_from_row_to_row():
    inputs, table = projections()
    tables = torch.stack((table, table.flip(0)))
    actual = latent_attention(*inputs, tables, 0.3)
    for b in range(2):
        assert relative(actual[b : b + 1], latent_attention(*(x[b : b + 1] for x in inputs), tables[b], 0.3)) < 1e-6


@pytest.mark.parametrize("numbers", [[3, 3, 1, 1, 3], [0, 1, 2, 3, 4], [7, 7, 7, 8, 9]], ids=["back", "rising", "few"])
def test_segments_may_have_any_numbers_in_any_order(form, numbers):
    """A number that recurs is the same segment again; each row of a batch has its own boundaries."""
    inputs, table = projections(200)
    at = torch.tensor(numbers)
    segments = torch.stack((at.repeat_interleave(40), at.repeat_interleave(40).roll(30)))
    out = latent_attention(*inputs, table, 0.3, segments)
    assert relative(out, in_float64(*(x.double() for x in inputs), table, segments)) < 2e-6


@pytest.mark.parametrize("segmented", [False, True], ids=["plain", "segments"])
def test_memory_grows_with_the_length(form, segmented):
    """Memory kept for backward, and the peak of forward and backward together: four times the tokens, four times the
    bytes."""

    def bytes_at(T):
        inputs, table = projections(T, B=1, H=2)
        inputs = [x.requires_grad_() for x in inputs]
        segments = (torch.arange(T) // 500)[None] if segmented else None

        def forward():
            return latent_attention(*inputs, table, 0.3, segments)

        def backward():
            return torch.autograd.grad(forward().sum(), inputs)

        return live_bytes(forward), live_and_highest(backward)[1]

    (saved, most), (kept_long, most_long) = bytes_at(1100), bytes_at(4400)
    assert kept_long < 4.3 * saved
    assert most_long < 4.3 * most


def test_inputs_need_not_be_contiguous(form):
    inputs, table = projections(70)
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    out = latent_attention(*inputs, table, 0.3)
    assert relative(out, latent_attention(*(x.contiguous() for x in inputs), table, 0.3)) < 1e-6
    out.transpose(1, 2).pow(2).sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_a_token_always_sees_itself():
    assert causal_mask(9, SEGMENTS, torch.device("cpu")).diagonal(dim1=-2, dim2=-1).all()


CASES = [{}, dict(q_lora_rank=0), YARN]


@pytest.mark.parametrize("changes", CASES, ids=["plain", "no-query-compression", "yarn"])
def test_absorbed_equals_expanded(changes):
    cfg = tiny(**changes)
    mla, x = mla_of(cfg), torch.randn(2, 9, cfg.dim, generator=torch.Generator().manual_seed(2))
    table = rope_table(cfg, 9)
    with torch.no_grad():
        assert relative(absorbed_reference(mla, x, table), mla(x, table)) < 1e-6


def test_absorbed_decodes_token_by_token_from_the_cache():
    """One query per row, rows at different positions, S larger than what any row may see."""
    cfg = tiny(**YARN)
    mla, x = mla_of(cfg), torch.randn(2, 9, cfg.dim, generator=torch.Generator().manual_seed(2))
    table = rope_table(cfg, 9)
    with torch.no_grad():
        expected = mla(x, table)
        cache = mla.latent(x, table)
        assert cache.shape == (2, 9, cfg.kv_lora_rank + cfg.qk_rope_head_dim)
        at = torch.tensor([3, 7])
        visible = torch.arange(9)[None, None] <= at[:, None, None]
        actual = mla.absorbed(x[[0, 1], at][:, None], cache, visible, table[at][:, None])
    assert relative(actual[:, 0], expected[[0, 1], at]) < 1e-6


def test_latent_norm_is_applied_to_the_latent_only():
    cfg = tiny()
    mla, x = mla_of(cfg), torch.randn(1, 4, cfg.dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        latent = mla.latent(x, rope_table(cfg, 4))
        raw = mla.wkv_a(x)
        c = raw[..., : cfg.kv_lora_rank]
        torch.testing.assert_close(
            latent[..., : cfg.kv_lora_rank], mla.kv_norm.weight * c / (c.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        )
        key = raw[..., cfg.kv_lora_rank :]
        torch.testing.assert_close(latent[..., cfg.kv_lora_rank :].norm(dim=-1), key.norm(dim=-1))


def test_latent_norms_keep_their_own_epsilon():
    """The released code passes rms_norm_eps to the block norms only; Moonlight (1e-5) shows the difference."""
    layer = random_model(tiny(norm_eps=1e-5)).layers[0]
    assert (layer.attn_norm.eps, layer.attn.q_norm.eps, layer.attn.kv_norm.eps) == (1e-5, 1e-6, 1e-6)
