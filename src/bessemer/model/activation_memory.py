"""Bytes that a forward pass in training keeps for its backward pass, as functions of the config (V3 3.2.3, 3.3.3).

This is what a micro-batch costs from its forward to its backward, the number that a pipeline multiplies; what a layer
needs while it is being computed comes on top, once. `fp8` is the network of `model/fp8`, otherwise it is the plain one
on a CPU, or with `fused` one whose attention core keeps heads and softmax denominators, as FlashAttention does. Every
term is a tensor that backward reads; the tests hold the sum against the allocator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from bessemer.model import attention, attention_cpu
from bessemer.model.config import ModelConfig
from bessemer.model.recompute import Phase
from bessemer.precision.operand import TILE

INDEX, NUMBER = 8, 4  # int64, float32
ROUTED = 3 * INDEX + NUMBER
"""Of every routed row beside the row: whose it is, its place among the gates and on the way back, and its gate."""


def kept_bytes(
    cfg: ModelConfig, rows: int, length: int, *, fp8: bool, number_bytes: int = 2, mtp: bool = True,
    recompute: Collection[Phase] = (),
) -> int:  # fmt: skip
    """Of one micro-batch of `rows` sequences, loss included. `number_bytes`: of the compute dtype; `mtp`: with the MTP
    modules; `recompute`: phases that are made again (`Transformer.set_recompute`)."""
    layers = range(cfg.n_layers)
    return slice_bytes(
        cfg, layers, rows, length, last=True, fp8=fp8, number_bytes=number_bytes, mtp=mtp, recompute=recompute
    )


def slice_bytes(
    cfg: ModelConfig, layers: Iterable[int], rows: int, length: int, *, last: bool, fp8: bool, number_bytes: int = 2,
    mtp: bool = True, fused: bool = False, recompute: Collection[Phase] = (), cut: bool = False,
) -> int:  # fmt: skip
    """The same of some layers. The `last` slice has norm, MTP modules and loss; any other keeps what it hands on.
    `cut`: `length` is a rank's share of rows that are cut over ranks (`parallel.context`)."""

    def layer(dense: bool) -> int:
        return layer_bytes(
            cfg, length, dense, fp8=fp8, number_bytes=number_bytes, fused=fused, recompute=recompute, cut=cut
        )

    state, modules = cfg.dim * number_bytes, cfg.n_mtp if mtp and last else 0
    token = sum(layer(i < cfg.n_dense_layers) for i in layers)
    token += 2 * state if last else state  # what the last norm reads, and the loss's gradient of what it gives
    # of a module also the inputs of its two norms, which lie side by side once more as the input of M_k
    token += modules * (layer(False) + 6 * state) if modules else 0
    return rows * length * token + ((1 + modules) * cfg.vocab_size * state if last else 0)  # the head's gradient


def layer_bytes(
    cfg: ModelConfig, length: int, dense: bool, *, fp8: bool, number_bytes: int = 2, fused: bool = False,
    recompute: Collection[Phase] = (), cut: bool = False,
) -> int:  # fmt: skip
    """Of one token in one layer."""
    state, again = cfg.dim * number_bytes, "attend" in recompute
    if fp8:  # that phases are made again there, too, is other trainers' way
        # beside the FFN the residual stream, of which norm and gate are made again
        attend = state if again else _attention_fp8(cfg, number_bytes) + state
        ffn = _ffn_fp8(cfg, cfg.inter_dim) if dense else _sparse_fp8(cfg)
        inner = _e4m3(2 * cfg.moe_inter_dim)
    else:
        # norms keep input and output
        core = _attention_cut(cfg, number_bytes) if cut else _attention_plain(cfg, length, number_bytes, fused)
        attend = state if again else core + state
        attend += state + (0 if dense or again else _gate_plain(cfg, number_bytes))
        ffn = _ffn_plain(cfg.inter_dim, number_bytes) if dense else _sparse_plain(cfg, number_bytes, recompute)
        inner = 2 * cfg.moe_inter_dim * number_bytes
    if "experts" in recompute:
        ffn -= (0 if fp8 else ffn) if dense else cfg.n_activated_experts * inner
    return attend + ffn


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


def _attention_plain(cfg: ModelConfig, length: int, number_bytes: int, fused: bool) -> int:
    """Norms keep input and output; the core keeps heads and probabilities in float32, or, of long rows, its arguments
    and the softmax denominators (`attention_cpu`)."""
    norms = 2 * cfg.dim + 2 * cfg.q_lora_rank + 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    heads, out = cfg.n_heads * (2 * cfg.qk_head_dim + cfg.v_head_dim), cfg.n_heads * cfg.v_head_dim
    if fused:
        return (norms + heads + out) * number_bytes + NUMBER * cfg.n_heads
    if length > attention.LONGEST:
        given = cfg.n_heads * (cfg.qk_head_dim + cfg.qk_nope_head_dim + cfg.v_head_dim)
        return (norms + given + out) * number_bytes + NUMBER * cfg.n_heads
    probabilities = cfg.n_heads * attention_cpu.probabilities(length) / length
    return int((norms + out) * number_bytes + NUMBER * (heads + probabilities))


def _attention_cut(cfg: ModelConfig, number_bytes: int) -> int:
    """Norms keep input and output, but for the latent's; the core keeps queries, latents and output."""
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    norms, heads = 2 * cfg.dim + 2 * cfg.q_lora_rank, cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    return (norms + 2 * latent + heads) * number_bytes + NUMBER * cfg.n_heads


def _ffn_plain(inner: int, number_bytes: int) -> int:
    """Gate and up side by side, silu(gate), and its product with up."""
    return 4 * inner * number_bytes


def _gate_plain(cfg: ModelConfig, number_bytes: int) -> int:
    """Scores, shares and choices, and in BF16 its input in float32."""
    kept = 2 * NUMBER * cfg.n_routed_experts + (INDEX + NUMBER) * cfg.n_activated_experts
    return kept + (NUMBER * cfg.dim if number_bytes < NUMBER else 0)


def _sparse_plain(cfg: ModelConfig, number_bytes: int, recompute: Collection[Phase]) -> int:
    row = (cfg.dim + 2 * cfg.moe_inter_dim) * number_bytes + ROUTED
    shared = 0 if "finish" in recompute else _ffn_plain(cfg.n_shared_experts * cfg.moe_inter_dim, number_bytes)
    return cfg.n_activated_experts * row + shared
