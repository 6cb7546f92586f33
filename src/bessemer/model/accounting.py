"""Parameters, FLOPs and cache bytes as functions of the config (V3 4.2; "Insights into DeepSeek-V3", ISCA 2025, Tables
1 and 2).

A multiply-add counts as two FLOPs. The published totals include the correction biases of the gates, and so do these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bessemer.model.config import ModelConfig

# --- parameters ------------------------------------------------------------------------------------------------------


class ParamTensor(NamedTuple):
    """One parameter tensor. Routing biases are buffers and are not listed."""

    numel: int
    expert: bool = False
    """Whether it belongs to the routed experts."""
    float32: bool = False
    """Whether it is float32 whatever the compute dtype, as norm gains and gates are."""
    matrix: bool = True
    fp8: tuple[int, int, int] | None = None
    """Number, rows and columns of the matrices that FP8 training quantises."""


def matrices(rows: int, columns: int, number: int = 1, expert: bool = False) -> ParamTensor:
    """One or more matrices that FP8 training quantises."""
    return ParamTensor(number * rows * columns, expert, fp8=(number, rows, columns))


def gain(width: int) -> ParamTensor:
    """The gain of an RMSNorm."""
    return ParamTensor(width, float32=True, matrix=False)


def attention_tensors(cfg: ModelConfig) -> Iterator[ParamTensor]:
    """One attention block, its latent norms included."""
    heads, dim = cfg.n_heads, cfg.dim
    if cfg.q_lora_rank:
        yield from (matrices(cfg.q_lora_rank, dim), gain(cfg.q_lora_rank))
        yield matrices(heads * cfg.qk_head_dim, cfg.q_lora_rank)
    else:
        yield matrices(heads * cfg.qk_head_dim, dim)
    yield matrices(cfg.kv_lora_rank + cfg.qk_rope_head_dim, dim)
    if cfg.normed_width:
        yield gain(cfg.normed_width)
    yield matrices(cfg.heads_width, cfg.kv_lora_rank or dim)
    yield matrices(dim, heads * cfg.v_head_dim)


def ffn_tensors(cfg: ModelConfig, dense: bool, ep: int = 1) -> Iterator[ParamTensor]:
    """The dense FFN; or the gate, the shared expert and one of `ep` equal shares of the routed experts."""
    if dense:
        yield from (matrices(2 * cfg.inter_dim, cfg.dim), matrices(cfg.dim, cfg.inter_dim))
        return
    yield ParamTensor(cfg.n_routed_experts * cfg.dim, float32=True)
    local, inner = cfg.n_routed_experts // ep, cfg.moe_inter_dim
    yield from (matrices(2 * inner, cfg.dim, local, expert=True), matrices(cfg.dim, inner, local, expert=True))
    if shared := cfg.shared_width:
        yield from (matrices(2 * shared, cfg.dim), matrices(cfg.dim, shared))


def layer_tensors(cfg: ModelConfig, dense: bool, ep: int = 1) -> Iterator[ParamTensor]:
    """One layer, with one of `ep` equal shares of its routed experts."""
    yield from (gain(cfg.dim), gain(cfg.dim))
    yield from attention_tensors(cfg)
    yield from ffn_tensors(cfg, dense, ep)


def mtp_tensors(cfg: ModelConfig, ep: int = 1) -> Iterator[ParamTensor]:
    """One MTP module, without the shared embedding and head."""
    yield from (ParamTensor(2 * cfg.dim * cfg.dim), gain(cfg.dim), gain(cfg.dim), gain(cfg.dim))
    yield from layer_tensors(cfg, False, ep)


def _total(tensors: Iterable[ParamTensor]) -> int:
    return sum(tensor.numel for tensor in tensors)


def attention_params(cfg: ModelConfig) -> int:
    return _total(attention_tensors(cfg))


def expert_params(cfg: ModelConfig) -> int:
    """One routed expert."""
    return 3 * cfg.dim * cfg.moe_inter_dim


def _unused_params(cfg: ModelConfig) -> int:
    """The routed experts of one layer that a token does not use."""
    return (cfg.n_routed_experts - cfg.n_activated_experts) * expert_params(cfg)


def gate_biases(cfg: ModelConfig) -> int:
    return cfg.n_routed_experts if cfg.topk_method == "noaux_tc" else 0


def ffn_params(cfg: ModelConfig, dense: bool, active_only: bool = False) -> int:
    """The FFN of one layer, gate and correction biases included; `active_only`: only the experts one token uses."""
    if dense:
        return _total(ffn_tensors(cfg, dense))
    return _total(ffn_tensors(cfg, dense)) + gate_biases(cfg) - (_unused_params(cfg) if active_only else 0)


def _all_layers(cfg: ModelConfig, active_only: bool) -> int:
    dense, sparse = (attention_params(cfg) + 2 * cfg.dim + ffn_params(cfg, d, active_only) for d in (True, False))
    return cfg.n_dense_layers * dense + (cfg.n_layers - cfg.n_dense_layers) * sparse


def embedding_params(cfg: ModelConfig) -> int:
    """The embedding alone; the head is the same size."""
    return cfg.vocab_size * cfg.dim


def main_params(cfg: ModelConfig) -> int:
    """The model without MTP: 671,026,419,200 for V3."""
    tables = embedding_params(cfg) * (1 if cfg.tie_embeddings else 2)
    return tables + _all_layers(cfg, active_only=False) + cfg.dim


def mtp_params(cfg: ModelConfig) -> int:
    """All MTP modules, without the shared embedding and head."""
    return cfg.n_mtp * (_total(mtp_tensors(cfg)) + gate_biases(cfg))


def stored_params(cfg: ModelConfig) -> int:
    """All parameters as released: each MTP module stores its own copy of embedding and head. 684,489,845,504 for V3."""
    return main_params(cfg) + mtp_params(cfg) + cfg.n_mtp * 2 * embedding_params(cfg)


def active_params(cfg: ModelConfig, tables: bool = True) -> int:
    """Parameters of the main model that one token uses; `tables`: with embedding and head."""
    embeddings = embedding_params(cfg) * (1 if cfg.tie_embeddings else 2)
    return _all_layers(cfg, active_only=True) + cfg.dim + (embeddings if tables else 0)


# --- cache and FLOPs -------------------------------------------------------------------------------------------------


def kv_cache_elements(cfg: ModelConfig) -> int:
    """Cached numbers per token: d_c + d_h^R per layer; without a latent, all keys and values and d_h^R."""
    return cfg.n_layers * cfg.kv_width


def kv_cache_bytes(cfg: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes per token of context: 70,272 for V3 in BF16."""
    return kv_cache_elements(cfg) * bytes_per_element


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token."""

    matmul: int
    """All weight matrices, including the head but not the embedding look-up."""
    attention: float
    """q k^T and a v, averaged over the positions of the sequence."""

    @property
    def forward(self) -> float:
        return self.matmul + self.attention

    @property
    def training(self) -> float:
        """Forward plus backward (twice the forward)."""
        return 3 * self.forward


def flops_per_token(cfg: ModelConfig, seq_len: int, causal: bool = True, mtp: bool = False) -> Flops:
    """Forward FLOPs per token at a sequence length. V3 at 4096, causal, without MTP: 250.5e9 for training."""

    def used(tensors: Iterable[ParamTensor]) -> int:
        tensors = list(tensors)
        idle = _unused_params(cfg) if any(tensor.expert for tensor in tensors) else 0
        return _total(tensor for tensor in tensors if tensor.matrix) - idle

    layers, n_dense = cfg.n_layers, cfg.n_dense_layers
    weights = n_dense * used(layer_tensors(cfg, True)) + (layers - n_dense) * used(layer_tensors(cfg, False))
    weights += embedding_params(cfg)
    if mtp:
        layers += cfg.n_mtp
        weights += cfg.n_mtp * (used(mtp_tensors(cfg)) + embedding_params(cfg))
    span = (seq_len + 1) / 2 if causal else seq_len
    attention = 2 * span * cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim) * layers
    return Flops(matmul=2 * weights, attention=attention)
