"""Networks for comparison: keys and values without a latent (MHA, GQA, MQA), shared experts of a different width."""

import pytest
import torch
from model_cases import SHAPE, random_model, relative, tiny, tokens
from naive_network import Naive

from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.addons.families import gguf_file
from bessemer.data.tokenizer import SMALLEST, Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.hf import deepseek, mapping
from bessemer.model import accounting
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer

KINDS = {
    "MHA": dict(n_heads=4, kv_lora_rank=0),
    "GQA": dict(n_heads=4, kv_lora_rank=0, n_kv_heads=2),
    "MQA": dict(n_heads=4, kv_lora_rank=0, n_kv_heads=1),
    "normed": dict(n_heads=4, kv_lora_rank=0, n_kv_heads=2, kv_norm=True),
    "shared": dict(shared_inter_dim=20),
}


@pytest.fixture(params=KINDS)
def cfg(request):
    return tiny(**KINDS[request.param], n_mtp=0)


def test_logits_match_those_of_the_naive_network(cfg, tmp_path):
    model, ids = random_model(cfg), tokens(cfg, rows=1, length=9)
    model.save(tmp_path)
    with torch.no_grad():
        assert relative(model(ids)[0], Naive(tmp_path, cfg).main(ids[0])[1]) < 1e-5


def turned(x_TR, theta=10000.0):
    """Rotary positions of one head in float64."""
    T, R = x_TR.shape
    angle = torch.arange(T, dtype=torch.float64)[:, None] * theta ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    return torch.view_as_real(torch.view_as_complex(x_TR.unflatten(-1, (-1, 2))) * torch.exp(1j * angle)).flatten(-2)


def attention_in_float64(mla, x_TD):
    """One head after another; heads of a group read the same keys and values."""
    cfg, w = mla.cfg, {name: p.detach().double().requires_grad_() for name, p in mla.named_parameters()}
    N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    latent = x_TD @ w["wq_a.weight"].T
    q = (latent * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w["q_norm.weight"]) @ w["wq_b.weight"].T
    k_rope = turned(x_TD @ w["wkv_a.weight"].T)
    groups, T = cfg.n_kv_heads or cfg.n_heads, len(x_TD)
    kv = x_TD @ w["wkv_b.weight"].T
    if cfg.kv_norm:
        kv = kv * (kv.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w["kv_norm.weight"]
    kv = kv.view(T, groups, N + V)
    heads = []
    for head, q_TX in enumerate(q.view(T, cfg.n_heads, N + R).unbind(1)):
        kv_TX = kv[:, head // (cfg.n_heads // groups)]
        score = (q_TX[:, :N] @ kv_TX[:, :N].T + turned(q_TX[:, N:]) @ k_rope.T) / (N + R) ** 0.5
        score = score.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        heads.append(score.softmax(-1) @ kv_TX[:, N:])
    return torch.cat(heads, -1) @ w["wo.weight"].T, w


@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA", "normed"])
def test_gradients_match_those_of_one_head_after_the_other(kind):
    model = random_model(tiny(**KINDS[kind]))
    mla, T = model.layers[0].attn, 70  # more than one block of queries
    x = torch.randn(1, T, model.cfg.dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x_TD = x.detach()[0].double().requires_grad_()
    out, (expected, w) = mla(x, model.rope_table(T)), attention_in_float64(mla, x_TD)
    assert relative(out[0], expected) < 1e-5
    upstream = torch.randn(T, model.cfg.dim, generator=torch.Generator().manual_seed(1))
    (out[0] * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert relative(x.grad[0], x_TD.grad) < 1e-5
    for name, parameter in mla.named_parameters():
        assert relative(parameter.grad, w[name].grad) < 1e-5, name


def test_counts_match_those_of_the_tensors(cfg):
    model = Transformer(cfg)
    assert accounting.main_params(cfg) == sum(tensor.numel() for tensor in model.state_dict().values())
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "embed.weight"]
    routed = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    used = sum(p.numel() for p in weights) + routed // cfg.n_routed_experts * cfg.n_activated_experts
    assert accounting.flops_per_token(cfg, 9).matmul == 2 * used


def test_cache_of_the_claims():
    """48 numbers a layer for MLA, 528 for all keys and values, and grouped heads in between."""
    width = {name: ModelConfig.make({**SHAPE, **dict(n_heads=8, kv_lora_rank=rank, n_kv_heads=groups, v_head_dim=32,
                                                     qk_nope_head_dim=32, qk_rope_head_dim=16)}).kv_width
             for name, rank, groups in (("MLA", 32, 0), ("MHA", 0, 0), ("GQA", 0, 2), ("MQA", 0, 1))}  # fmt: skip
    assert width == {"MLA": 48, "MHA": 528, "GQA": 144, "MQA": 80}


def test_a_directory_is_read_back_and_no_other_program_takes_it(cfg, tmp_path):
    model, ids = random_model(cfg), tokens(cfg)
    model.save(tmp_path)
    assert deepseek.read_config(tmp_path) == cfg
    assert torch.equal(deepseek.load(tmp_path)(ids), model(ids))
    values = mapping.to_hf(cfg, torch.float32)
    assert values["model_type"] == "bessemer" and values["architectures"] == ["BessemerForCausalLM"]
    with pytest.raises(UserError, match="not valid for deepseek_v3"):
        mapping.from_hf(values | {"model_type": "deepseek_v3", "num_key_value_heads": cfg.n_heads}, "config.json")
    with pytest.raises(UserError, match="GGUF"):
        gguf_file.check_network(cfg, "this model")


@pytest.mark.parametrize("kind", ["MHA", "MQA"])
def test_what_needs_a_latent_says_so(kind):
    model = Transformer(tiny(**KINDS[kind]))
    with pytest.raises(UserError, match=r"FP8.*latent attention"):
        set_fp8(model, PAPER)
    tokenizer = Tokenizer.train(["Use 3, 4, 6 to make 18."], SMALLEST)
    wide = Transformer(tiny(**KINDS[kind], vocab_size=tokenizer.vocab_size))
    with pytest.raises(UserError, match="the engine supports"):
        Engine(wide, tokenizer)


def test_records_of_older_runs_stay_equal():
    assert not {"n_kv_heads", "kv_norm", "shared_inter_dim"} & tiny().model_dump().keys()
    own = tiny(n_heads=4, kv_lora_rank=0, n_kv_heads=2, shared_inter_dim=20)
    assert own.model_dump()["n_kv_heads"] == 2 and ModelConfig(**own.model_dump()) == own


def test_wrong_groups():
    with pytest.raises(UserError, match="not a multiple of n_kv_heads 3"):
        tiny(n_heads=4, kv_lora_rank=0, n_kv_heads=3)
    with pytest.raises(UserError, match="needs kv_lora_rank 0"):
        tiny(n_heads=4, n_kv_heads=2)
    with pytest.raises(UserError, match="kv_norm needs kv_lora_rank 0"):
        tiny(kv_norm=True)
