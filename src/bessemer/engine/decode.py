"""Prefill and decoding steps over the paged latent cache (MLA; V2 2.1.2, V3 2.1.1).

Prefill has many queries per sequence and uses MLA's expanded form; a step has one or a few and uses the absorbed form:
multi-query attention whose only key is the cached latent with its rotary part, and whose value is the latent itself.
W_UK and W_UV act on the query and on the output as views of the stored matrix: nothing is precomputed, so nothing goes
stale when the weights are updated between two calls.

Padding is on the right: causality hides it from prefill's attention, it is not routed to any expert, and a step sees
only the slots up to its own position.

Shapes: B rows, T tokens of each, N real tokens, S slots, D hidden, H heads, X = C + R, E experts, K experts per token,
L sparse layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.kv_cache import LatentCache, PromptPages, RowGroup, indices
from bessemer.engine.steps import ForwardOutput, PrefillChunk, RoutingTrace, StepBackend, register
from bessemer.model.config import ModelConfig
from bessemer.model.layer import Attended, Layer
from bessemer.model.mla import MLA, rotate
from bessemer.model.ops import operation
from bessemer.model.transformer import Transformer

PREFILL_TOKENS = 16384
"""Approximate number of tokens in one prefill forward pass, padding included; bounds its memory."""


class TorchSteps(StepBackend):
    """Prefill and steps in plain torch, on any device."""

    def __init__(self, model: Transformer):
        self.model: Transformer = model

    def new_cache(self, drafts: int = 0, make: Callable[..., LatentCache] = LatentCache) -> Any:
        model = self.model
        weight, layers = model.embed.weight, model.cfg.n_layers + min(drafts, len(model.mtp))
        return make(model.cfg, weight.dtype, weight.device, layers)

    def token_bytes(self, drafts: int = 0) -> int:
        return sum(pool.shape[-1] * pool.element_size() for pool in self.new_cache(drafts=drafts).layers)

    def prefill(self, cache: LatentCache, chunks: Sequence[PrefillChunk], trace: RoutingTrace | None = None) -> Tensor:
        """Whole prompts run together, padded to the longest; a chunk that continues a prompt runs alone."""
        complete = [chunk for chunk in chunks if chunk.whole]
        logits = [row for batch in _batches(complete) for row in _prefill_whole(self.model, cache, batch, trace)]
        next_logits = iter(logits)
        logits = [next(next_logits) if c.whole else _prefill_chunk(self.model, cache, c, trace) for c in chunks]
        for chunk in chunks:
            chunk.prompt.length = chunk.end
        return torch.stack(logits)

    def forward(
        self, token_BT: Tensor, position_B: Tensor, cache: LatentCache, trace: RoutingTrace | None = None
    ) -> ForwardOutput:
        state_BTD = self.model.norm(hidden_step(self.model, token_BT, position_B, cache, trace))
        return ForwardOutput(state_BTD, self.model.head(state_BTD).float())

    def draft(
        self, k: int, hidden_BTD: Tensor, token_BT: Tensor, position_B: Tensor, last_B: Tensor, cache: LatentCache
    ) -> tuple[Tensor, Tensor]:
        T, model, module = token_BT.shape[1], self.model, self.model.mtp[k]
        position_BT = position_B[:, None] + torch.arange(T, device=position_B.device)
        # nothing reads positions before the beginning; their keys go where those of later tokens will be written
        position_BT = torch.where(position_BT < 0, position_B[:, None] + T - 1 - position_BT, position_BT)
        cache.reserve([last + 1 for last in position_BT.max(1).values.tolist()])
        rope = model.rope_table(int(position_BT.max()) + 1)[position_BT]
        x_BTD = module.join(hidden_BTD, F.embedding(token_BT, model.embed.weight))
        groups, slot_N = cache.row_groups(position_B, T), cache.slots_BT(position_BT).flatten()
        out_BTD = layer_step(module.layer, model.cfg.n_layers + k, x_BTD, rope, cache, groups, slot_N)
        last_BD = out_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        return out_BTD, model.head(module.norm(last_BD)).float()


register(lambda model: TorchSteps(cast(Transformer, model)) if model.layers else None)


def _batches(chunks: Sequence[PrefillChunk]) -> Iterator[list[PrefillChunk]]:
    """Whole prompts in batches of bounded size. Sorted prompts need less padding."""
    batch: list[PrefillChunk] = []
    longest = 0
    for chunk in chunks:
        longest = max(longest, chunk.end)
        if batch and longest * (len(batch) + 1) > PREFILL_TOKENS:
            yield batch
            batch, longest = [], chunk.end
        batch.append(chunk)
    if batch:
        yield batch


def _prefill_whole(
    model: Transformer, cache: LatentCache, chunks: Sequence[PrefillChunk], trace: RoutingTrace | None
) -> Tensor:
    device = model.embed.weight.device
    lengths = [chunk.end for chunk in chunks]
    T = max(lengths)
    tokens_BT = indices([[*chunk.prompt.ids, *[0] * (T - chunk.end)] for chunk in chunks], device)
    real_N = indices([b * T + t for b, length in enumerate(lengths) for t in range(length)], device)
    length_B = indices(lengths, device)
    rope = model.rope_table(T)
    last_B = length_B - 1
    row_B = torch.arange(len(chunks), device=device)
    slot_N = indices([slot for chunk in chunks for slot in cache.slots(chunk.prompt, 0, chunk.end)], device)
    x_BTD = model.embed(tokens_BT)
    for i, layer in enumerate(model.layers):
        u_BTD = layer.attn_norm(x_BTD)
        c, k_rope = layer.attn.compress(u_BTD)
        cache.write(i, slot_N, layer.attn.cached(c, k_rope, rope).flatten(0, 1)[real_N])
        h_BTD = x_BTD + layer.attn.expanded(u_BTD, c, k_rope, rope)
        if i + 1 < len(model.layers) or cache.drafts:
            x_BTD = _feed_forward_real(layer, h_BTD, real_N, trace)
        else:  # only the last positions are used from here on, except by a trace
            attended = layer.route(h_BTD[row_B, last_B].unsqueeze(1))
            x_BTD = layer.feed_forward(attended)
            if trace is not None and attended.routing is not None:
                everywhere = layer.route(h_BTD.flatten(0, 1)[real_N].unsqueeze(0)).routing
                assert everywhere is not None
                trace.add_layer(everywhere.expert_NK.index_copy(0, length_B.cumsum(0) - 1, attended.routing.expert_NK))
    if cache.drafts:
        state_BTD = model.norm(x_BTD)
        for chunk, state_TD, n in zip(chunks, state_BTD, lengths, strict=True):
            write_mtp_latents(model, cache, chunk.prompt, 0, state_TD[:n])
        x_BTD = x_BTD[row_B, last_B].unsqueeze(1)
    if trace is not None:
        for chunk, expert_TLK in zip(chunks, trace.take().split(lengths), strict=True):
            chunk.prompt.routing.append(expert_TLK)
    return logits_of(model, x_BTD.squeeze(1))


def _prefill_chunk(model: Transformer, cache: LatentCache, chunk: PrefillChunk, trace: RoutingTrace | None) -> Tensor:
    """Logits [V]: the chunk's tokens attend to the prompt's cached tokens, then to each other."""
    prompt, start, end = chunk.prompt, chunk.prompt.length, chunk.end
    device = model.embed.weight.device
    rope_S = model.rope_table(end)
    slot_T = indices(cache.slots(prompt, start, end), device)
    x_BTD = model.embed(indices([prompt.ids[start:end]], device))
    for i, layer in enumerate(model.layers):
        u_BTD = layer.attn_norm(x_BTD)
        cache.write(i, slot_T, layer.attn.latent(u_BTD, rope_S[start:]).squeeze(0))
        latent_BSX = cache.read_prompt(i, prompt, end).unsqueeze(0)
        h_BTD = x_BTD + expanded_after(layer.attn, u_BTD, latent_BSX, rope_S[start:])
        if i + 1 == len(model.layers) and trace is None and not cache.drafts:
            h_BTD = h_BTD[:, -1:]
        x_BTD = layer.feed_forward(_route(layer, h_BTD, trace))
    if cache.drafts:
        write_mtp_latents(model, cache, prompt, start, model.norm(x_BTD[0]))
    if trace is not None:
        prompt.routing.append(trace.take())
    return logits_of(model, x_BTD[0, -1:]).squeeze(0)


def write_mtp_latents(
    model: Transformer, cache: LatentCache, prompt: PromptPages, start: int, state_ND: Tensor
) -> None:
    """Writes the MTP modules' keys for a prompt. At position i, module k reads state h^(k-1) and the token at i + k.

    `state_ND` are the main model's states from position `start` on. The last state of every module waits for the next
    token."""
    device = state_ND.device
    for k, module in enumerate(model.mtp[: cache.drafts], start=1):
        if len(prompt.states) >= k:
            start, state_ND = start - 1, torch.cat((prompt.states[k - 1][None], state_ND))
        prompt.states[k - 1 : k] = [state_ND[-1]]
        if (end := start + len(state_ND) - 1) <= start:
            return
        ahead_N = indices(prompt.ids[start + k : end + k], device)
        x_1ND = module.join(state_ND[:-1], F.embedding(ahead_N, model.embed.weight)).unsqueeze(0)
        layer, index, rope = module.layer, model.cfg.n_layers + k - 1, model.rope_table(end)[start:]
        u_1ND = layer.attn_norm(x_1ND)
        slot_N = indices(cache.slots(prompt, start, end), device)
        cache.write(index, slot_N, layer.attn.latent(u_1ND, rope)[0])
        if k < cache.drafts:  # the next module reads this one's output for the prompt
            latent_1SX = cache.read_prompt(index, prompt, end).unsqueeze(0)
            h_1ND = x_1ND + expanded_after(layer.attn, u_1ND, latent_1SX, rope)
            state_ND = layer.feed_forward(layer.route(h_1ND))[0]


def hidden_step(
    model: Transformer, token_BT: Tensor, position_B: Tensor, cache: LatentCache, trace: RoutingTrace | None = None
) -> Tensor:
    """Residual stream after the last layer, [B, T, D], of T tokens per row, the first at position_B; all enter the
    cache."""
    T = token_BT.shape[1]
    position_BT = position_B[:, None] + torch.arange(T, device=position_B.device)
    cache.reserve([position + T for position in position_B.tolist()])
    rope = model.rope_table(int(position_BT.max()) + 1)[position_BT]
    groups, slot_N = cache.row_groups(position_B, T), cache.slots_BT(position_BT).flatten()
    x_BTD = model.embed(token_BT)
    for i, layer in enumerate(model.layers):
        x_BTD = layer_step(layer, i, x_BTD, rope, cache, groups, slot_N, trace)
    return x_BTD


def layer_step(
    layer: Layer,
    index: int,
    x_BTD: Tensor,
    rope: Tensor,
    cache: LatentCache,
    groups: Sequence[RowGroup],
    slot_N: Tensor,
    trace: RoutingTrace | None = None,
) -> Tensor:
    """One layer over new tokens of the live rows; `index` is its layer in the cache."""
    u_BTD = layer.attn_norm(x_BTD)
    cache.write(index, slot_N, layer.attn.latent(u_BTD, rope).flatten(0, 1))
    context_BQX = attend(absorbed_queries(layer.attn, u_BTD, rope), cache, index, groups, layer.attn.cfg)
    h_BTD = x_BTD + absorbed_output(layer.attn, context_BQX, u_BTD.shape[1])
    return layer.feed_forward(_route(layer, h_BTD, trace))


def absorbed_queries(attn: MLA, u_BTD: Tensor, rope: Tensor) -> Tensor:
    """Queries against the cached latents, [B, T * H, X]; query t * H + h is head h of token t."""
    q_nope, q_rope = attn.queries(u_BTD, rope)
    qhat_HNC = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), _up_projections(attn)[0])  # W_UK^T q^C
    q_NHX = torch.cat((qhat_HNC.transpose(0, 1), q_rope.flatten(0, 1)), -1)
    return q_NHX.view(u_BTD.shape[0], -1, q_NHX.shape[-1])


def attend(q_BQX: Tensor, cache: LatentCache, index: int, groups: Sequence[RowGroup], cfg: ModelConfig) -> Tensor:
    """The attention output of every query, [B, T * H, X].

    Keys and values are the same tensor, read once; the rotary columns of the value are computed and discarded, which is
    cheaper than separate products.
    """
    outputs = [_attend(q_BQX, cache.read(index, group), group, cfg.n_heads, cfg.softmax_scale) for group in groups]
    if len(outputs) == 1:  # one group contains all rows in order
        return outputs[0]
    context_BQX = torch.empty_like(q_BQX)
    for group, output in zip(groups, outputs, strict=True):
        context_BQX[group.rows] = output
    return context_BQX


def absorbed_output(attn: MLA, context_BQX: Tensor, T: int) -> Tensor:
    """The attention layer's output [B, T, D], from the output of `attend`."""
    B, cfg = context_BQX.shape[0], attn.cfg
    context_HNC = context_BQX.view(B * T, cfg.n_heads, -1)[..., : cfg.kv_lora_rank].transpose(0, 1)
    out_HNV = torch.bmm(context_HNC, _up_projections(attn)[1].transpose(1, 2))  # W_UV ctx
    return attn.wo(out_HNV.transpose(0, 1).flatten(1)).view(B, T, -1)


