"""Taking in prompts and decoding over the paged latent cache (V2 2.1.2, V3 2.1.1, reference A.6).

Prefill has many queries per row and uses MLA's expanded form; a step has one or a few and uses the absorbed form:
multi-query attention whose only key is the cached latent with its rotary part, and whose value is the latent itself.
W_UK and W_UV act on the query and on the output as views of the stored matrix: BLAS reads them as they lie, so nothing
is prepared and an update of the weights between two calls cannot go stale.

`reference.next_logits` is the plain form of all of it. Padding stands to the right: causality hides it from prefill's
attention, it is not routed to any expert, and a step sees a row's slots up to its own position only.

A `Trace` that is handed in is told which experts each real token chose, layer by layer.
The functions are chosen by the type of the model: `foreign` registers those of other networks.

Shapes: B rows, T tokens of each, N real tokens, S slots, D hidden, H heads, X = C + R, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.decode_experts import feed_forward
from bessemer.engine.kv_cache import Block, Held, LatentCache
from bessemer.engine.routing_trace import Trace
from bessemer.model.config import ModelConfig
from bessemer.model.layer import Attended, Layer
from bessemer.model.mla import MLA
from bessemer.model.transformer import Transformer


class Part(NamedTuple):
    """Tokens [held.length, end) of a prompt, to be taken in."""

    held: Held
    end: int

    @property
    def whole(self) -> bool:
        return self.held.length == 0 and self.end == len(self.held.ids)


@singledispatch
def new_cache(
    model: Transformer, limit: int | None = None, remember: bool = False, drafts: bool = False
) -> LatentCache:
    """An empty cache for the model; arguments as in `LatentCache`. `drafts`: with a layer for the MTP module."""
    weight = model.embed.weight
    return LatentCache(model.cfg, weight.dtype, weight.device, limit, remember, model.cfg.n_layers + drafts)


@singledispatch
def prefill(model: Transformer, cache: LatentCache, parts: Sequence[Part], trace: Trace | None = None) -> Tensor:
    """Takes in the parts, whose pages are there, and gives the logits after the last token of each, [len(parts), V].

    Prompts taken in whole go side by side, padded to the longest; what continues a prompt goes alone.
    """
    together = [part for part in parts if part.whole]
    batch = _prompts(model, cache, together, trace) if together else None
    first = iter(() if batch is None else batch)
    logits = [next(first) if part.whole else _continue(model, cache, part, trace) for part in parts]
    for part in parts:
        part.held.length = part.end
    return torch.stack(logits)


def _prompts(model: Transformer, cache: LatentCache, parts: Sequence[Part], trace: Trace | None) -> Tensor:
    device = model.embed.weight.device
    lengths = [part.end for part in parts]
    T = max(lengths)
    tokens_BT = torch.tensor([[*part.held.ids, *[0] * (T - part.end)] for part in parts], device=device)
    length_B = torch.tensor(lengths, device=device)
    rope = model.rope_table(T)
    last_B = length_B - 1
    row_B = torch.arange(len(parts), device=device)
    real_N = (torch.arange(T, device=device) <= last_B[:, None]).flatten().nonzero().squeeze(-1)
    slot_N = torch.tensor([slot for part in parts for slot in cache.slots(part.held, 0, part.end)], device=device)
    x_BTD = model.embed(tokens_BT)
    for i, layer in enumerate(model.layers):
        u_BTD = layer.attn_norm(x_BTD)
        c, k_rope = layer.attn.compress(u_BTD)
        cache.write(i, slot_N, layer.attn.cached(c, k_rope, rope).flatten(0, 1)[real_N])
        h_BTD = x_BTD + layer.attn.expanded(u_BTD, c, k_rope, rope)
        if i + 1 < len(model.layers) or cache.drafts:
            x_BTD = _feed_forward(layer, h_BTD, real_N, trace)
        else:  # nobody reads the other positions any more, except a trace
            attended = layer.route(h_BTD[row_B, last_B].unsqueeze(1))
            x_BTD = feed_forward(layer, attended)
            if trace is not None and attended.routing is not None:
                chosen_NK = layer.route(h_BTD.flatten(0, 1)[real_N].unsqueeze(0)).routing.expert_NK
                trace.chose(chosen_NK.index_copy(0, length_B.cumsum(0) - 1, attended.routing.expert_NK))
    if cache.drafts:
        state_BTD = model.norm(x_BTD)
        for part, state_TD, n in zip(parts, state_BTD, lengths, strict=True):
            _take_in_states(model, cache, part.held, 0, state_TD[:n])
        x_BTD = x_BTD[row_B, last_B].unsqueeze(1)
    if trace is not None:
        for part, chosen in zip(parts, trace.take().split(lengths), strict=True):
            part.held.routing.append(chosen)
    return logits_of(model, x_BTD.squeeze(1))


def _continue(model: Transformer, cache: LatentCache, part: Part, trace: Trace | None) -> Tensor:
    """Logits [V]: the part's tokens look at what the prompt has in the cache, then at each other."""
    held, start, end = part.held, part.held.length, part.end
    device = model.embed.weight.device
    rope_S = model.rope_table(end)
    slot_T = torch.tensor(cache.slots(held, start, end), device=device)
    x_BTD = model.embed(torch.tensor([held.ids[start:end]], device=device))
    for i, layer in enumerate(model.layers):
        u_BTD = layer.attn_norm(x_BTD)
        cache.write(i, slot_T, layer.attn.latent(u_BTD, rope_S[start:]).squeeze(0))
        out_BTD = expanded_after(layer.attn, u_BTD, cache.read_prompt(i, held, end).unsqueeze(0), rope_S[start:])
        h_BTD = x_BTD + out_BTD
        if i + 1 == len(model.layers) and trace is None and not cache.drafts:
            h_BTD = h_BTD[:, -1:]
        x_BTD = feed_forward(layer, _route(layer, h_BTD, trace))
    if cache.drafts:
        _take_in_states(model, cache, held, start, model.norm(x_BTD[0]))
    if trace is not None:
        held.routing.append(trace.take())
    return logits_of(model, x_BTD[0, -1:]).squeeze(0)


