"""Counts equal the published totals (V3 4.2; ISCA 2025, Tables 1 and 2) and those of the tensors of real networks."""

import pytest
import torch
from model_cases import V2, tiny

from bessemer.model import accounting
from bessemer.model.config import ModelConfig, preset
from bessemer.model.transformer import Transformer

V3 = preset("v3")


def test_published_parameter_counts():
    assert accounting.attention_params(V3) == 187_107_328
    assert accounting.expert_params(V3) == 44_040_192
    assert accounting.ffn_params(V3, dense=True) == 396_361_728
    assert accounting.ffn_params(V3, dense=False) == 11_320_164_352 + 256
    assert accounting.embedding_params(V3) == 926_679_040
    assert accounting.main_params(V3) == 671_026_419_200
    assert accounting.stored_params(V3) == 684_489_845_504
    assert accounting.active_params(V3) / 1e9 == pytest.approx(37.55, abs=0.005)
    assert (accounting.active_params(V3) - accounting.embedding_params(V3)) / 1e9 == pytest.approx(36.63, abs=0.005)
    assert accounting.active_params(V3, tables=False) / 1e9 == pytest.approx(35.70, abs=0.005)
    assert accounting.mtp_params(V3) / 1e9 == pytest.approx(11.61, abs=0.005)


def test_published_cache_and_compute():
    assert accounting.kv_cache_elements(V3) == 576 * 61
    assert accounting.kv_cache_bytes(V3) == 70_272
    flops = accounting.flops_per_token(V3, 4096)
    assert flops.training / 1e9 == pytest.approx(250.5, abs=0.05)
    # F.3: 1543 tokens a second on 989.4 TFLOPS is 39.1 % utilisation
    assert 1543 * flops.training / 989.4e12 == pytest.approx(0.391, abs=0.0005)


def test_smaller_published_sizes():
    """V2-Lite is the 15.7B model of V3 4.5, 2.4B activated (embedding not counted)."""
    lite = preset("v2-lite")
    assert accounting.main_params(lite) / 1e9 == pytest.approx(15.7, abs=0.05)
    assert (accounting.active_params(lite) - accounting.embedding_params(lite)) / 1e9 == pytest.approx(2.4, abs=0.06)


CASES = [{}, dict(q_lora_rank=0), dict(n_mtp=2), dict(n_mtp=0), dict(tie_embeddings=True), dict(n_shared_experts=0), V2,
         dict(n_dense_layers=0), dict(n_dense_layers=3)]  # fmt: skip


@pytest.mark.parametrize("changes", CASES)
def test_counts_equal_real_networks(changes):
    cfg = tiny(**changes)
    model = Transformer(cfg)
    biases = sum(gate.bias_E.numel() for gate in model.gates().values() if gate.bias_E is not None)
    real = sum(parameter.numel() for parameter in model.parameters()) + biases
    assert accounting.main_params(cfg) + accounting.mtp_params(cfg) == real
    assert accounting.attention_params(cfg) == sum(p.numel() for p in model.layers[0].attn.parameters())
    if not model.layers[-1].dense:
        ffn = model.layers[-1].ffn
        bias = 0 if ffn.gate.bias_E is None else ffn.gate.bias_E.numel()
        assert accounting.ffn_params(cfg, dense=False) == sum(p.numel() for p in ffn.parameters()) + bias


def test_flops_count_matrices_and_nothing_else():
    """Against a sum over the matrices that one token passes through: two FLOPs per weight."""
    cfg = tiny(n_mtp=0)
    with torch.device("meta"):
        model = Transformer(cfg)
    used = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name != "embed.weight":
            used += parameter.numel()
        elif parameter.dim() == 3:
            used += parameter.numel() // cfg.n_routed_experts * cfg.n_activated_experts
    flops = accounting.flops_per_token(cfg, seq_len=9)
    assert flops.matmul == 2 * used
    scores = sum(t for t in range(1, 10)) / 9  # keys that a query sees, on average
    assert flops.attention == pytest.approx(2 * scores * cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim) * 3)
    assert accounting.flops_per_token(cfg, 9, causal=False).attention == pytest.approx(flops.attention * 9 / scores)


def test_mtp_adds_one_layer_its_projection_and_a_second_head():
    cfg = tiny(n_mtp=1)
    layers = accounting.flops_per_token(ModelConfig.make({**cfg.model_dump(), "n_layers": 4, "n_mtp": 0}), 8)
    with_mtp = accounting.flops_per_token(cfg, 8, mtp=True)
    extra = 2 * (2 * cfg.dim**2 + cfg.vocab_size * cfg.dim)
    assert with_mtp.matmul == layers.matmul + extra
    assert with_mtp.attention == layers.attention
