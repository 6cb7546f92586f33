"""config.json: ModelConfig <-> the keys of Hugging Face (reference A.1 and B.5, ecosystem 4.1).

Invariants
- from_hf(to_hf(cfg)) == cfg for every config.
- Both rope spellings are written (rope_theta + rope_scaling for version 4 tools, rope_parameters for version 5), and
  either is read; two that disagree are an error.
- A key that would change the mathematics and that the network does not implement is an error, never ignored.

What other software does with it: transformers reads `norm_topk_prob` only for deepseek_v3, takes no `topk_method`
there, and knows no model without shared experts.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from bessemer.errors import UserError
from bessemer.model.config import ModelConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "topk_method": "topk_method",
    "norm_topk_prob": "norm_topk_prob",
    "route_scale": "routed_scaling_factor",
    "n_mtp": "num_nextn_predict_layers",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
YARN = {
    "rope_factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# Values of absent keys: what the published modelling code of each family takes.
V3_DEFAULTS = {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "num_nextn_predict_layers": 0,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 0, "q_lora_rank": 0, "tie_word_embeddings": False,
    "initializer_range": 0.02, "rms_norm_eps": 1e-6,
}  # fmt: skip
V2_DEFAULTS = {**V3_DEFAULTS, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
SCORING = "ForSequenceClassification"
FAMILIES = {"deepseek_v3": V3_DEFAULTS, "kimi_k2": V3_DEFAULTS, "deepseek_v2": V2_DEFAULTS}
# Keys with one value that the network implements.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip


def to_hf(cfg: ModelConfig, dtype: torch.dtype, bos: int = 0, eos: int | list[int] = 1) -> dict[str, Any]:
    """The content of config.json."""
    v2 = cfg.score_func == "softmax"
    if v2 and cfg.norm_topk_prob:
        warnings.warn("transformers ignores norm_topk_prob for deepseek_v2: its logits will differ", stacklevel=2)
    values = {theirs: getattr(cfg, ours) for ours, theirs in FIELDS.items()}
    values["q_lora_rank"] = cfg.q_lora_rank or None
    values["n_shared_experts"] = cfg.n_shared_experts or None
    yarn = {theirs: getattr(cfg, ours) for ours, theirs in YARN.items()}
    kind = {"rope_type": "yarn", **yarn} if cfg.yarn else {"rope_type": "default"}
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["DeepseekV2ForCausalLM" if v2 else "DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v2" if v2 else "deepseek_v3",
        **values,
        "num_key_value_heads": cfg.n_heads,
        **FIXED,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
        "torch_dtype": name,
        "dtype": name,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": {"type": "yarn", **yarn} if cfg.yarn else None,
        "rope_parameters": {**kind, "rope_theta": cfg.rope_theta},
        # Hugging Face has no place for the extension that a short-context model is planned to get.
        **({} if cfg.yarn else {"bessemer": yarn}),
    }


def scoring(values: dict[str, Any], pad: int) -> dict[str, Any]:
    """The config of a reward model: one label, and padding after the last token, where the score is read."""
    name = values["architectures"][0].removesuffix("ForCausalLM") + SCORING
    return values | {
        "architectures": [name], "id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}, "pad_token_id": pad,
    }  # fmt: skip


def scores(values: dict[str, Any]) -> bool:
    """Whether a config is a reward model's."""
    return any(str(name).endswith(SCORING) for name in values.get("architectures") or ())


def from_hf(values: dict[str, Any], where: str) -> ModelConfig:
    """The config of a parsed config.json; `where` opens every error message."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{where}: model_type {family!r} is not a network this program has; it has deepseek_v3 (also Moonlight and "
            "Kimi-K2, which use that code) and deepseek_v2"
        )
    for key, wanted in FIXED.items():
        if values.get(key) not in (None, wanted):
            raise UserError(f"{where}: {key} = {values[key]!r} is not implemented; only {wanted!r} is")
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads") not in (None, heads):
        raise UserError(f"{where}: num_key_value_heads must equal num_attention_heads ({heads}): MLA has no groups")
    ours: dict[str, Any] = {}
    for name, key in FIELDS.items():
        value = values.get(key)
        value = FAMILIES[family].get(key) if value is None else value
        if value is None:
            raise UserError(f"{where}: key '{key}' is missing; copy config.json from the original checkpoint again")
        ours[name] = value
    return ModelConfig.make({**ours, **_rope(values, where)}, where)


def _rope(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Our rotary fields from whichever spelling is there."""
    old = _flat(values.get("rope_scaling"), values.get("rope_theta"), where, "rope_scaling")
    new = values.get("rope_parameters")
    if new is not None:
        new = _flat(new, values.get("rope_theta"), where, "rope_parameters")
        stated_old = values.get("rope_scaling") is not None or values.get("rope_theta") is not None
        if stated_old and new != old:
            raise UserError(
                f"{where}: rope_theta and rope_scaling say {old}, rope_parameters says {new}; delete the wrong spelling"
            )
        old = new
    planned = values.get("bessemer") or {}
    if "rope_factor" not in old:
        old |= {ours: planned[theirs] for ours, theirs in YARN.items() if theirs in planned}
    return old


def _flat(rope: dict[str, Any] | None, theta: float | None, where: str, key: str) -> dict[str, Any]:
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {key} is not a table")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", theta)
    found = {"rope_theta": 10000.0 if theta is None else theta}
    if kind == "default":
        return found
    if kind != "yarn":
        raise UserError(f"{where}: {key} of type {kind!r} is not implemented; only 'yarn' is")
    if rope.get("attention_factor") is not None or rope.get("truncate") not in (None, True):
        raise UserError(f"{where}: {key}: attention_factor and truncate are not implemented; mscale is")
    for ours, theirs in YARN.items():
        value = rope.get(theirs)
        value = YARN_DEFAULTS.get(theirs) if value is None else value
        if value is None:
            raise UserError(f"{where}: {key} lacks '{theirs}', which YaRN needs")
        found[ours] = value
    return found
