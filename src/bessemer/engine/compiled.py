"""Decoding steps through torch.compile: the same functions, fused, in one call (or one per layer) instead of hundreds.

A small model's step is bound by the number of calls. Few rows go through the network in one compiled graph that also
gathers their cache; where the rows' cache does not fit a core's second-level cache, attention stays outside, block by
block as in `decode`, and what lies between two attentions is one graph. Experts are computed token by token from their
matrices in place, which the compiler turns into loops over memory; that is no way to go for more tokens than FEW_BYTES
allow, and those take the plain step.

Compiling takes half a minute for each form at the first start; torch keeps the result on the disk for later ones. Sizes
that change from step to step (rows, pages) are symbols in the graph, so nothing is compiled again later. One row has
graphs of its own: the compiler treats a size of 1 as a constant.

Results equal the plain step's up to the last bits. Weights are read where they lie, so they may change between steps.

Shapes: B rows, T tokens of each, N = B * T, P pages of a row, S slots, X = C + R, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.decode import absorbed_output, absorbed_queries, attend, new_cache
from bessemer.engine.decode_experts import gathered_ffn
from bessemer.engine.kv_cache import LatentCache
from bessemer.engine.pages import PAGE
from bessemer.engine.routing_trace import Trace
from bessemer.engine.sampling import Peaks, peaks
from bessemer.errors import UserError
from bessemer.model.compiler import cpp_compiler
from bessemer.model.layer import Layer
from bessemer.model.mode import evaluating
from bessemer.model.transformer import Transformer

DEEPEST = 8
"""Tokens that may be guessed ahead at most."""
FEW_BYTES = 64 << 20
"""Weights of routed experts that the tokens of a step may read per layer, counted once for every token."""


class Passed(NamedTuple):
    """What a pass leaves."""

    state_BTD: Tensor
    """After the final norm."""
    logits_BTV: Tensor
    peaks: Peaks | None = None


class Compiled:
    """The compiled steps of one model."""

    def __init__(self, model: Transformer, vocab: int):
        """`vocab`: ids that may be drawn. UserError for another network, and where there is no C++ compiler."""
        if not isinstance(model, Transformer):
            raise UserError("compiled steps are for models of this family; leave --compile off")
        device = model.embed.weight.device
        if device.type == "cpu" and cpp_compiler() is None:
            raise UserError("compiled steps need a C++ compiler (g++ or clang++); install one or leave --compile off")
        self.model, self.vocab = model, vocab
        # after 8 graphs of one function torch warns and goes on without, 20 times slower; a process may hold several
        # models, each with graphs of its own
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        # the calls between two kernels made from C++ and not from Python: a fifth of a step of one row
        options = {"cpp_wrapper": True} if device.type == "cpu" else {}
        compiled = (torch.compile(part, options=options) for part in (_whole, _guess, _first, _between, _last))
        self._whole, self._guess, self._first, self._between, self._last = compiled
        self._marked: set[tuple[str, int, int]] = set()
        self._rope = model.rope_table(model.cfg.max_seq_len + DEEPEST)  # guesses may point beyond the end
        sparse = [layer.ffn.experts for layer in model.layers if not layer.dense]
        one = max((experts.w13[0].nbytes + experts.w2[0].nbytes for experts in sparse), default=0)
        self.most_tokens = FEW_BYTES // max(1, one * model.cfg.n_activated_experts)
        """Tokens of one pass for which the compiled forms pay."""

    def __call__(self, token_BT: Tensor, position_B: Tensor, cache: LatentCache, trace: Trace | None = None) -> Passed:
        """T tokens per row, the first at position_B, through the network; all enter the cache."""
        T = token_BT.shape[1]
        length = [position + T for position in position_B.tolist()]
        cache.reserve(length)
        page_BP = cache.pages_BP(max(length))
        if cache.one_block(page_BP.shape[1]):
            pools = cache.layers[: self.model.cfg.n_layers]
            self._mark("whole", token_BT.shape, (token_BT, position_B, page_BP), pools)
            passed, chosen = self._whole(self.model, token_BT, position_B, page_BP, self._rope, pools, self.vocab)
        else:
            passed, chosen = self._by_layer(token_BT, position_B, cache)
        if trace is not None:
            for expert_NK in chosen:
                trace.chose(expert_NK)
        return passed

    def prepare(self, drafts: int = 0) -> None:
        """Compiles now what a scheduler with so many drafts will need, rather than while somebody waits."""
        device, T = self.model.embed.weight.device, drafts + 1
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=device)  # noqa: E731
        with evaluating(self.model), torch.inference_mode():
            for B in (1, 3):
                cache = new_cache(self.model, drafts=drafts > 0)
                held = cache.open([0])
                cache.extend(held, 1)
                cache.admit([(held, B)])
                self(zeros(B, T), zeros(B), cache)
                if B > 1:
                    self._by_layer(zeros(B, T), zeros(B), cache)
                for places in (T, 1)[:drafts]:
                    hidden_BTD = self.model.embed(zeros(B, places))
                    self.guess(hidden_BTD, zeros(B, places), zeros(B), zeros(B), cache)

    def guess(
        self, hidden_BTD: Tensor, token_BT: Tensor, position_B: Tensor, known_B: Tensor, cache: LatentCache
    ) -> tuple[Tensor, Tensor]:
        """The MTP module over T places, the first at position_B: its state at place known_B, [B, D], and what it
        expects after it, [B, V]."""
        length = [position + token_BT.shape[1] for position in position_B.tolist()]
        cache.reserve(length)
        page_BP, pool = cache.pages_BP(max(length)), cache.layers[self.model.cfg.n_layers]
        self._mark("guess", token_BT.shape, (token_BT, position_B, page_BP, hidden_BTD, known_B), [pool])
        return self._guess(self.model, token_BT, position_B, page_BP, self._rope, pool, hidden_BTD, known_B)

    def _by_layer(self, token_BT: Tensor, position_B: Tensor, cache: LatentCache) -> tuple[Passed, list[Tensor]]:
        model, T = self.model, token_BT.shape[1]
        position_BT = position_B[:, None] + torch.arange(T, device=position_B.device)
        rope, slot_N = self._rope[position_BT], cache.slots_BT(position_BT).flatten()
        blocks = cache.blocks(position_B, T)
        self._mark("first", token_BT.shape, (token_BT, rope))
        x_BTD, latent_NX, q_BQX = self._first(model, token_BT, rope)
        chosen: list[Tensor] = []
        for i, (layer, after) in enumerate(pairwise((*model.layers, None))):
            cache.write(i, slot_N, latent_NX)
            context_BQX = attend(q_BQX, cache, i, blocks, model.cfg)
            if after is None:
                self._mark("last", token_BT.shape, (x_BTD, context_BQX))
                passed, expert_NK = self._last(model, x_BTD, context_BQX, self.vocab)
            else:
                self._mark(f"between {layer.dense, after.dense}", token_BT.shape, (x_BTD, context_BQX, rope))
                x_BTD, latent_NX, q_BQX, expert_NK = self._between(layer, after, x_BTD, context_BQX, rope)
            if expert_NK is not None:
                chosen.append(expert_NK)
        return passed, chosen

    def _mark(self, name: str, size: Sequence[int], by_row: Sequence[Tensor], pools: Sequence[Tensor] = ()) -> None:
        """Tells the compiler, when it is about to make a graph, which sizes will change: the number of rows (where it
        is not 1), of pages of a row, and of pages of a pool."""
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
    model: Transformer, token_BT: Tensor, position_B: Tensor, page_BP: Tensor, rope: Tensor, pools: list[Tensor],
    vocab: int,
) -> tuple[Passed, list[Tensor]]:  # fmt: skip
    """The network from tokens to logits. The rows' pages are read as one block."""
    x_BTD, chosen = model.embed(token_BT), []
    place = _places(position_B, token_BT.shape[1], page_BP)
    for layer, pool in zip(model.layers, pools, strict=True):
        x_BTD, expert_NK = _layer(layer, x_BTD, rope[place.position_BT], pool, page_BP, place)
        if expert_NK is not None:
            chosen.append(expert_NK)
    return _said(model, x_BTD, vocab), chosen


