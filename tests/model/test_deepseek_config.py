"""config.json: no field is lost in a round trip, both rope spellings are read, unknown rules are refused."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_cases import V2, YARN, configs, tiny

from bessemer.errors import UserError
from bessemer.hf import deepseek, mapping
from bessemer.model.config import PRESETS, ModelConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive(name, tmp_path):
    deepseek.write_config(preset(name), tmp_path)
    assert deepseek.read_config(tmp_path) == preset(name)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(cfg=configs(), beta=st.floats(1.5, 64), eps=st.floats(1e-9, 1e-3), rule=st.sampled_from([{}, V2]))
def test_random_configs_survive(cfg, beta, eps, rule):
    cfg = ModelConfig.make({**cfg.model_dump(), "beta_fast": beta, "norm_eps": eps, **rule, "n_activated_experts": 1})
    text = json.dumps(mapping.to_hf(cfg, torch.float32))
    assert mapping.from_hf(json.loads(text), "here") == cfg


def test_every_field_has_a_key():
    """A field added to ModelConfig without a place on disk fails here."""
    written = {*mapping.FIELDS, *mapping.YARN, "rope_theta"}
    assert written == set(ModelConfig.model_fields)


def test_the_published_config_is_written():
    """Reference A.1: V3 after context extension, key by key."""
    cfg = preset("v3", rope_factor=40.0, max_seq_len=163840)
    actual = mapping.to_hf(cfg, torch.bfloat16)
    expected = dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=129280, hidden_size=7168,
        intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
        num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8, n_group=8,
        topk_group=4, first_k_dense_replace=3, norm_topk_prob=True, routed_scaling_factor=2.5, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_nextn_predict_layers=1,
        rms_norm_eps=1e-6, topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1, hidden_act="silu",
        tie_word_embeddings=False, max_position_embeddings=163840, attention_bias=False, bos_token_id=0,
        eos_token_id=1, rope_theta=10000.0, torch_dtype="bfloat16", ep_size=1, use_cache=True, attention_dropout=0.0,
    )  # fmt: skip
    assert {key: actual[key] for key in expected} == expected
    yarn = dict(factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1, mscale_all_dim=1)
    assert actual["rope_scaling"] == {"type": "yarn", **yarn}
    assert actual["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 10000.0, **yarn}


def test_either_rope_spelling_is_enough_and_two_must_agree():
    cfg = tiny(**YARN, rope_theta=5000.0)
    values = mapping.to_hf(cfg, torch.float32)
    new = {k: v for k, v in values.items() if k not in ("rope_theta", "rope_scaling")}
    old = {k: v for k, v in values.items() if k != "rope_parameters"}
    assert mapping.from_hf(new, "here") == mapping.from_hf(old, "here") == cfg
    for change in ({"rope_theta": 7.0}, {"rope_scaling": {**values["rope_scaling"], "factor": 2.0}}):
        with pytest.raises(UserError, match="rope_theta and rope_scaling"):
            mapping.from_hf({**values, **change}, "here")


def test_absent_mscale_means_what_the_released_code_takes():
    values = mapping.to_hf(tiny(**YARN), torch.float32)
    del values["rope_parameters"], values["rope_scaling"]["mscale_all_dim"], values["rope_scaling"]["mscale"]
    cfg = mapping.from_hf(values, "here")
    assert (cfg.mscale, cfg.mscale_all_dim) == (1.0, 0.0)


def test_a_single_mscale_is_written_as_attention_factor():
    """transformers takes 0.1 ln s + 1 where either is 0, the released code m(mscale) / m(mscale_all_dim)."""
    cfg = tiny(**YARN, mscale=0.707, mscale_all_dim=0.0)
    values = mapping.to_hf(cfg, torch.float32)
    assert values["rope_scaling"]["attention_factor"] == values["rope_parameters"]["attention_factor"] == cfg.rope_scale
    assert mapping.from_hf(json.loads(json.dumps(values)), "here") == cfg
    for table in (values["rope_scaling"], values["rope_parameters"]):
        del table["attention_factor"]
    with pytest.warns(UserWarning, match=r"here: .*attention_factor = 1\.098"):
        assert mapping.from_hf(values, "here") == cfg
    values["rope_scaling"]["attention_factor"] = round(cfg.rope_scale, 7)
    assert mapping.from_hf(values, "here") == cfg
    for wrong in (1.5, "1.5"):
        values["rope_scaling"]["attention_factor"] = wrong
        with pytest.raises(UserError, match=rf"attention_factor = {wrong!r} .*; delete attention_factor$"):
            mapping.from_hf(values, "here")
    for fields in ({"mscale_all_dim": 0.0}, {}):
        assert "attention_factor" not in mapping.to_hf(tiny(**YARN, **fields), torch.float32)["rope_scaling"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llama"}, "model_type 'llama'.*deepseek_v3.*deepseek_v2"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["deepseek_v3"]}, "model_type .* is not implemented"),
        ({"attention_bias": True}, "attention_bias = True is not implemented"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads must equal"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"scoring_func": "tanh"}, "score_func"),
        ({"n_group": 12}, "n_activated_experts 3 is not between 1 and the 2 experts of 2 groups"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "type 'linear' is not implemented"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "lacks 'original_max_position_embeddings'"),
        ({"rope_parameters": [1]}, "rope_parameters is not a table"),
    ],
)
def test_what_the_network_lacks_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        mapping.from_hf({**mapping.to_hf(tiny(), torch.float32), **change}, "config.json")


@pytest.mark.parametrize("names", [5, "ForSequenceClassification", {"a": 1}, [5], None])
def test_a_reward_model_is_listed_as_one(names):
    assert not mapping.is_reward_model({"architectures": names})
    assert mapping.is_reward_model({"architectures": ["LlamaForSequenceClassification"]})


def test_kimi_and_v2_defaults():
    values = mapping.to_hf(tiny(), torch.float32)
    assert mapping.from_hf({**values, "model_type": "kimi_k2"}, "here") == tiny()
    bare = {k: v for k, v in values.items() if k not in ("scoring_func", "topk_method", "norm_topk_prob")}
    cfg = mapping.from_hf({**bare, "model_type": "deepseek_v2"}, "here")
    assert (cfg.score_func, cfg.topk_method, cfg.norm_topk_prob) == ("softmax", "greedy", False)


def test_a_rule_that_transformers_ignores_is_announced():
    with pytest.warns(UserWarning, match="ignores norm_topk_prob"):
        mapping.to_hf(tiny(**{**V2, "norm_topk_prob": True}), torch.float32)
    with pytest.warns(UserWarning, match=r"two best experts.*best 1 \(K/M\)"):
        mapping.to_hf(tiny(n_activated_experts=2), torch.float32)


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[]", "not a JSON object"),
                                         ('{"a": 1, "a": 2}', "key a occurs twice")])  # fmt: skip
def test_broken_json(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json: {words}"):
        deepseek.read_config(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(UserError, match=r"config.json does not exist"):
        deepseek.read_config(tmp_path)