def _take_in_states(model: Transformer, cache: LatentCache, held: Held, start: int, state_ND: Tensor) -> None:
    """The MTP module's keys for a prompt: at each position the main model's state there and the token after it.

    `state_ND` are the states from position `start` on; the last one waits for the token that will be drawn."""
    if held.state is not None:
        start, state_ND = start - 1, torch.cat((held.state[None], state_ND))
    held.state = state_ND[-1]
    if (end := start + len(state_ND) - 1) <= start:
        return
    module, device = model.mtp[0], state_ND.device
    next_N = torch.tensor(held.ids[start + 1 : end + 1], device=device)
    x_1ND = module.join(state_ND[:-1], F.embedding(next_N, model.embed.weight)).unsqueeze(0)
    latent_1NX = module.layer.attn.latent(module.layer.attn_norm(x_1ND), model.rope_table(end)[start:])
    cache.write(model.cfg.n_layers, torch.tensor(cache.slots(held, start, end), device=device), latent_1NX[0])


@singledispatch
def step(
    model: Transformer, token_B: Tensor, position_B: Tensor, cache: LatentCache, trace: Trace | None = None
) -> Tensor:
    """Logits [B, V] of the token after `token_B`, which stands at `position_B` and enters the cache."""
    return logits_of(model, hidden_step(model, token_B.unsqueeze(1), position_B, cache, trace).squeeze(1))


def hidden_step(
    model: Transformer, token_BT: Tensor, position_B: Tensor, cache: LatentCache, trace: Trace | None = None
) -> Tensor:
    """Residual stream after the last layer, [B, T, D], of T tokens per row, the first at position_B; all enter the
    cache."""
    T = token_BT.shape[1]
    position_BT = position_B[:, None] + torch.arange(T, device=position_B.device)
    cache.reserve([position + T for position in position_B.tolist()])
    rope = model.rope_table(int(position_BT.max()) + 1)[position_BT]
    blocks, slot_N = cache.blocks(position_B, T), cache.slots_BT(position_BT).flatten()
    x_BTD = model.embed(token_BT)
    for i, layer in enumerate(model.layers):
        x_BTD = layer_step(layer, i, x_BTD, rope, cache, blocks, slot_N, trace)
    return x_BTD


def layer_step(
    layer: Layer,
    place: int,
    x_BTD: Tensor,
    rope: Tensor,
    cache: LatentCache,
    blocks: Sequence[Block],
    slot_N: Tensor,
    trace: Trace | None = None,
) -> Tensor:
    """One layer over new tokens of the live rows; `place` is the layer's in the cache."""
    u_BTD = layer.attn_norm(x_BTD)
    cache.write(place, slot_N, layer.attn.latent(u_BTD, rope).flatten(0, 1))
    h_BTD = x_BTD + absorbed_step(layer.attn, u_BTD, rope, cache, place, blocks)
    return feed_forward(layer, _route(layer, h_BTD, trace))


