"""Decoding steps through torch.compile: the same functions, fused, in one call (or one per layer) instead of hundreds.

For CPUs with the kernels switched off: `kernel_steps` is 1.2 to 4 times as fast at every size. A GPU decodes with
`static_steps`: a graph makes launches cheap, whereas each of these steps would wait for the device several times.

A small model's step is bound by the number of calls. When few rows decode, one compiled graph runs the whole network
and gathers their cache. When the rows' cache exceeds a core's L2 cache, attention stays outside the graph, one row
group at a time as in `decode`, and the code between two attention calls is one graph. Experts are computed token by
token from their matrices in place, which the compiler turns into loops over memory. For more tokens than MAX_BYTES
allows, the plain step is faster and is used instead.

Compiling each form takes half a minute at the first start; torch caches the result on disk. Sizes that change from step
to step (rows, pages) are symbolic in the graph, so nothing is recompiled later. A single row has its own graphs,
because the compiler specialises on a size of 1.

Results equal those of the plain step up to the last bits. Weights are read in place, so they may change between steps.

Shapes: B rows, T tokens of each, N = B * T, P pages of a row, S slots, X = C + R, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.decode import (
    ForwardOutput,
    Model,
    RoutingTrace,
    absorbed_output,
    absorbed_queries,
    attend,
    new_cache,
)
from bessemer.engine.kv_cache import PAGE, LatentCache
from bessemer.engine.sampling import greedy_tokens
from bessemer.errors import UserError
from bessemer.model.layer import Layer
from bessemer.model.transformer import Transformer, evaluating
from bessemer.precision.probe import cpp_compiler

MAX_DRAFTS = 8
"""Largest number of tokens drafted per step."""
MAX_BYTES = 64 << 20
"""Bytes of routed-expert weights that a step's tokens may read per layer, counted once per token."""


