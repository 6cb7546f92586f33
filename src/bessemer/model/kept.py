"""Bytes that a forward pass in training keeps for its backward pass, as functions of the config (V3 3.2.3, 3.3.3).

This is what a micro-batch costs from its forward to its backward, the number that a pipeline multiplies; what a layer
needs while it is being computed comes on top, once. `fp8` is the network of `model/fp8`, otherwise it is the plain one
on a CPU. Every term is a tensor that backward reads; the tests hold the sum against the allocator.
"""

from __future__ import annotations

from collections.abc import Collection

from bessemer.model import attention, attention_cpu
from bessemer.model.config import ModelConfig
from bessemer.model.recompute import Phase
from bessemer.precision.tiles import TILE

INDEX, NUMBER = 8, 4  # int64, float32
ROUTED = 3 * INDEX + NUMBER
"""Of every routed row beside the row: whose it is, its place among the gates and on the way back, and its gate."""


def kept_bytes(
    cfg: ModelConfig, rows: int, length: int, *, fp8: bool, number_bytes: int = 2, mtp: bool = True,
    recompute: Collection[Phase] = (),
) -> int:  # fmt: skip
    """Of one micro-batch of `rows` sequences, loss included. `number_bytes`: of the compute dtype; `mtp`: with the MTP
    modules; `recompute`: phases that are made again (`Transformer.set_recompute`; FP8 has its own way)."""
    state, modules = cfg.dim * number_bytes, cfg.n_mtp if mtp else 0
    if fp8:
        attention, dense, sparse = _attention_fp8(cfg, number_bytes), _ffn_fp8(cfg, cfg.inter_dim), _sparse_fp8(cfg)
        dense, sparse = dense + state, sparse + state  # the residual stream, of which norm and gate are made again
    else:
        attention = state if "attend" in recompute else _attention_plain(cfg, length, number_bytes)
        dense, sparse = _dense_plain(cfg, number_bytes, recompute), _sparse_plain(cfg, number_bytes, recompute)
    token = cfg.n_layers * attention + cfg.n_dense_layers * dense + (cfg.n_layers - cfg.n_dense_layers) * sparse
    token += 2 * state  # what the last norm reads, and the loss's gradient of what it gives
    # of a module also the inputs of its two norms, which lie side by side once more as the input of M_k
    token += modules * (attention + sparse + 6 * state)
    return rows * length * token + (1 + modules) * cfg.vocab_size * state  # with the loss's gradient of the head


def _e4m3(columns: int) -> int:
    """One row of an operand: a byte an element, a factor a tile."""
    return columns + NUMBER * -(-columns // TILE)


def _latents(cfg: ModelConfig) -> int:
    return cfg.q_lora_rank + cfg.kv_lora_rank + cfg.qk_rope_head_dim


def _attention_fp8(cfg: ModelConfig, number_bytes: int) -> int:
    out = cfg.n_heads * cfg.v_head_dim
    e5m6 = -(-out // 2) * 3 + NUMBER * -(-out // TILE)
    return (cfg.dim + _latents(cfg)) * number_bytes + e5m6 + NUMBER * cfg.n_heads  # the last: softmax denominators


def _ffn_fp8(cfg: ModelConfig, inner: int) -> int:
    return _e4m3(cfg.dim) + _e4m3(2 * inner)


def _sparse_fp8(cfg: ModelConfig) -> int:
    shared = _ffn_fp8(cfg, cfg.n_shared_experts * cfg.moe_inter_dim) if cfg.n_shared_experts else 0
    return cfg.n_activated_experts * (_ffn_fp8(cfg, cfg.moe_inter_dim) + ROUTED) + shared


def _attention_plain(cfg: ModelConfig, length: int, number_bytes: int) -> int:
    """Norms keep input and output; the core keeps heads and probabilities, in float32 (`attention_cpu`)."""
    norms = 2 * cfg.dim + 2 * cfg.q_lora_rank + 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    heads = cfg.n_heads * (2 * cfg.qk_head_dim + cfg.v_head_dim)
    if length > attention.LONGEST:
        raise ValueError(f"beyond {attention.LONGEST} tokens attention is torch's own; what that keeps is not known")
    probabilities = cfg.n_heads * attention_cpu.probabilities(length) / length
    return int((norms + cfg.n_heads * cfg.v_head_dim) * number_bytes + NUMBER * (heads + probabilities))


def _ffn_plain(inner: int, number_bytes: int) -> int:
    """Gate and up side by side, silu(gate), and its product with up."""
    return 4 * inner * number_bytes


def _dense_plain(cfg: ModelConfig, number_bytes: int, recompute: Collection[Phase]) -> int:
    ffn = 0 if "experts" in recompute else _ffn_plain(cfg.inter_dim, number_bytes)
    return _around_norm(cfg, number_bytes, recompute) + ffn


def _sparse_plain(cfg: ModelConfig, number_bytes: int, recompute: Collection[Phase]) -> int:
    gate = 2 * NUMBER * cfg.n_routed_experts + (INDEX + NUMBER) * cfg.n_activated_experts  # scores, shares, choices
    gate += NUMBER * cfg.dim if number_bytes < NUMBER else 0  # its input in float32
    inside = 0 if "experts" in recompute else 2 * cfg.moe_inter_dim
    row = (cfg.dim + inside) * number_bytes + ROUTED
    shared = 0 if "finish" in recompute else _ffn_plain(cfg.n_shared_experts * cfg.moe_inter_dim, number_bytes)
    gate = 0 if "attend" in recompute else gate
    return _around_norm(cfg, number_bytes, recompute) + gate + cfg.n_activated_experts * row + shared


def _around_norm(cfg: ModelConfig, number_bytes: int, recompute: Collection[Phase]) -> int:
    """The residual stream before the second norm, and what the norm makes of it."""
    return (1 if "attend" in recompute else 2) * cfg.dim * number_bytes
