"""RoPE and YaRN: the numbers of the released code, and rotation as complex multiplication."""

import math

import pytest
import torch
from model_cases import tiny

from bessemer.model import mla, transformer
from bessemer.model.config import preset, yarn_mscale

SHORT = preset("v3")
LONG = preset("v3", rope_factor=40.0)


def test_published_numbers():
    assert mla.correction_range(LONG) == (10, 23)
    assert yarn_mscale(40, 1.0) == pytest.approx(1.3688879, abs=5e-8)
    assert SHORT.softmax_scale == pytest.approx(0.0721688, abs=5e-8)
    assert LONG.softmax_scale == pytest.approx(0.1352338, abs=5e-8)
    assert LONG.softmax_scale / SHORT.softmax_scale == pytest.approx(1.8738542, abs=5e-8)


def test_the_ramp_is_rounded_outwards():
    """corr = 8.064 and 20.105 for a model trained on 2048 tokens: 8 and 21, not 20."""
    assert mla.correction_range(preset("v3", rope_factor=4.0, original_seq_len=2048)) == (8, 21)


def test_frequencies():
    plain = [10000 ** (-2 * j / 64) for j in range(32)]
    torch.testing.assert_close(mla.rope_frequencies(SHORT), torch.tensor(plain))
    ramp = [min(max((j - 10) / 13, 0), 1) for j in range(32)]
    yarn = [theta * (1 - r) + theta / 40 * r for theta, r in zip(plain, ramp, strict=True)]
    torch.testing.assert_close(mla.rope_frequencies(LONG), torch.tensor(yarn))
    assert torch.equal(mla.rope_frequencies(LONG)[:11], mla.rope_frequencies(SHORT)[:11])


def test_yarn_follows_the_config_not_the_length():
    """A long batch does not switch it on, and a short one does not switch it off."""
    assert torch.equal(mla.rope_table(SHORT, 9000)[:10], mla.rope_table(SHORT, 10))
    assert torch.equal(mla.rope_table(LONG, 9000)[:10], mla.rope_table(LONG, 10))
    assert not torch.equal(mla.rope_table(LONG, 10), mla.rope_table(SHORT, 10))


def test_streaming_decode_recomputes_few_positions(monkeypatch):
    """Token by token to 128K, and beyond the maximum by a few drafts."""
    computed = []

    def counting(cfg, length, device):
        computed.append(length)
        assert sum(computed) < 4 * 131_072
        return mla.rope_table(cfg, length, device)

    monkeypatch.setattr(transformer, "rope_table", counting)
    model = transformer.Transformer(tiny(max_seq_len=131_072))
    for length in (*range(1, 100), *range(4000, 131_073, 7), 131_074):
        table = model.rope_table(length)
        assert len(table) == length
    assert max(computed) == 131_074 and torch.equal(table, mla.rope_table(model.cfg, 131_074))
    computed.clear()
    assert len(model.rope_table(131_074)) == 131_074 and not computed


@pytest.mark.parametrize("mscale, all_dim, expected", [(1.0, 1.0, 1.0), (0.707, 0.707, 1.0), (1.0, 0.0, 1.3688879)])
def test_table_scale(mscale, all_dim, expected):
    cfg = preset("v3", rope_factor=40.0, mscale=mscale, mscale_all_dim=all_dim)
    radius = mla.rope_table(cfg, 7).norm(dim=-1)
    torch.testing.assert_close(radius, torch.full_like(radius, expected))


def test_v2_temperature():
    """V2 3.1.4: m = 0.0707 ln s + 1; without mscale_all_dim the softmax scale is unchanged."""
    cfg = preset("v2-lite")
    assert cfg.softmax_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    assert preset("v3", rope_factor=40.0, mscale_all_dim=0.0).softmax_scale == SHORT.softmax_scale


def test_rotation_is_complex_multiplication_of_interleaved_pairs():
    cfg = tiny()
    x = torch.randn(3, 11, cfg.qk_rope_head_dim, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(11).double()[:, None] * mla.rope_frequencies(cfg).double()
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(
        mla.rotate(x, mla.rope_table(cfg, 11)).double(), torch.view_as_real(turned).flatten(-2), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_key_of_one_token_behind_a_latent_of_odd_width(dtype):
    """A slice of one row is contiguous, but its pairs start at an odd element."""
    joint = torch.randn(1, 1, 13).to(dtype)
    actual = mla.rotate(joint[..., 5:], mla.rope_table(tiny(), 4)[3:])
    assert torch.equal(actual, mla.rotate(joint[..., 5:].clone(), mla.rope_table(tiny(), 4)[3:]))
    cfg = tiny(kv_lora_rank=13)
    attention, x = mla.MLA(cfg), torch.randn(1, 3, cfg.dim)
    output = attention(x, mla.rope_table(cfg, 3))
    torch.testing.assert_close(attention(x[:, :1], mla.rope_table(cfg, 1)), output[:, :1])
    assert attention.latent(x[:, :1], mla.rope_table(cfg, 1)).shape == (1, 1, 13 + cfg.qk_rope_head_dim)


def test_scores_depend_on_distance_only():
    cfg = tiny()
    q, k = torch.randn(2, cfg.qk_rope_head_dim, generator=torch.Generator().manual_seed(1))
    table = mla.rope_table(cfg, 40)
    near = [mla.rotate(q, table[p + 5]) @ mla.rotate(k, table[p]) for p in (0, 3, 30)]
    torch.testing.assert_close(near[0], near[1])
    torch.testing.assert_close(near[0], near[2])
    assert (near[0] - mla.rotate(q, table[9]) @ mla.rotate(k, table[0])).abs() > 1e-3


def test_rotation_keeps_dtype_and_computes_in_float32():
    cfg = tiny()
    x = torch.randn(6, cfg.qk_rope_head_dim).to(torch.bfloat16)
    table = mla.rope_table(cfg, 6)
    actual = mla.rotate(x, table)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, mla.rotate(x.float(), table).to(torch.bfloat16))