class CompiledSteps:
    """The compiled steps of one model."""

    def __init__(self, model: Model, vocab: int):
        """`vocab`: number of ids that may be sampled. UserError for a foreign model, or if there is no C++ compiler."""
        if not isinstance(model, Transformer):
            raise UserError("compiled steps are only for models of the DeepSeek family; leave --compile off")
        if cpp_compiler() is None:
            raise UserError("compiled steps need a C++ compiler (g++ or clang++); install one or leave --compile off")
        self.model, self.vocab = model, vocab
        # after 8 graphs of one function torch warns and stops compiling it, which is 20 times slower; a process may
        # hold several models, each with its own graphs
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        # C++ makes the calls between kernels instead of Python, which saves a fifth of a one-row step
        compile_ = partial(torch.compile, options={"cpp_wrapper": True})
        self._whole, self._draft = compile_(_whole), compile_(_draft)
        self._first, self._between, self._last = compile_(_first), compile_(_between), compile_(_last)
        self._marked: set[tuple[str, int, int]] = set()
        self._rope = model.rope_table(model.cfg.max_seq_len + MAX_DRAFTS)  # drafts may lie beyond the end
        sparse = [layer.sparse_ffn.experts for layer in model.layers if not layer.dense]
        one = max((experts.w13[0].nbytes + experts.w2[0].nbytes for experts in sparse), default=0)
        self.max_tokens = MAX_BYTES // max(1, one * model.cfg.n_activated_experts)
        """The most tokens per pass for which the compiled forms are faster."""

    def __call__(
        self, token_BT: Tensor, position_B: Tensor, cache: LatentCache, trace: RoutingTrace | None = None
    ) -> ForwardOutput:
        """Runs T tokens per row, the first at position_B, through the network; all enter the cache."""
        T = token_BT.shape[1]
        length = [position + T for position in position_B.tolist()]
        cache.reserve(length)
        page_BP = cache.pages_BP(max(length))
        if cache.one_group(page_BP.shape[1]):
            pools = cache.layers[: self.model.cfg.n_layers]
            self._mark("whole", token_BT.shape, (token_BT, position_B, page_BP), pools)
            output, chosen = self._whole(self.model, token_BT, position_B, page_BP, self._rope, pools, self.vocab)
        else:
            output, chosen = self._by_layer(token_BT, position_B, cache)
        if trace is not None:
            for expert_NK in chosen:
                trace.add_layer(expert_NK)
        return output

    def prepare(self, drafts: int = 0) -> None:
        """Compiles everything a scheduler with this many drafts needs, before the first request."""
        device, T = self.model.embed.weight.device, drafts + 1
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=device)  # noqa: E731
        with evaluating(self.model), torch.inference_mode():
            for B in (1, 3):
                cache = new_cache(self.model, drafts=drafts)
                prompt = cache.open([0])
                cache.extend(prompt, 1)
                cache.admit([(prompt, B)])
                self(zeros(B, T), zeros(B), cache)
                if B > 1:
                    self._by_layer(zeros(B, T), zeros(B), cache)
                for places in (T, 1)[:drafts] if len(self.model.mtp) == 1 else ():
                    hidden_BTD = self.model.embed(zeros(B, places))
                    self.draft(hidden_BTD, zeros(B, places), zeros(B), zeros(B), cache)

    def draft(
        self, hidden_BTD: Tensor, token_BT: Tensor, position_B: Tensor, known_B: Tensor, cache: LatentCache
    ) -> tuple[Tensor, Tensor]:
        """Runs the only MTP module over T tokens, the first at position_B. Returns its state at token known_B, [B, D],
        and its logits there, [B, V]."""
        length = [position + token_BT.shape[1] for position in position_B.tolist()]
        cache.reserve(length)
        page_BP, pool = cache.pages_BP(max(length)), cache.layers[self.model.cfg.n_layers]
        self._mark("draft", token_BT.shape, (token_BT, position_B, page_BP, hidden_BTD, known_B), [pool])
        return self._draft(self.model, token_BT, position_B, page_BP, self._rope, pool, hidden_BTD, known_B)

    def _by_layer(self, token_BT: Tensor, position_B: Tensor, cache: LatentCache) -> tuple[ForwardOutput, list[Tensor]]:
        model, T = self.model, token_BT.shape[1]
        position_BT = position_B[:, None] + torch.arange(T, device=position_B.device)
        rope, slot_N = self._rope[position_BT], cache.slots_BT(position_BT).flatten()
        groups = cache.row_groups(position_B, T)
        self._mark("first", token_BT.shape, (token_BT, rope))
        x_BTD, latent_NX, q_BQX = self._first(model, token_BT, rope)
        chosen: list[Tensor] = []
        layers = list(model.layers)
        for i, (layer, after) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
            cache.write(i, slot_N, latent_NX)
            context_BQX = attend(q_BQX, cache, i, groups, model.cfg)
            if after is None:
                self._mark("last", token_BT.shape, (x_BTD, context_BQX))
                output, expert_NK = self._last(model, x_BTD, context_BQX, self.vocab)
            else:
                self._mark(f"between {layer.dense, after.dense}", token_BT.shape, (x_BTD, context_BQX, rope))
                x_BTD, latent_NX, q_BQX, expert_NK = self._between(layer, after, x_BTD, context_BQX, rope)
            if expert_NK is not None:
                chosen.append(expert_NK)
        return output, chosen

    def _mark(self, name: str, size: Sequence[int], by_row: Sequence[Tensor], pools: Sequence[Tensor] = ()) -> None:
        """Before a new graph is compiled, marks the sizes that will change: the numbers of rows (unless it is 1), of
        pages per row, and of pages per pool."""
        rows, T = size
        if (graph := (name, min(rows, 2), T)) in self._marked:
            return
        self._marked.add(graph)
        for tensor in by_row if rows > 1 else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        for pool in pools:
            torch._dynamo.mark_dynamic(pool, 0)
        if pools:
            torch._dynamo.mark_dynamic(by_row[2], 1)


def _whole(
    model: Transformer,
    token_BT: Tensor,
    position_B: Tensor,
    page_BP: Tensor,
    rope: Tensor,
    pools: list[Tensor],
    vocab: int,
) -> tuple[ForwardOutput, list[Tensor]]:
    """The network from tokens to logits, with all rows in one group."""
    x_BTD, chosen = model.embed(token_BT), []
    slots = _slots(position_B, token_BT.shape[1], page_BP)
    for layer, pool in zip(model.layers, pools, strict=True):
        x_BTD, expert_NK = _layer(layer, x_BTD, rope[slots.position_BT], pool, page_BP, slots)
        if expert_NK is not None:
            chosen.append(expert_NK)
    return _output(model, x_BTD, vocab), chosen


