"""Prefill and one decoding step over the latent cache (V2 2.1.2, V3 2.1.1, reference A.6).

Prefill has many queries per row and uses MLA's expanded form; a step has one and uses the absorbed form: multi-query
attention whose only key is the cached latent with its rotary part, and whose value is the latent itself. W_UK and W_UV
act on the query and on the output as views of the stored matrix: BLAS reads them as they lie, so nothing is prepared
and an update of the weights between two calls cannot go stale.

`reference.next_logits` is the plain form of both. Padding stands to the right: causality hides it from prefill's
attention, it is not routed to any expert, and a step sees a row's slots up to its own position only.

A `Trace` that is handed in is told which experts each real token chose, layer by layer.
`prefill` and `step` are chosen by the type of the model: `foreign` registers those of other networks.

Shapes: B rows, T prompt tokens (padded), N real prompt tokens, S slots, D hidden, H heads, X = C + R, V vocabulary.
"""

from __future__ import annotations

from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.infer.cache import LatentCache
from bessemer.infer.experts import feed_forward
from bessemer.infer.trace import Trace
from bessemer.model.layer import Attended, Layer
from bessemer.model.mla import MLA
from bessemer.model.transformer import Transformer


@singledispatch
def prefill(
    model: Transformer, tokens_BT: Tensor, length_B: Tensor, trace: Trace | None = None
) -> tuple[Tensor, LatentCache]:
    """(logits after each prompt [B, V], cache). Prompts stand left; length_B >= 1 tokens of each count."""
    B, T = tokens_BT.shape
    rope = model.rope_table(T)
    last_B = length_B - 1
    row_B = torch.arange(B, device=last_B.device)
    real_N = (torch.arange(T, device=last_B.device) <= last_B[:, None]).flatten().nonzero().squeeze(-1)
    x_BTD = model.embed(tokens_BT)
    cache = LatentCache(model.cfg, B, T, x_BTD.dtype, x_BTD.device)
    for i, layer in enumerate(model.layers):
        u_BTD = layer.attn_norm(x_BTD)
        c, k_rope = layer.attn.compress(u_BTD)
        cache.fill(i, layer.attn.cached(c, k_rope, rope))
        h_BTD = x_BTD + layer.attn.expanded(u_BTD, c, k_rope, rope)
        if i + 1 < len(model.layers):
            x_BTD = _feed_forward(layer, h_BTD, real_N, trace)
        else:  # nobody reads the other positions any more, except a trace
            attended = layer.route(h_BTD[row_B, last_B].unsqueeze(1))
            x_BTD = feed_forward(layer, attended)
            if trace is not None and attended.routing is not None:
                chosen_NK = layer.route(h_BTD.flatten(0, 1)[real_N].unsqueeze(0)).routing.expert_NK
                trace.chose(chosen_NK.index_copy(0, length_B.cumsum(0) - 1, attended.routing.expert_NK))
    return _logits(model, x_BTD), cache


@singledispatch
def step(
    model: Transformer, token_B: Tensor, position_B: Tensor, cache: LatentCache, trace: Trace | None = None
) -> Tensor:
    """Logits [B, V] of the token after `token_B`, which stands at `position_B` and enters the cache."""
    low, high = (int(x) for x in position_B.aminmax())
    S = high + 1
    cache.reserve(S)
    rope = model.rope_table(S)[position_B].unsqueeze(1)
    bias_BS = None
    if low < high:
        unseen = torch.arange(S, device=position_B.device) > position_B[:, None]
        bias_BS = torch.zeros(unseen.shape, dtype=cache.layers[0].dtype, device=unseen.device)
        bias_BS.masked_fill_(unseen, float("-inf"))
    x_BTD = model.embed(token_B).unsqueeze(1)
    for i, layer in enumerate(model.layers):
        u_BTD = layer.attn_norm(x_BTD)
        cache.write(i, position_B, layer.attn.latent(u_BTD, rope).squeeze(1))
        h_BTD = x_BTD + absorbed_step(layer.attn, u_BTD, cache.read(i, S), bias_BS, rope)
        x_BTD = feed_forward(layer, _route(layer, h_BTD, trace))
    return _logits(model, x_BTD)


def absorbed_step(attn: MLA, u_BTD: Tensor, cache_BSX: Tensor, bias_BS: Tensor | None, rope: Tensor) -> Tensor:
    """`MLA.absorbed` for T = 1 through the fused attention kernel, [B, 1, D].

    Keys and values are the same tensor, read once; the rotary columns of the value are computed and thrown away, which
    costs less than the two products one after the other.
    """
    cfg = attn.cfg
    w_uk_HNC, w_uv_HVC = attn.wkv_b.weight.unflatten(0, (cfg.n_heads, -1)).split(
        [cfg.qk_nope_head_dim, cfg.v_head_dim], 1
    )
    q_nope, q_rope = attn.queries(u_BTD, rope)
    qhat_HBC = torch.bmm(q_nope.squeeze(1).transpose(0, 1), w_uk_HNC)  # W_UK^T q^C
    q_BHX = torch.cat((qhat_HBC.transpose(0, 1), q_rope.squeeze(1)), -1)
    kv = cache_BSX.unsqueeze(1)
    bias = None if bias_BS is None else bias_BS[:, None, None]
    context_BHX = F.scaled_dot_product_attention(
        q_BHX.unsqueeze(1), kv, kv, attn_mask=bias, scale=cfg.softmax_scale
    ).squeeze(1)
    context_HBC = context_BHX[..., : cfg.kv_lora_rank].transpose(0, 1)
    out_HBV = torch.bmm(context_HBC, w_uv_HVC.transpose(1, 2))  # W_UV ctx
    return attn.wo(out_HBV.transpose(0, 1).flatten(1)).unsqueeze(1)


def _feed_forward(layer: Layer, h_BTD: Tensor, real_N: Tensor, trace: Trace | None) -> Tensor:
    """The second half of a layer for the real tokens; padding passes through untouched."""
    h_XD = h_BTD.flatten(0, 1)
    if real_N.numel() == h_XD.shape[0]:
        return feed_forward(layer, _route(layer, h_BTD, trace))
    out_ND = feed_forward(layer, _route(layer, h_XD[real_N].unsqueeze(0), trace)).squeeze(0)
    return h_XD.index_copy(0, real_N, out_ND).view_as(h_BTD)


def _route(layer: Layer, h_BTD: Tensor, trace: Trace | None) -> Attended:
    attended = layer.route(h_BTD)
    if trace is not None and attended.routing is not None:
        trace.chose(attended.routing.expert_NK)
    return attended


def _logits(model: Transformer, x_BTD: Tensor) -> Tensor:
    """Head over one position per row, float32 [B, V]."""
    return model.head(model.norm(x_BTD.squeeze(1))).float()
