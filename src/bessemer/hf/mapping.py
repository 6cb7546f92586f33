"""Hugging Face names: config.json <-> ModelConfig, and tensors on disk <-> the state dict.

config.json
- from_hf(to_hf(cfg)) == cfg for every config.
- Both rope spellings are written (rope_theta + rope_scaling for version 4 tools, rope_parameters for version 5), and
  either is read; two that disagree are an error.
- A key that would change the mathematics and that the network does not implement is an error, never ignored.
- transformers reads `norm_topk_prob` only for deepseek_v3, takes no `topk_method` there, rates groups by two experts
  whatever K and M, and knows no model without shared experts.
- If mscale or mscale_all_dim is 0, transformers scales cos and sin by m(1); `attention_factor` then states our factor.

Tensors. A `Slot` maps one tensor on disk to its place in the model. Stacked parameters have several slots: w13 is
gate_proj above up_proj, and the experts of a layer are one parameter here but three keys per expert on disk.
- `slots` fails unless it covers every parameter and buffer of the state dict exactly once.
- MTP module k is layer n_layers + k on disk. Its copies of embedding and head are shared parameters of the model; their
  slots are marked `copy`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.model.config import ModelConfig, yarn_mscale
from bessemer.model.transformer import Transformer

# --- config.json -----------------------------------------------------------------------------------------------------

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
    "n_kv_heads": "n_kv_heads",
    "kv_norm": "kv_norm",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "shared_inter_dim": "shared_inter_dim",
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
OWN = ("n_kv_heads", "kv_norm", "shared_inter_dim")
"""Keys that are written only for a network of our own."""
YARN = {
    "rope_factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# Defaults for absent keys, as in the published modelling code of each family.
V3_DEFAULTS = {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "num_nextn_predict_layers": 0,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 0, "q_lora_rank": 0, "tie_word_embeddings": False,
    "initializer_range": 0.02, "rms_norm_eps": 1e-6,
}  # fmt: skip
V3_DEFAULTS |= {name: 0 for name in OWN}
V2_DEFAULTS = {**V3_DEFAULTS, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
MOST_POSITIONS = 1 << 27
"""Longest text that a config.json may allow: over ten times what any published model reads."""
REWARD_SUFFIX = "ForSequenceClassification"
FAMILIES = {
    "deepseek_v3": V3_DEFAULTS, "kimi_k2": V3_DEFAULTS, "deepseek_v2": V2_DEFAULTS, "bessemer": V3_DEFAULTS,
}  # fmt: skip
"""`bessemer` marks networks that no other program supports (`ModelConfig.own`), so that others refuse them."""
# Keys of which the network implements only one value.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip


def to_hf(cfg: ModelConfig, dtype: torch.dtype, bos: int = 0, eos: int | list[int] = 1) -> dict[str, Any]:
    """The content of config.json."""
    v2 = cfg.score_func == "softmax" and not cfg.own
    if v2 and cfg.norm_topk_prob:
        warnings.warn("transformers ignores norm_topk_prob for deepseek_v2: its logits will differ", stacklevel=2)
    if not v2 and cfg.limited and cfg.n_rated_experts != 2:
        warnings.warn(
            "transformers and other engines rate a group by its two best experts, but this model by its best "
            f"{cfg.n_rated_experts} (K/M): they will choose different experts", stacklevel=2,
        )  # fmt: skip
    values = {key: getattr(cfg, field) for field, key in FIELDS.items() if cfg.own or field not in OWN}
    values["q_lora_rank"] = cfg.q_lora_rank or None
    values["n_shared_experts"] = cfg.n_shared_experts or None
    yarn = {key: getattr(cfg, field) for field, key in YARN.items()}
    yarn |= {"attention_factor": cfg.rope_scale} if _rope_scale_elsewhere(cfg) != cfg.rope_scale else {}
    kind = {"rope_type": "yarn", **yarn} if cfg.yarn else {"rope_type": "default"}
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [f"{'Bessemer' if cfg.own else 'DeepseekV2' if v2 else 'DeepseekV3'}ForCausalLM"],
        "model_type": "bessemer" if cfg.own else "deepseek_v2" if v2 else "deepseek_v3",
        **values,
        "num_key_value_heads": cfg.kv_heads,
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
        # Hugging Face has no key for the extension planned for a short-context model.
        **({} if cfg.yarn else {"bessemer": yarn}),
    }


def reward_model_json(values: dict[str, Any], pad: int) -> dict[str, Any]:
    """config.json of a reward model: one label, and the padding after the last token, where the score is read."""
    name = values["architectures"][0].removesuffix("ForCausalLM") + REWARD_SUFFIX
    return values | {
        "architectures": [name], "id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}, "pad_token_id": pad,
    }  # fmt: skip


def is_reward_model(values: dict[str, Any]) -> bool:
    """Whether a config.json describes a reward model."""
    names = values.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(REWARD_SUFFIX) for name in names)


def from_hf(values: dict[str, Any], where: str) -> ModelConfig:
    """The config of a parsed config.json; every error message begins with `where`."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{where}: model_type {family!r} is not implemented; deepseek_v3 (also Moonlight and Kimi-K2, which use "
            "that code) and deepseek_v2 are"
        )
    for key, only in FIXED.items():
        if values.get(key) not in (None, only):
            raise UserError(f"{where}: {key} = {values[key]!r} is not implemented; only {only!r} is")
    heads = values.get("num_attention_heads")
    if family != "bessemer" and values.get("num_key_value_heads") not in (None, heads):
        raise UserError(f"{where}: num_key_value_heads must equal num_attention_heads ({heads}): MLA has no groups")
    fields: dict[str, Any] = {}
    for name, key in FIELDS.items():
        value = values.get(key)
        value = FAMILIES[family].get(key) if value is None else value
        if value is None:
            raise UserError(f"{where}: key '{key}' is missing; copy config.json from the original checkpoint again")
        fields[name] = value
    cfg = ModelConfig.make({**fields, **_rope(values, where)}, where)
    if cfg.max_seq_len > MOST_POSITIONS:
        raise UserError(
            f"{where}: max_position_embeddings = {cfg.max_seq_len} is not a plausible context length; correct it"
        )
    _check_rope_scale(cfg, values, where)
    if cfg.own and family != "bessemer":
        raise UserError(f"{where}: kv_lora_rank = {cfg.kv_lora_rank} is not valid for {family}; it must be positive")
    return cfg