def _up_projections(attn: MLA) -> tuple[Tensor, Tensor]:
    """W_UK [H, N, C] and W_UV [H, V, C], views of the stored matrix."""
    cfg = attn.cfg
    return attn.wkv_b.weight.unflatten(0, (cfg.n_heads, -1)).split([cfg.qk_nope_head_dim, cfg.v_head_dim], 1)


def _attend(q_BQX: Tensor, latent_BSX: Tensor, group: RowGroup, n_heads: int, scale: float) -> Tensor:
    """[b, T * H, X] for the rows of a group; query t * H + h is head h of token t."""
    bias = group.bias
    if bias is not None:
        bias = bias.repeat_interleave(n_heads, 1).unsqueeze(1) if bias.shape[1] > 1 else bias.unsqueeze(1)
    q, kv = q_BQX[group.rows].unsqueeze(1), latent_BSX.unsqueeze(1)
    return F.scaled_dot_product_attention(q, kv, kv, attn_mask=bias, scale=scale).squeeze(1)


def expanded_after(attn: MLA, u_BTD: Tensor, latent_BSX: Tensor, rope: Tensor) -> Tensor:
    """Attention in the expanded form for the last T of S cached tokens, [B, T, D]; `rope` is for these T."""
    cfg = attn.cfg
    c_BSC, k_rope_BSR = latent_BSX.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
    kv = attn.wkv_b(c_BSC).unflatten(-1, (cfg.n_heads, -1))
    return attn.wo(attend_after(attn.project(u_BTD), kv, k_rope_BSR, rope, cfg.softmax_scale).flatten(-2))


