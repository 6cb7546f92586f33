"""Bytes of activations and of kept weights as functions of the config (V3 3.2.3, 3.3.3).

Activation bytes are what a forward pass in training saves for its backward. A micro-batch holds them from its forward
to its backward, and a pipeline holds several micro-batches. The temporary buffers of the layer being computed are extra
and needed once. `fp8` selects the network of `fp8_layers`; otherwise it is the plain one on a CPU, or with `fused` a
GPU's, whose attention saves heads and softmax denominators; `padded` if values are as wide as keys there, as
FlashAttention needs them (`kernels.attention_gpu`). Every term is a tensor that backward reads; the tests compare the
sum with the allocator, and with what a GPU's path saves on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from bessemer.addons.accelerate.precision.operand import TILE
from bessemer.model.accounting import ParamTensor
from bessemer.model.config import ModelConfig
from bessemer.model.layer import Phase

INDEX, NUMBER = 8, 4  # int64, float32
ROUTED = 3 * INDEX + NUMBER
"""Bytes saved per sent row, besides the row: its token, its place among the gates and on the way back, its gate."""


def activation_bytes(
    cfg: ModelConfig, rows: int, length: int, *, fp8: bool, number_bytes: int = 2, mtp: bool = True,
    recompute: Collection[Phase] = (),
) -> int:  # fmt: skip
    """Activation bytes of a micro-batch of `rows` sequences, loss included. `number_bytes`: size of the compute dtype;
    `mtp`: with the MTP modules; `recompute`: recomputed phases (`Transformer.set_recompute`)."""
    layers = range(cfg.n_layers)
    return stage_activation_bytes(
        cfg, layers, rows, length, last=True, fp8=fp8, number_bytes=number_bytes, mtp=mtp, recompute=recompute,
        whole=True,
    )  # fmt: skip


def stage_activation_bytes(
    cfg: ModelConfig, layers: Iterable[int], rows: int, length: int, *, last: bool, fp8: bool, number_bytes: int = 2,
    mtp: bool = True, fused: bool = False, recompute: Collection[Phase] = (), cut: bool = False, whole: bool = False,
    padded: bool = False,
) -> int:  # fmt: skip
    """`activation_bytes` for the layers of one pipeline stage. The `last` stage has norm, MTP modules and loss; every
    other stage saves its output. `cut`: sequences are split over ranks (`dist.context_parallel`), and `length` is one
    rank's share. `whole`: all experts are on this device, so no rows are sent."""

    def layer(dense: bool) -> int:
        return layer_activation_bytes(
            cfg, dense, fp8=fp8, number_bytes=number_bytes, fused=fused, recompute=recompute, cut=cut,
            whole=whole, padded=padded,
        )  # fmt: skip

    state, modules = cfg.dim * number_bytes, cfg.n_mtp if mtp and last else 0
    token = sum(layer(i < cfg.n_dense_layers) for i in layers)
    token += 2 * state if last else state  # input of the last norm, and the loss's gradient of its output
    # an MTP module also saves the inputs of its two norms, and their concatenation as the input of M_k
    token += modules * (layer(False) + 6 * state) if modules else 0
    return rows * length * token + ((1 + modules) * cfg.vocab_size * state if last else 0)  # the head's gradient


def layer_activation_bytes(
    cfg: ModelConfig, dense: bool, *, fp8: bool, number_bytes: int = 2, fused: bool = False,
    recompute: Collection[Phase] = (), cut: bool = False, whole: bool = False, padded: bool = False,
) -> int:  # fmt: skip
    """Activation bytes of one token in one layer."""
    state, again = cfg.dim * number_bytes, "attend" in recompute
    if fp8:  # our FP8 layer has its own recomputation; `recompute` models other trainers
        # the FFN also saves the residual stream, from which norm and gate are recomputed
        attend = state if again else _attention_fp8(cfg, number_bytes) + state
        ffn = _ffn_fp8(cfg, cfg.inter_dim) if dense else _sparse_fp8(cfg)
        inner = _e4m3(2 * cfg.moe_inter_dim)
    else:
        # norms save input and output
        core = _attention_cut(cfg, number_bytes) if cut else _attention_plain(cfg, number_bytes, fused, padded)
        attend = state if again else core + state
        attend += state + (0 if dense or again else _gate(cfg, number_bytes, fused, cut))
        dense_ffn = _ffn_plain(cfg.inter_dim, number_bytes, fused)
        ffn = dense_ffn if dense else _sparse_plain(cfg, number_bytes, fused, recompute, whole)
        inner = 2 * cfg.moe_inter_dim * number_bytes + (INDEX if whole else 0)
    if "experts" in recompute:
        ffn -= (0 if fp8 else ffn) if dense else cfg.n_activated_experts * inner
    return attend + ffn


