"""MLA: the fused core against the equation, segments, and the absorbed form against the expanded one."""

import pytest
import torch
from model_cases import YARN, random_model, relative, tiny

from bessemer.model import attention, rope
from bessemer.model.attention import attention_reference, causal_attention, causal_mask
from bessemer.model.mla import MLA, absorbed_reference

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5]])


def qkv(T=9, dtype=torch.float32, B=2, H=3, qk=10, v=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, T, width, generator=generator).to(dtype) for width in (qk, qk, v)]


def two_segments(T):
    return (torch.arange(T) >= T // 3).long().expand(2, -1)


def mla_of(cfg) -> MLA:
    return random_model(cfg).layers[0].attn


# one query, a part of a block, exactly one and two blocks of 64, and a ragged third
LENGTHS = [1, 9, 64, 128, 150]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_core_equals_the_equation(T, dtype, bound):
    q, k, v = qkv(T, dtype)
    for segments in (None, two_segments(T)):
        wanted = attention_reference(*(x.float() for x in (q, k, v)), 0.3, segments)
        found = causal_attention(q, k, v, 0.3, segments)
        assert found.dtype == dtype and relative(found, wanted) < bound


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_the_core(T, dtype, bound):
    q, k, v = (x.requires_grad_() for x in qkv(T, dtype))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    cotangent = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for segments in (None, two_segments(T)):
        found = torch.autograd.grad(causal_attention(q, k, v, 0.3, segments), (q, k, v), cotangent)
        wanted = torch.autograd.grad(in_float64(*exact, segments), exact, cotangent.double())
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == dtype
            assert relative(a, b) < bound if T > 1 else (a.double() - b).norm() < bound  # one key: no score gradient


def in_float64(q, k, v, segments):
    score = torch.einsum("bhtd,bhsd->bhts", q, k) * 0.3
    score = score.masked_fill(~causal_mask(q.shape[2], segments, q.device), float("-inf"))
    return torch.einsum("bhts,bhsv->bhtv", score.softmax(-1), v)


@pytest.mark.parametrize("segments", [None, two_segments(40)], ids=["plain", "segments"])
def test_long_sequences_take_the_other_backend_with_the_same_result(monkeypatch, segments):
    q, k, v = qkv(40)
    blocked = causal_attention(q, k, v, 0.3, segments)
    monkeypatch.setattr(attention, "LONGEST", 39)
    monkeypatch.setattr(attention, "_blocked", None)
    assert relative(causal_attention(q, k, v, 0.3, segments), blocked) < 1e-6


def test_inputs_need_not_be_contiguous():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv(70))
    out = causal_attention(q, k, v, 0.3)
    assert relative(out, attention_reference(q, k, v, 0.3)) < 1e-6
    out.transpose(1, 2).pow(2).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


@pytest.mark.parametrize("segments", [None, two_segments(70)], ids=["plain", "segments"])
def test_custom_op_is_registered_properly(segments):
    """Schema, fake tensors and autograd, as torch.compile needs them."""
    inputs = [x.requires_grad_() for x in qkv(70)]
    torch.library.opcheck(attention._blocked, (*inputs, segments, 0.3), test_utils=OPCHECKS)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["plain", "segments"])
def test_reference_equals_a_loop(segments):
    q, k, v = (x.double() for x in qkv())
    found = attention_reference(q, k, v, 0.3, segments)
    for b in range(2):
        for t in range(9):
            seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
            for h in range(3):
                weight = torch.softmax(torch.stack([0.3 * q[b, h, t] @ k[b, h, s] for s in seen]), 0)
                wanted = sum(w * v[b, h, s] for w, s in zip(weight, seen, strict=True))
                torch.testing.assert_close(found[b, h, t], wanted, atol=1e-6, rtol=1e-5)  # scores are float32


def test_a_token_always_sees_itself():
    assert causal_mask(9, SEGMENTS, torch.device("cpu")).diagonal(dim1=-2, dim2=-1).all()


CASES = [{}, dict(q_lora_rank=0), YARN]


@pytest.mark.parametrize("changes", CASES, ids=["plain", "no-query-compression", "yarn"])
def test_absorbed_equals_expanded(changes):
    cfg = tiny(**changes)
    mla, x = mla_of(cfg), torch.randn(2, 9, cfg.dim, generator=torch.Generator().manual_seed(2))
    table = rope.table(cfg, 9)
    with torch.no_grad():
        assert relative(absorbed_reference(mla, x, table), mla(x, table)) < 1e-6


def test_absorbed_decodes_token_by_token_from_the_cache():
    """One query per row, rows at different positions, S larger than what a row may see."""
    cfg = tiny(**YARN)
    mla, x = mla_of(cfg), torch.randn(2, 9, cfg.dim, generator=torch.Generator().manual_seed(2))
    table = rope.table(cfg, 9)
    with torch.no_grad():
        wanted = mla(x, table)
        cache = mla.latent(x, table)
        assert cache.shape == (2, 9, cfg.kv_lora_rank + cfg.qk_rope_head_dim)
        at = torch.tensor([3, 7])
        visible = torch.arange(9)[None, None] <= at[:, None, None]
        found = mla.absorbed(x[[0, 1], at][:, None], cache, visible, table[at][:, None])
    assert relative(found[:, 0], wanted[[0, 1], at]) < 1e-6


def test_latent_norm_is_applied_to_the_latent_only():
    cfg = tiny()
    mla, x = mla_of(cfg), torch.randn(1, 4, cfg.dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        latent = mla.latent(x, rope.table(cfg, 4))
        raw = mla.wkv_a(x)
        c = raw[..., : cfg.kv_lora_rank]
        torch.testing.assert_close(
            latent[..., : cfg.kv_lora_rank], mla.kv_norm.weight * c / (c.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        )
        key = raw[..., cfg.kv_lora_rank :]
        torch.testing.assert_close(latent[..., cfg.kv_lora_rank :].norm(dim=-1), key.norm(dim=-1))


def test_latent_norms_keep_their_own_epsilon():
    """The released code gives rms_norm_eps to the block norms only; Moonlight (1e-5) shows the difference."""
    layer = random_model(tiny(norm_eps=1e-5)).layers[0]
    assert (layer.attn_norm.eps, layer.attn.q_norm.eps, layer.attn.kv_norm.eps) == (1e-5, 1e-6, 1e-6)