@operation
def attend_after(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float) -> Tensor:
    """`mla.latent_attention` of the last T of S tokens, [B, T, H, V]. q [B, T, H, N + R] is not yet rotated; kv
    [B, S, H, N + V] and k_rope [B, S, R] are of the cache, which holds rotated keys; rope is for the T tokens."""
    T, S, H, nope = q.shape[1], kv.shape[1], q.shape[2], q.shape[-1] - k_rope.shape[-1]
    q = torch.cat((q[..., :nope], rotate(q[..., nope:], rope.unsqueeze(-3))), -1)
    k = torch.cat((kv[..., :nope], k_rope.unsqueeze(2).expand(-1, -1, H, -1)), -1)
    visible_TS = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, kv[..., nope:]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible_TS, scale=scale).transpose(1, 2)


def logits_of(model: Transformer, x_ND: Tensor) -> Tensor:
    """Final norm and head, float32 [N, V]."""
    return model.head(model.norm(x_ND)).float()


def _route(layer: Layer, h_BTD: Tensor, trace: RoutingTrace | None) -> Attended:
    attended = layer.route(h_BTD)
    if trace is not None and attended.routing is not None:
        trace.add_layer(attended.routing.expert_NK)
    return attended


def _feed_forward_real(layer: Layer, h_BTD: Tensor, real_N: Tensor, trace: RoutingTrace | None) -> Tensor:
    """`Layer.feed_forward` for the real tokens; padding passes through unchanged."""
    h_XD = h_BTD.flatten(0, 1)
    if real_N.numel() == h_XD.shape[0]:
        return layer.feed_forward(_route(layer, h_BTD, trace))
    out_ND = layer.feed_forward(_route(layer, h_XD[real_N].unsqueeze(0), trace)).squeeze(0)
    return h_XD.index_copy(0, real_N, out_ND).view_as(h_BTD)