def _e4m3(columns: int) -> int:
    """Bytes of one row of an operand: a byte per element, a factor per tile."""
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
    shared = _ffn_fp8(cfg, cfg.shared_width) if cfg.n_shared_experts else 0
    return cfg.n_activated_experts * (_ffn_fp8(cfg, cfg.moe_inter_dim) + ROUTED) + shared


def _attention_plain(cfg: ModelConfig, number_bytes: int, fused: bool, padded: bool) -> int:
    """Norms save input and output. The core saves the softmax denominators, its output and its arguments
    (`kernels.attention`), or if `fused`, on a GPU, the heads of queries, keys and values. If `padded`, values and
    output are as wide as keys, and the output without its padding is saved, too."""
    norms = 2 * cfg.dim + 2 * cfg.q_lora_rank + 2 * cfg.normed_width + cfg.qk_rope_head_dim
    key = cfg.qk_head_dim if fused else cfg.qk_nope_head_dim
    core = cfg.n_heads * (cfg.qk_head_dim + key + 2 * cfg.v_head_dim)
    if fused and padded and cfg.qk_head_dim > cfg.v_head_dim:
        core += cfg.n_heads * (2 * (cfg.qk_head_dim - cfg.v_head_dim) + cfg.v_head_dim)
    return (norms + core) * number_bytes + NUMBER * cfg.n_heads


def _attention_cut(cfg: ModelConfig, number_bytes: int) -> int:
    """Norms save input and output, except the latent's; the core saves queries, latents and output."""
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    norms, heads = 2 * cfg.dim + 2 * cfg.q_lora_rank, cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    return (norms + 2 * latent + heads) * number_bytes + NUMBER * cfg.n_heads


def _ffn_plain(inner: int, number_bytes: int, fused: bool) -> int:
    """Gate and up in one tensor; `fused` (on a GPU) also the product of silu(gate) with up."""
    return (3 if fused else 2) * inner * number_bytes


def _gate(cfg: ModelConfig, number_bytes: int, fused: bool, cut: bool) -> int:
    """Scores and choices; `fused` (on a GPU) or `cut` also gates and, in BF16, the gate's input in float32; `cut` also
    shares."""
    scores, choices = NUMBER * cfg.n_routed_experts, INDEX * cfg.n_activated_experts
    if cut:
        scores *= 2
    elif not fused:
        return scores + choices
    return scores + choices + NUMBER * cfg.n_activated_experts + (NUMBER * cfg.dim if number_bytes < NUMBER else 0)


def _sparse_plain(
    cfg: ModelConfig, number_bytes: int, fused: bool, recompute: Collection[Phase], whole: bool
) -> int:  # fmt: skip
    row = 2 * cfg.moe_inter_dim * number_bytes + (INDEX if whole else cfg.dim * number_bytes + ROUTED)
    if whole and "attend" in recompute:
        row += INDEX + NUMBER  # choice and gate weight, which the gate then does not keep
    inner = cfg.shared_width
    shared = 0 if "finish" in recompute else _ffn_plain(inner, number_bytes, fused)
    return cfg.n_activated_experts * row + shared


def kept_bytes(tensor: ParamTensor, copies: int) -> int:
    """Bytes of the quantised copies of a weight that FP8 training keeps for a step (`precision.weights`), with one
    factor per tile of every row."""
    if tensor.fp8 is None:
        return 0
    number, rows, columns = tensor.fp8
    return sum(number * n * _e4m3(k) for n, k in [(rows, columns), (columns, rows)][:copies])