def _rope(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Our rotary fields, from either spelling."""
    old = _flat(values.get("rope_scaling"), values.get("rope_theta"), where, "rope_scaling")
    new = values.get("rope_parameters")
    if new is not None:
        new = _flat(new, values.get("rope_theta"), where, "rope_parameters")
        stated_old = values.get("rope_scaling") is not None or values.get("rope_theta") is not None
        if stated_old and new != old:
            raise UserError(
                f"{where}: rope_theta and rope_scaling say {old}, but rope_parameters says {new}; delete the wrong one"
            )
        old = new
    planned = values.get("bessemer") or {}
    if "rope_factor" not in old:
        old |= {field: planned[key] for field, key in YARN.items() if key in planned}
    return old


def _flat(rope: dict[str, Any] | None, theta: float | None, where: str, key: str) -> dict[str, Any]:
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {key} is not a table")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", theta)
    fields = {"rope_theta": 10000.0 if theta is None else theta}
    if kind == "default":
        return fields
    if kind != "yarn":
        raise UserError(f"{where}: {key} of type {kind!r} is not implemented; only 'yarn' is")
    if rope.get("truncate") not in (None, True):
        raise UserError(f"{where}: {key}: truncate = {rope['truncate']!r} is not implemented; only true is")
    for field, spelled in YARN.items():
        value = rope.get(spelled)
        value = YARN_DEFAULTS.get(spelled) if value is None else value
        if value is None:
            raise UserError(f"{where}: {key} lacks '{spelled}', which YaRN needs")
        fields[field] = value
    return fields


def _rope_scale_elsewhere(cfg: ModelConfig) -> float:
    """The factor on cos and sin that transformers takes unless `attention_factor` states one."""
    applied = cfg.mscale and cfg.mscale_all_dim
    return cfg.rope_scale if applied or not cfg.yarn else yarn_mscale(cfg.rope_factor, 1.0)


def _check_rope_scale(cfg: ModelConfig, values: dict[str, Any], where: str) -> None:
    scale, elsewhere = cfg.rope_scale, _rope_scale_elsewhere(cfg)
    tables = [values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)]
    stated = [table["attention_factor"] for table in tables if table.get("attention_factor") is not None]
    agree = [
        isinstance(value, int | float) and math.isclose(value, scale, rel_tol=1e-6) for value in stated
    ]  # often 7 digits
    if cfg.yarn and not all(agree):
        problem = f"attention_factor = {stated[agree.index(False)]!r} is not implemented, only the {scale!r} of mscale"
        raise UserError(f"{where}: {problem}; delete attention_factor")
    if elsewhere != scale and not stated:
        warnings.warn(
            f"{where}: without mscale or mscale_all_dim the released code, and ours, scales rotary embeddings by "
            f"{scale:g}, transformers by {elsewhere:g}; attention_factor = {scale!r} settles it", stacklevel=3,
        )  # fmt: skip


# --- tensors ---------------------------------------------------------------------------------------------------------

# Our name: their keys. Several keys are stacked along the rows; {e} is one key per expert, along the first dimension.
MODEL = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "score.weight": ("score.weight",),
}
LAYER = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "attn.wq.weight": ("self_attn.q_proj.weight",),
    "attn.wq_a.weight": ("self_attn.q_a_proj.weight",),
    "attn.q_norm.weight": ("self_attn.q_a_layernorm.weight",),
    "attn.wq_b.weight": ("self_attn.q_b_proj.weight",),
    "attn.wkv_a.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attn.kv_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "attn.wkv_b.weight": ("self_attn.kv_b_proj.weight",),
    "attn.wo.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "ffn.w13.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.w2.weight": ("mlp.down_proj.weight",),
    "ffn.gate.weight": ("mlp.gate.weight",),
    "ffn.gate.bias_E": ("mlp.gate.e_score_correction_bias",),
    "ffn.experts.w13": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "ffn.experts.w2": ("mlp.experts.{e}.down_proj.weight",),
    "ffn.shared.w13.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn.shared.w2.weight": ("mlp.shared_experts.down_proj.weight",),
}
MTP = {
    "enorm.weight": ("enorm.weight",),
    "hnorm.weight": ("hnorm.weight",),
    "eh_proj.weight": ("eh_proj.weight",),
    "norm.weight": ("shared_head.norm.weight",),
    **{f"layer.{parameter}": key for parameter, key in LAYER.items()},
}
# The matrices that the release stores and trains in FP8 (V3 3.3.1): those of attention, dense MLP and experts. Not
# embedding, head, gate, norms, biases and eh_proj.
FP8 = (
    "attn.wq.weight", "attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv_a.weight", "attn.wkv_b.weight",
    "attn.wo.weight", "ffn.w13.weight", "ffn.w2.weight", "ffn.experts.w13", "ffn.experts.w2",
    "ffn.shared.w13.weight", "ffn.shared.w2.weight",
)  # fmt: skip
MTP_COPIES = {"embed_tokens.weight": "embed.weight", "shared_head.head.weight": "head.weight"}

SCALE_SUFFIX = "_scale_inv"
# Rotary frequencies, which some exporters store although the config determines them.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Slot:
    """One tensor on disk and its place in the model: `state_dict()[name][index]`."""

    key: str
    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    copy: bool = False
    """A second copy of a shared tensor: written in MTP layers for engines that expect it, and compared when read."""

    @property
    def fp8(self) -> bool:
        """Whether an FP8 checkpoint holds this tensor quantised."""
        return self.name.endswith(FP8)

    def of(self, state: dict[str, Tensor]) -> Tensor:
        return state[self.name][self.index] if self.index else state[self.name]


def slots(cfg: ModelConfig, kind: type[Transformer] = Transformer) -> list[Slot]:
    """Every tensor of a checkpoint of this shape and kind of network, in writing order."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in kind(cfg).state_dict().items()}
    layout: list[Slot] = []
    copies = {}
    if cfg.tie_embeddings and "head.weight" in shapes:
        del shapes["head.weight"]
        copies["lm_head.weight"] = "embed.weight"
    for k in range(cfg.n_mtp):
        for spelled, source in MTP_COPIES.items():
            copies[f"model.layers.{cfg.n_layers + k}.{spelled}"] = source if source in shapes else "embed.weight"
    for name, shape in shapes.items():
        layout += _spread(name, shape, keys_of(name, cfg.n_layers))
    return layout + [Slot(key, name, (), shapes[name], copy=True) for key, name in copies.items()]


def keys_of(name: str, n_layers: int) -> tuple[str, ...]:
    """The keys on disk for one of our names, with {e} for the expert. Raises KeyError if the table lacks the name."""
    if name in MODEL:
        return MODEL[name]
    kind, number, suffix = name.split(".", 2)
    table, layer = (LAYER, int(number)) if kind == "layers" else (MTP, n_layers + int(number))
    return tuple(f"model.layers.{layer}.{key}" for key in table[suffix])


def _spread(name: str, shape: tuple[int, ...], keys: tuple[str, ...]) -> list[Slot]:
    if len(keys) == 1 and "{e}" not in keys[0]:
        return [Slot(keys[0], name, (), shape)]
    experts: Iterable[int | None] = range(shape[0]) if "{e}" in keys[0] else (None,)
    *_, rows, columns = shape
    rows_each = rows // len(keys)
    spread = []
    for e in experts:
        for part, key in enumerate(keys):
            span = slice(part * rows_each, (part + 1) * rows_each)
            index: tuple[int | slice, ...] = (span,) if e is None else (e, span)
            spread.append(Slot(key.format(e=e), name, index, (rows_each, columns)))
    return spread


def is_mtp_key(key: str, n_layers: int) -> bool:
    """Whether a tensor belongs to an MTP module of a model with this number of layers."""
    match = re.match(r"model\.layers\.(\d+)\.", key)
    return match is not None and int(match[1]) >= n_layers
