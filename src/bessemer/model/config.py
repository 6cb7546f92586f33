"""The shape of a DeepSeek V2/V3 network, with the field names of the published inference code.

Every size that a parameter count, a kernel or a checkpoint needs is a function of `ModelConfig`. Files on disk use
Hugging Face names; `hf/mapping.py` holds the one table that maps between the two.

`preset` returns a shape of presets.toml; the recipe's [model] table can still set every field.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from bessemer.errors import UserError

MAX_LAYERS, MAX_EXPERTS = 4096, 65536
"""Upper limits, above any network of the family: larger counts would only exhaust memory with per-item lists."""
LATER = frozenset({"n_kv_heads", "kv_norm", "shared_inter_dim"})
"""Fields added after version 0.1.0; 0 reproduces its behaviour."""
CONTEXT = frozenset({"max_seq_len", "rope_factor", "original_seq_len"})
"""Fields for the context length and position encoding; no tensor's shape depends on them."""


class ModelConfig(BaseModel):
    """Sizes and routing rules of one network (V3 4.2). Defaults are DeepSeek-V3's rules, not its sizes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    vocab_size: int
    """Rows of the embedding and of the output head."""
    dim: int
    """Hidden size d."""
    n_layers: int
    """Transformer layers, MTP modules not counted."""
    n_dense_layers: int = 1
    """Leading layers with a dense FFN instead of experts."""
    inter_dim: PositiveInt
    """Inner width of a dense FFN."""
    moe_inter_dim: PositiveInt
    """Inner width of one expert."""

    n_heads: int
    """Attention heads n_h."""
    q_lora_rank: NonNegativeInt = 0
    """Rank of the query latent d_c'; 0 = no query compression (V2-Lite, Moonlight)."""
    kv_lora_rank: int
    """Rank of the key-value latent d_c; 0 = none: keys and values come from the hidden state itself, for comparison."""
    n_kv_heads: int = 0
    """Without a latent: number of head groups that share keys and values (GQA; 1 = MQA); 0 = one per head (MHA)."""
    kv_norm: bool = False
    """Without a latent: apply one RMSNorm to the keys and values of all heads together, as MLA does to its latent."""
    qk_nope_head_dim: int
    """Per-head query/key dimension without rotation, d_h."""
    qk_rope_head_dim: int
    """Per-head rotary query dimension, and width of the one shared rotary key, d_h^R."""
    v_head_dim: int
    """Per-head value dimension."""

    n_routed_experts: int
    """Routed experts N_r per MoE layer."""
    n_shared_experts: NonNegativeInt = 1
    """Shared experts N_s, always active, ungated."""
    shared_inter_dim: int = 0
    """Inner width of all shared experts together; 0 = n_shared_experts * moe_inter_dim."""
    n_activated_experts: int
    """Routed experts per token K_r."""
    n_expert_groups: int = 1
    """Groups of consecutive experts; in training, one group lives on one node."""
    n_limited_groups: int = 1
    """Groups a token may use, M."""
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Gate scoring: sigmoid in V3, softmax in V2."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """noaux_tc (V3): biased scores, each group rated by its K_r/M best; group_limited_greedy (V2): by its best one."""
    norm_topk_prob: bool = True
    """Divide the chosen gates by their sum."""
    route_scale: float = 1.0
    """Factor on the routed output (2.5 in V3)."""

    n_mtp: int = 0
    """Multi-token prediction modules D."""

    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    max_seq_len: PositiveInt = 4096
    """Longest sequence in tokens."""
    rope_factor: float = 1.0
    """YaRN factor s; 1 = plain RoPE, as in the whole short-context stage (V3 4.3)."""
    original_seq_len: int = 4096
    """Context length before YaRN extension."""
    beta_fast: float = 32.0
    """YaRN beta: rotations above which a frequency is kept."""
    beta_slow: float = 1.0
    """YaRN alpha: rotations below which a frequency is divided by the factor."""
    mscale: float = 1.0
    """YaRN mscale."""
    mscale_all_dim: float = 1.0
    """YaRN mscale for the softmax scale; 0 = none."""

    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    init_std: NonNegativeFloat = 0.006
    """Standard deviation of the initial weights (V3 4.2)."""
    tie_embeddings: bool = False
    """Share the embedding and the output head."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "v_head_dim", "qk_nope_head_dim"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("kv_lora_rank", "n_kv_heads", "shared_inter_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.n_kv_heads and self.kv_lora_rank:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} needs kv_lora_rank 0: heads already share a latent")
        if self.kv_norm and self.kv_lora_rank:
            raise ValueError("kv_norm needs kv_lora_rank 0: a latent is normalised already")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.shared_inter_dim and not self.n_shared_experts:
            raise ValueError(f"shared_inter_dim {self.shared_inter_dim} needs n_shared_experts")
        if self.qk_rope_head_dim <= 0 or self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even and positive, not {self.qk_rope_head_dim}")
        for name, most in (("n_layers", MAX_LAYERS), ("n_mtp", MAX_LAYERS), ("n_routed_experts", MAX_EXPERTS)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be between 0 and {most}, not {getattr(self, name)}")
        if not 0 <= self.n_dense_layers <= self.n_layers:
            raise ValueError(f"n_dense_layers {self.n_dense_layers} is not between 0 and n_layers {self.n_layers}")
        if self.rope_factor < 1.0:
            raise ValueError(f"rope_factor must be at least 1, not {self.rope_factor}")
        if self.n_dense_layers == self.n_layers and not self.n_mtp:
            return self
        experts, groups, limit = self.n_routed_experts, self.n_expert_groups, self.n_limited_groups
        if groups < 1 or experts % groups:
            raise ValueError(f"n_routed_experts {experts} is not a multiple of n_expert_groups {groups}")
        if not 1 <= limit <= groups:
            raise ValueError(f"n_limited_groups {limit} is not between 1 and n_expert_groups {groups}")
        available = limit * (experts // groups)
        if not 1 <= self.n_activated_experts <= available:
            raise ValueError(
                f"n_activated_experts {self.n_activated_experts} is not between 1 and the {available} experts of "
                f"{limit} groups; lower it or raise n_limited_groups"
            )
        return self

    @model_serializer(mode="wrap")
    def _dump(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omits fields of `LATER` that are 0, so that records of older runs still compare equal."""
        values = fields(self)
        return {name: value for name, value in values.items() if name not in LATER or value}

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def kv_width(self) -> int:
        """Numbers per token that attention reads again and a cache would hold: the latent (or all keys and values) and
        the rotary key."""
        return (self.kv_lora_rank or self.heads_width) + self.qk_rope_head_dim

    @property
    def heads_width(self) -> int:
        """Width of all keys (without their rotary part) and values of a token."""
        return self.kv_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def normed_width(self) -> int:
        """Width of the RMSNorm on the latent, or on the keys and values (`kv_norm`); 0 without one."""
        return self.kv_lora_rank or (self.heads_width if self.kv_norm else 0)

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together; 0 without any."""
        return self.shared_inter_dim or self.n_shared_experts * self.moe_inter_dim

    @property
    def own(self) -> bool:
        """Whether no other program supports this network: it has no latent, or shared experts of an unusual width."""
        return not self.kv_lora_rank or self.shared_width != self.n_shared_experts * self.moe_inter_dim

    def require_latent(self, what: str) -> None:
        """Raises UserError unless attention is MLA; for code that reads the latent. `what` names that code."""
        if not self.kv_lora_rank:
            raise UserError(
                f"{what} supports only multi-head latent attention; this network has kv_lora_rank = 0, which can be "
                "trained and scored, in BF16 or float32"
            )

    @property
    def n_rated_experts(self) -> int:
        """How many of a group's best scores are summed to rate it: K_r/M (V3 2.1.2), rounded up; in V2, one."""
        noaux = self.topk_method == "noaux_tc"
        return math.ceil(self.n_activated_experts / self.n_limited_groups) if noaux else 1

    @property
    def limited(self) -> bool:
        """Whether a token may use only some of the groups, so that their rating matters."""
        return self.topk_method != "greedy" and self.n_limited_groups < self.n_expert_groups

    @property
    def yarn(self) -> bool:
        return self.rope_factor > 1.0

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(d_h + d_h^R); with YaRN times m^2, m = 0.1 mscale_all_dim ln s + 1 (V3 4.3, released code)."""
        scale = self.qk_head_dim**-0.5
        if self.yarn and self.mscale_all_dim:
            scale *= yarn_mscale(self.rope_factor, self.mscale_all_dim) ** 2
        return scale

    @property
    def rope_scale(self) -> float:
        """YaRN's factor on cos and sin, m(mscale) / m(mscale_all_dim) (released code); 1 for V3, whose temperature is
        in the softmax scale."""
        if not self.yarn:
            return 1.0
        return yarn_mscale(self.rope_factor, self.mscale) / yarn_mscale(self.rope_factor, self.mscale_all_dim)

    def at_length(self, context: Mapping[str, Any]) -> ModelConfig:
        """The same network with new values for some fields of CONTEXT, such as YaRN's (V3 4.3)."""
        assert context.keys() <= CONTEXT, f"{sorted(context.keys() - CONTEXT)} change more than position encoding"
        return self.make({**self.model_dump(), **context})

    @classmethod
    def make(
        cls, values: dict[str, Any], where: str = "model", set_by: Callable[[str], str] = lambda key: ""
    ) -> ModelConfig:  # fmt: skip
        """Validates plain values; all problems are reported in one UserError, which names each key and its fix.
        `set_by` gives what a problem with a key begins with: the argument that set it."""
        try:
            return cls(**values)
        except ValidationError as error:
            faults = [set_by(str((*item["loc"], "")[0])) + _explain(item, where) for item in error.errors()]
            raise UserError("; ".join(faults)) from None


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN temperature 0.1 * mscale * ln(factor) + 1 (V3 4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


ELSEWHERE = {
    "dim": "hidden hidden_size hidden_dim d_model n_embd model_dim width",
    "n_layers": "layers depth n_layer num_layers num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace dense_layers",
    "inter_dim": "intermediate_size ffn ffn_dim d_ff mlp_dim",
    "moe_inter_dim": "moe_intermediate_size expert_dim",
    "n_heads": "heads n_head num_heads num_attention_heads",
    "n_kv_heads": "num_key_value_heads kv_heads",
    "n_routed_experts": "experts n_experts num_experts num_local_experts",
    "n_activated_experts": "num_experts_per_tok experts_per_token top_k topk",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "n_mtp": "num_nextn_predict_layers mtp",
    "vocab_size": "vocab vocabulary",
    "max_seq_len": "max_position_embeddings context context_length n_positions block_size seq_len",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
"""Key -> what transformers and other programs call it, for hints."""


def meant(key: str) -> str | None:
    """The key that an unknown one most likely stands for."""
    for name, others in ELSEWHERE.items():
        if key in others.split():
            return name
    near = difflib.get_close_matches(key, [*ModelConfig.model_fields, "preset"], n=1)
    return near[0] if near else None


def _explain(item: ErrorDetails, where: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = meant(key)
        hint = f"did you mean '{near}'?" if near else "bessemer keys model lists all"
        return f"{where}: unknown key '{key}'; {hint}"
    if item["type"] == "missing":
        return f"{where}: key '{key}' is missing"
    if not key:
        return f"{where}: {item['msg'].removeprefix('Value error, ')}"
    return f"{where}: {key}: {item['msg']}, got {item['input']!r}"


PRESETS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("presets.toml").read_text("utf-8"))


def preset(name: str, set_by: Callable[[str], str] = lambda key: "", /, **overrides: object) -> ModelConfig:
    """The named shape with some fields replaced; UserError, with the nearest match, for an unknown name or key, which
    begins with what `set_by` gives for it (`ModelConfig.make`)."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{set_by('preset')}model: unknown preset '{name}'{hint} Presets: {', '.join(PRESETS)}")
    return ModelConfig.make({**PRESETS[name], **overrides}, f"model (preset '{name}')", set_by)
