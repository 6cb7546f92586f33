"""Against transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM, in both directions.

Bound 1e-5 on |difference| / |logits|: float32 rounds at 6e-8, and a three-layer network with softmaxes adds a few
hundred such errors. Each wrong rule tried (0 for -inf, half-split rope, sigmoid without scale) gives more than 1e-2.

V2 against V3, for the reader: softmax gate without bias, gates not normalised, groups rated by their best expert, YaRN
with mscale 0.707 in both places (m = 1.2608 instead of 1.3689 at s = 40; still no factor on cos and sin).
"""

import logging

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from model_cases import V2, YARN, configs, random_model, relative, tiny, tokens
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging as hf_logging

from bessemer.hf import deepseek

hf_logging.disable_progress_bar()
BOUND = 1e-5
# its grouped GEMM refuses widths that are not multiples of 16 bytes
EAGER = dict(attn_implementation="eager", experts_implementation="eager")

V3_CASES = {
    "groups": {},
    "no-query-compression": dict(q_lora_rank=0),
    "yarn": YARN,
    "yarn-mscale": dict(**YARN, mscale=0.707, mscale_all_dim=0.707),
    "yarn-mscale-unequal": dict(**YARN, mscale=1.0, mscale_all_dim=0.5),
    "yarn-one-mscale": dict(**YARN, mscale=0.707, mscale_all_dim=0.0),
    "yarn-no-mscale": dict(**YARN, mscale=0.0, mscale_all_dim=0.707),
    "one-group": dict(n_expert_groups=1, n_limited_groups=1),
    "all-groups": dict(n_limited_groups=4),
    "moonlight": dict(q_lora_rank=0, n_expert_groups=1, n_limited_groups=1, n_shared_experts=2, route_scale=2.446,
                      rope_theta=50000.0, norm_eps=1e-5, n_mtp=0, init_std=0.02),
    "gates-not-normalised": dict(norm_topk_prob=False),
    "no-dense-layer": dict(n_dense_layers=0),
    "tied": dict(tie_embeddings=True),
}  # fmt: skip
V2_CASES = {
    "greedy": V2,
    "greedy-yarn": dict(**V2, **YARN, mscale=0.707, mscale_all_dim=0.707),
    "group-limited": {**V2, "topk_method": "group_limited_greedy", "n_expert_groups": 4, "n_limited_groups": 2},
    "group-limited-compressed": {**V2, "topk_method": "group_limited_greedy", "n_expert_groups": 4,
                                 "n_limited_groups": 2, "q_lora_rank": 24, "route_scale": 16.0},
}  # fmt: skip


def hf_model(cfg):
    """The same shape in transformers, built with its own config class rather than our adapter."""
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.yarn:
        rope |= dict(rope_type="yarn", factor=cfg.rope_factor, original_max_position_embeddings=cfg.original_seq_len,
                     mscale=cfg.mscale, mscale_all_dim=cfg.mscale_all_dim)  # fmt: skip
        rope |= {} if cfg.mscale and cfg.mscale_all_dim else {"attention_factor": cfg.rope_scale}
    values = dict(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.inter_dim,
        moe_intermediate_size=cfg.moe_inter_dim, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_heads, n_shared_experts=cfg.n_shared_experts, n_routed_experts=cfg.n_routed_experts,
        routed_scaling_factor=cfg.route_scale, kv_lora_rank=cfg.kv_lora_rank, q_lora_rank=cfg.q_lora_rank or None,
        qk_rope_head_dim=cfg.qk_rope_head_dim, v_head_dim=cfg.v_head_dim, qk_nope_head_dim=cfg.qk_nope_head_dim,
        n_group=cfg.n_expert_groups, topk_group=cfg.n_limited_groups, num_experts_per_tok=cfg.n_activated_experts,
        first_k_dense_replace=cfg.n_dense_layers, norm_topk_prob=cfg.norm_topk_prob,
        max_position_embeddings=cfg.max_seq_len, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tie_embeddings,
        rope_parameters=rope, initializer_range=cfg.init_std, **EAGER,
    )  # fmt: skip
    torch.manual_seed(5)
    if cfg.score_func == "softmax":
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**values, topk_method=cfg.topk_method))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-1.6, -1.0)
            elif tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def logits_of(model, cfg):
    with torch.no_grad():
        out = model(tokens(cfg))
    return out if isinstance(out, torch.Tensor) else out.logits


def from_theirs(cfg, directory) -> float:
    """transformers writes, we read."""
    reference = hf_model(cfg)
    reference.save_pretrained(directory)
    model = deepseek.load(directory, mtp=False).eval()
    assert model.cfg == cfg.model_copy(
        update=dict(
            n_mtp=0,
            original_seq_len=model.cfg.original_seq_len,
            mscale=model.cfg.mscale,
            mscale_all_dim=model.cfg.mscale_all_dim,
        )
    )
    return relative(logits_of(model, cfg), logits_of(reference, cfg))


def to_theirs(cfg, directory) -> float:
    """We write, and transformers reads without missing keys, unexpected keys or warnings."""
    model = random_model(cfg)
    model.save(directory, mtp=False)
    kind = DeepseekV2ForCausalLM if cfg.score_func == "softmax" else DeepseekV3ForCausalLM
    reference, info = kind.from_pretrained(directory, output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    assert reference.dtype == torch.float32
    return relative(logits_of(reference.eval(), cfg), logits_of(model, cfg))


@pytest.fixture
def no_complaints(caplog):
    """Fails when transformers logs a warning, which is how it reports keys that do not match."""
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield
    hf_logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("changes", [*V3_CASES.values(), *V2_CASES.values()], ids=[*V3_CASES, *V2_CASES])
def test_logits_agree_both_ways(changes, tmp_path, no_complaints):
    cfg = tiny(**changes)
    read, written = from_theirs(cfg, tmp_path / "theirs"), to_theirs(cfg, tmp_path / "ours")
    assert read < BOUND and written < BOUND, (read, written)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cfg=configs())
def test_logits_agree_for_random_shapes(cfg, tmp_path_factory):
    assume(not cfg.limited or cfg.n_rated_experts == 2)  # transformers always rates groups by two
    assert from_theirs(cfg, tmp_path_factory.mktemp("theirs")) < BOUND
    assert to_theirs(cfg, tmp_path_factory.mktemp("ours")) < BOUND


def test_unexpected_keys_would_be_seen(tmp_path, caplog):
    """Shows that the check above can fail: with MTP layers at an index other than 61, transformers does complain."""
    cfg = tiny()
    random_model(cfg).save(tmp_path)
    _, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert any("layers.3.eh_proj" in key for key in info["unexpected_keys"])


def test_bfloat16_agrees_to_its_own_precision(tmp_path):
    """Written in BF16, both sides hold the same weights; we read gate, norms and biases as float32."""
    cfg = tiny(n_mtp=0)
    random_model(cfg).save(tmp_path, dtype="bfloat16")
    model = deepseek.load(tmp_path, dtype=torch.float32).eval()
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **EAGER).eval()
    assert relative(logits_of(model, cfg), logits_of(reference, cfg)) < BOUND
    assert deepseek.load(tmp_path).embed.weight.dtype == torch.bfloat16
