"""Parameters, FLOPs and cache bytes as functions of the config (V3 4.2; ISCA Tables 1 and 2).

A multiply-add counts as two FLOPs. The published totals count the correction biases of the gates, and so do these.
"""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.model.config import ModelConfig


def attention_params(cfg: ModelConfig) -> int:
    """One MLA block, its two latent norms included."""
    heads, dim = cfg.n_heads, cfg.dim
    if cfg.q_lora_rank:
        query = dim * cfg.q_lora_rank + cfg.q_lora_rank + cfg.q_lora_rank * heads * cfg.qk_head_dim
    else:
        query = dim * heads * cfg.qk_head_dim
    latent = dim * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) + cfg.kv_lora_rank
    expand = cfg.kv_lora_rank * heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    return query + latent + expand + heads * cfg.v_head_dim * dim


def expert_params(cfg: ModelConfig) -> int:
    return 3 * cfg.dim * cfg.moe_inter_dim


def dense_ffn_params(cfg: ModelConfig) -> int:
    return 3 * cfg.dim * cfg.inter_dim


def moe_ffn_params(cfg: ModelConfig, active_only: bool = False) -> int:
    """Experts, gate and correction biases of one layer: all of them, or what one token uses."""
    routed = cfg.n_activated_experts if active_only else cfg.n_routed_experts
    return (routed + cfg.n_shared_experts) * expert_params(cfg) + cfg.n_routed_experts * cfg.dim + gate_biases(cfg)


def gate_biases(cfg: ModelConfig) -> int:
    return cfg.n_routed_experts if cfg.topk_method == "noaux_tc" else 0


def _layers(cfg: ModelConfig, active_only: bool) -> int:
    norms = 2 * cfg.dim
    dense = cfg.n_dense_layers * (attention_params(cfg) + norms + dense_ffn_params(cfg))
    sparse = attention_params(cfg) + norms + moe_ffn_params(cfg, active_only)
    return dense + (cfg.n_layers - cfg.n_dense_layers) * sparse


def embedding_params(cfg: ModelConfig) -> int:
    """The embedding alone; the head is as large."""
    return cfg.vocab_size * cfg.dim


def main_params(cfg: ModelConfig) -> int:
    """The model without MTP: 671,026,419,200 for V3."""
    tables = embedding_params(cfg) * (1 if cfg.tie_embeddings else 2)
    return tables + _layers(cfg, active_only=False) + cfg.dim


def mtp_params(cfg: ModelConfig) -> int:
    """What the MTP modules add beyond the shared embedding and head."""
    one = attention_params(cfg) + moe_ffn_params(cfg) + 2 * cfg.dim * cfg.dim + 5 * cfg.dim
    return cfg.n_mtp * one


def stored_params(cfg: ModelConfig) -> int:
    """As released: each MTP module stores its own copy of embedding and head. 684,489,845,504 for V3."""
    return main_params(cfg) + mtp_params(cfg) + cfg.n_mtp * 2 * embedding_params(cfg)


def active_params(cfg: ModelConfig, tables: bool = True) -> int:
    """Parameters one token uses in the main model; with embedding and head, or without both."""
    both = embedding_params(cfg) * (1 if cfg.tie_embeddings else 2)
    return _layers(cfg, active_only=True) + cfg.dim + (both if tables else 0)


def kv_cache_elements(cfg: ModelConfig) -> int:
    """Cached numbers per token: (d_c + d_h^R) per layer."""
    return cfg.n_layers * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)


def kv_cache_bytes(cfg: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes per token of context: 70,272 for V3 in BF16."""
    return kv_cache_elements(cfg) * bytes_per_element


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token."""

    matmul: int
    """All weight matrices, head included, embedding look-up not."""
    attention: float
    """q k^T and a v, causal average over the sequence."""

    @property
    def forward(self) -> float:
        return self.matmul + self.attention

    @property
    def training(self) -> float:
        """Forward plus backward (twice the forward)."""
        return 3 * self.forward


def _norm_gains(cfg: ModelConfig) -> int:
    return 2 * cfg.dim + cfg.kv_lora_rank + cfg.q_lora_rank


def flops_per_token(cfg: ModelConfig, seq_len: int, causal: bool = True, mtp: bool = False) -> Flops:
    """Forward FLOPs per token at a sequence length. V3 at 4096, causal, without MTP: training 250.5e9."""
    layers = cfg.n_layers
    gains = cfg.n_layers * _norm_gains(cfg) + cfg.dim + (cfg.n_layers - cfg.n_dense_layers) * gate_biases(cfg)
    weights = active_params(cfg, tables=False) - gains + embedding_params(cfg)
    if mtp:
        layers += cfg.n_mtp
        gains = cfg.kv_lora_rank + cfg.q_lora_rank + gate_biases(cfg)
        one = attention_params(cfg) + moe_ffn_params(cfg, active_only=True) - gains
        weights += cfg.n_mtp * (one + 2 * cfg.dim * cfg.dim + embedding_params(cfg))
    span = (seq_len + 1) / 2 if causal else seq_len
    attention = 2 * span * cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim) * layers
    return Flops(matmul=2 * weights, attention=attention)