def absorbed_step(
    attn: MLA, u_BTD: Tensor, rope: Tensor, cache: LatentCache, place: int, blocks: Sequence[Block]
) -> Tensor:
    """`MLA.absorbed` over the paged cache through the fused attention kernel, [B, T, D]."""
    context_BQX = attend(absorbed_queries(attn, u_BTD, rope), cache, place, blocks, attn.cfg)
    return absorbed_output(attn, context_BQX, u_BTD.shape[1])


def absorbed_queries(attn: MLA, u_BTD: Tensor, rope: Tensor) -> Tensor:
    """Queries that meet the cached latent as it is, [B, T * H, X]; query t * H + h is head h of token t."""
    q_nope, q_rope = attn.queries(u_BTD, rope)
    qhat_HNC = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), _up_projections(attn)[0])  # W_UK^T q^C
    q_NHX = torch.cat((qhat_HNC.transpose(0, 1), q_rope.flatten(0, 1)), -1)
    return q_NHX.view(u_BTD.shape[0], -1, q_NHX.shape[-1])


def attend(q_BQX: Tensor, cache: LatentCache, place: int, blocks: Sequence[Block], cfg: ModelConfig) -> Tensor:
    """What every query sees, [B, T * H, X].

    Keys and values are the same tensor, read once; the rotary columns of the value are computed and thrown away, which
    costs less than the two products one after the other.
    """
    parts = [_attend(q_BQX, cache.read(place, block), block, cfg.n_heads, cfg.softmax_scale) for block in blocks]
    if len(parts) == 1:  # then it is of all rows in their order
        return parts[0]
    context_BQX = torch.empty_like(q_BQX)
    for block, part in zip(blocks, parts, strict=True):
        context_BQX[block.rows] = part
    return context_BQX


def absorbed_output(attn: MLA, context_BQX: Tensor, T: int) -> Tensor:
    """The attention's output [B, T, D] from what the queries saw."""
    B, cfg = context_BQX.shape[0], attn.cfg
    context_HNC = context_BQX.view(B * T, cfg.n_heads, -1)[..., : cfg.kv_lora_rank].transpose(0, 1)
    out_HNV = torch.bmm(context_HNC, _up_projections(attn)[1].transpose(1, 2))  # W_UV ctx
    return attn.wo(out_HNV.transpose(0, 1).flatten(1)).view(B, T, -1)


def _up_projections(attn: MLA) -> tuple[Tensor, Tensor]:
    """W_UK [H, N, C] and W_UV [H, V, C], views of the stored matrix."""
    cfg = attn.cfg
    return attn.wkv_b.weight.unflatten(0, (cfg.n_heads, -1)).split([cfg.qk_nope_head_dim, cfg.v_head_dim], 1)


def _attend(q_BQX: Tensor, latent_BSX: Tensor, block: Block, n_heads: int, scale: float) -> Tensor:
    """[b, T * H, X] for the rows of a block; query t * H + h is head h of token t."""
    bias = block.bias
    if bias is not None:
        bias = bias.repeat_interleave(n_heads, 1).unsqueeze(1) if bias.shape[1] > 1 else bias.unsqueeze(1)
    kv = latent_BSX.unsqueeze(1)
    return F.scaled_dot_product_attention(q_BQX[block.rows].unsqueeze(1), kv, kv, attn_mask=bias, scale=scale).squeeze(
        1
    )


def expanded_after(attn: MLA, u_BTD: Tensor, latent_BSX: Tensor, rope: Tensor) -> Tensor:
    """The expanded form for the last T of S cached tokens, [B, T, D]; rope of these T."""
    cfg = attn.cfg
    T, S = u_BTD.shape[1], latent_BSX.shape[1]
    c_BSC, k_rope_BSR = latent_BSX.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
    k_nope, v = attn.wkv_b(c_BSC).unflatten(-1, (cfg.n_heads, -1)).split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1)
    k = torch.cat((k_nope, k_rope_BSR.unsqueeze(2).expand(-1, -1, cfg.n_heads, -1)), -1)
    q = torch.cat(attn.queries(u_BTD, rope), -1)
    seen_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen_TS, scale=cfg.softmax_scale
    )
    return attn.wo(out.transpose(1, 2).flatten(-2))


def logits_of(model: Transformer, x_ND: Tensor) -> Tensor:
    """Final norm and head, float32 [N, V]."""
    return model.head(model.norm(x_ND)).float()


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
