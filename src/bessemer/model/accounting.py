"""Parameters, FLOPs, cache bytes and activation bytes as functions of the config (V3 3.2.3, 3.3.3, 4.2; "Insights into
DeepSeek-V3", ISCA 2025, Tables 1 and 2).

A multiply-add counts as two FLOPs. The published totals include the correction biases of the gates, and so do these.

Activation bytes are what a forward pass in training saves for its backward. A micro-batch holds them from its forward
to its backward, and a pipeline holds several micro-batches. The temporary buffers of the layer being computed are extra
and needed once. `fp8` selects the network of `model/fp8`; otherwise it is the plain one on a CPU, or with `fused` a
GPU's, whose attention saves heads and softmax denominators; `padded` if values are as wide as keys there, as
FlashAttention needs them (`attention_gpu`). Every term is a tensor that backward reads; the tests compare the sum with
the allocator, and with what a GPU's path saves on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bessemer.model.config import ModelConfig
from bessemer.model.layer import Phase
from bessemer.precision.operand import TILE

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


def kept_bytes(tensor: ParamTensor, copies: int) -> int:
    """Bytes of the quantised copies of a weight that FP8 training keeps for a step (`precision.weights`), with one
    factor per tile of every row."""
    if tensor.fp8 is None:
        return 0
    number, rows, columns = tensor.fp8
    return sum(number * n * _e4m3(k) for n, k in [(rows, columns), (columns, rows)][:copies])


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
    both = embedding_params(cfg) * (1 if cfg.tie_embeddings else 2)
    return _all_layers(cfg, active_only=True) + cfg.dim + (both if tables else 0)


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


# --- activations -----------------------------------------------------------------------------------------------------

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
    (`attention_cpu`), or if `fused`, on a GPU, the heads of queries, keys and values. If `padded`, values and output
    are as wide as keys, and the output without its padding is saved, too."""
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