def _draft(
    model: Transformer,
    token_BT: Tensor,
    position_B: Tensor,
    page_BP: Tensor,
    rope: Tensor,
    pool: Tensor,
    hidden_BTD: Tensor,
    known_B: Tensor,
) -> tuple[Tensor, Tensor]:
    module = model.mtp[0]
    slots = _slots(position_B, token_BT.shape[1], page_BP)
    x_BTD = module.join(hidden_BTD, F.embedding(token_BT, model.embed.weight))
    x_BTD, _ = _layer(module.layer, x_BTD, rope[slots.position_BT], pool, page_BP, slots)
    state_BD = x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), known_B]
    return state_BD, model.head(module.norm(state_BD)).float()


class _Slots(NamedTuple):
    """Positions of a pass's tokens, their slots in the flat pool, and the slots that each may attend to."""

    position_BT: Tensor
    slot_N: Tensor
    visible_BTS: Tensor


def _slots(position_B: Tensor, T: int, page_BP: Tensor) -> _Slots:
    position_BT = position_B[:, None] + torch.arange(T, device=position_B.device)
    slot_N = (page_BP.gather(1, position_BT // PAGE) * PAGE + position_BT % PAGE).flatten()
    slot_S = torch.arange(page_BP.shape[1] * PAGE, device=position_B.device)
    return _Slots(position_BT, slot_N, slot_S <= position_BT.unsqueeze(-1))


def _layer(
    layer: Layer, x_BTD: Tensor, rope: Tensor, pool: Tensor, page_BP: Tensor, slots: _Slots
) -> tuple[Tensor, Tensor | None]:
    u_BTD = layer.attn_norm(x_BTD)
    pool.flatten(0, 1).index_copy_(0, slots.slot_N, layer.attn.latent(u_BTD, rope).flatten(0, 1))
    latent_BSX = pool.index_select(0, page_BP.flatten()).view(page_BP.shape[0], -1, pool.shape[-1])
    return _feed_forward(layer, x_BTD + layer.attn.absorbed(u_BTD, latent_BSX, slots.visible_BTS, rope))


def _first(model: Transformer, token_BT: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Up to the first attention: residual stream, latents for the cache [N, X], and queries [B, T * H, X]."""
    x_BTD = model.embed(token_BT)
    return x_BTD, *_before_attention(model.layers[0], x_BTD, rope)


def _between(
    layer: Layer, after: Layer, x_BTD: Tensor, context_BQX: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """From one layer's attention output to the next layer's attention, as in `_first`; also the experts chosen."""
    x_BTD, expert_NK = _after_attention(layer, x_BTD, context_BQX)
    return x_BTD, *_before_attention(after, x_BTD, rope), expert_NK


def _last(model: Transformer, x_BTD: Tensor, context_BQX: Tensor, vocab: int) -> tuple[ForwardOutput, Tensor | None]:
    """From the last layer's attention output to the logits."""
    x_BTD, expert_NK = _after_attention(model.layers[-1], x_BTD, context_BQX)
    return _output(model, x_BTD, vocab), expert_NK


def _before_attention(layer: Layer, x_BTD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    u_BTD = layer.attn_norm(x_BTD)
    return layer.attn.latent(u_BTD, rope).flatten(0, 1), absorbed_queries(layer.attn, u_BTD, rope)


def _after_attention(layer: Layer, x_BTD: Tensor, context_BQX: Tensor) -> tuple[Tensor, Tensor | None]:
    return _feed_forward(layer, x_BTD + absorbed_output(layer.attn, context_BQX, x_BTD.shape[1]))


def _output(model: Transformer, x_BTD: Tensor, vocab: int) -> ForwardOutput:
    state_BTD = model.norm(x_BTD)
    logits_BTV = model.head(state_BTD).float()
    return ForwardOutput(state_BTD, logits_BTV, greedy_tokens(logits_BTV, vocab))


def _feed_forward(layer: Layer, h_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
    attended = layer.route(h_BTD)
    if attended.routing is None:
        return layer.finish(attended, layer.ffn(attended.u_ND)), None
    experts, routing = layer.sparse_ffn.experts, attended.routing
    routed_ND = gathered_ffn(attended.u_ND, routing.expert_NK, routing.weight_NK, experts.w13, experts.w2)
    return layer.finish(attended, routed_ND), routing.expert_NK


def gathered_ffn(u_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Each token's weighted sum over its K experts, [N, D]; the compiler fuses away the copies of the matrices."""
    gate, up = (w13[expert_NK] * u_ND[:, None, None, :]).sum(-1).chunk(2, -1)
    act_NKF = F.silu(gate) * up * weight_NK.unsqueeze(-1)
    return (w2[expert_NK] * act_NKF.unsqueeze(2)).sum((1, 3)).to(u_ND.dtype)