def _guess(
    model: Transformer, token_BT: Tensor, position_B: Tensor, page_BP: Tensor, rope: Tensor, pool: Tensor,
    hidden_BTD: Tensor, known_B: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    module = model.mtp[0]
    place = _places(position_B, token_BT.shape[1], page_BP)
    x_BTD = module.join(hidden_BTD, F.embedding(token_BT, model.embed.weight))
    x_BTD, _ = _layer(module.layer, x_BTD, rope[place.position_BT], pool, page_BP, place)
    state_BD = x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), known_B]
    return state_BD, model.head(module.norm(state_BD)).float()


class _Places(NamedTuple):
    """Where the tokens of a pass stand, and what each may see."""

    position_BT: Tensor
    slot_N: Tensor
    visible_BTS: Tensor


def _places(position_B: Tensor, T: int, page_BP: Tensor) -> _Places:
    position_BT = position_B[:, None] + torch.arange(T, device=position_B.device)
    slot_N = (page_BP.gather(1, position_BT // PAGE) * PAGE + position_BT % PAGE).flatten()
    slot_S = torch.arange(page_BP.shape[1] * PAGE, device=position_B.device)
    return _Places(position_BT, slot_N, slot_S <= position_BT.unsqueeze(-1))


def _layer(
    layer: Layer, x_BTD: Tensor, rope: Tensor, pool: Tensor, page_BP: Tensor, place: _Places
) -> tuple[Tensor, Tensor | None]:
    u_BTD = layer.attn_norm(x_BTD)
    pool.flatten(0, 1).index_copy_(0, place.slot_N, layer.attn.latent(u_BTD, rope).flatten(0, 1))
    held_BSX = pool.index_select(0, page_BP.flatten()).view(page_BP.shape[0], -1, pool.shape[-1])
    return _feed_forward(layer, x_BTD + layer.attn.absorbed(u_BTD, held_BSX, place.visible_BTS, rope))


def _first(model: Transformer, token_BT: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Up to the first attention: residual stream, what goes into the cache [N, X], and what it is asked
    [B, T * H, X]."""
    x_BTD = model.embed(token_BT)
    return x_BTD, *_enter(model.layers[0], x_BTD, rope)


def _between(
    layer: Layer, after: Layer, x_BTD: Tensor, context_BQX: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """From what the attention of a layer saw up to the next layer's attention, as `_first`; and the experts chosen."""
    x_BTD, expert_NK = _leave(layer, x_BTD, context_BQX)
    return x_BTD, *_enter(after, x_BTD, rope), expert_NK


def _last(model: Transformer, x_BTD: Tensor, context_BQX: Tensor, vocab: int) -> tuple[Passed, Tensor | None]:
    """From what the last layer's attention saw to the end."""
    x_BTD, expert_NK = _leave(model.layers[-1], x_BTD, context_BQX)
    return _said(model, x_BTD, vocab), expert_NK


def _enter(layer: Layer, x_BTD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    u_BTD = layer.attn_norm(x_BTD)
    return layer.attn.latent(u_BTD, rope).flatten(0, 1), absorbed_queries(layer.attn, u_BTD, rope)


def _leave(layer: Layer, x_BTD: Tensor, context_BQX: Tensor) -> tuple[Tensor, Tensor | None]:
    return _feed_forward(layer, x_BTD + absorbed_output(layer.attn, context_BQX, x_BTD.shape[1]))


def _said(model: Transformer, x_BTD: Tensor, vocab: int) -> Passed:
    state_BTD = model.norm(x_BTD)
    logits_BTV = model.head(state_BTD).float()
    return Passed(state_BTD, logits_BTV, peaks(logits_BTV, vocab))


def _feed_forward(layer: Layer, h_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
    attended = layer.route(h_BTD)
    if attended.routing is None:
        return layer.finish(attended, layer.ffn(attended.u_ND)), None
    experts, routing = layer.ffn.experts, attended.routing
    routed_ND = gathered_ffn(attended.u_ND, routing.expert_NK, routing.weight_NK, experts.w13, experts.w2)
    return layer.finish(attended, routed_ND), routing.expert_NK
