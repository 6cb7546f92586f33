"""Decoding steps on a CPU in one call of a C++ kernel (`kernels/cpp/decode.cpp`): all layers, from tokens to logits.
Prefill is the same call with many tokens per row. A round (`kernels/cpp/round.cpp`) is a step with everything around
it: the MTP module's drafts, their acceptance, and the next tokens.

The kernel writes the new latents into the cache's pages and attends to the pages in place: in the absorbed form, which
reads each latent once for all heads, or, for the whole blocks of a long prompt, in the expanded form, which multiplies
less (`KernelSteps.expanded`). The forms differ by rounding. It reads the weights in place, so nothing goes stale when
they are updated between two steps: every step compares the addresses, and rewrites its table of them if one has
changed. In float32 and in BF16 a row's numbers depend only on its own tokens, bit for bit, whatever the other rows,
their order, the number of tokens per row and of threads. In BF16, weights and cache are BF16, and values between two
products are float32.

`decode.TorchSteps` is the reference, and is used where `KernelSteps.of` returns None.

Shapes: B rows, T tokens of each, N = B * T, J = T - 1 drafts, D hidden, V vocabulary, L sparse layers, K experts per
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bessemer.addons.accelerate.fixed_blocks import check_modules  # and registers its steps, which are asked later
from bessemer.addons.accelerate.kernels import attention, gate, library
from bessemer.addons.accelerate.kernels import sampling as sampling_kernel
from bessemer.engine import decode, sampling
from bessemer.engine.decode import TorchSteps, write_mtp_latents
from bessemer.engine.kv_cache import LatentCache, PromptPages
from bessemer.engine.random_streams import ACCEPT, DRAFT
from bessemer.engine.sampling import LiveRows, RejectedDrafts, SampledTokens
from bessemer.engine.speculative import accepted_of
from bessemer.engine.steps import (
    Drafting,
    Draws,
    ForwardOutput,
    PrefillChunk,
    Round,
    RoutingTrace,
    StepBackend,
    register,
)
from bessemer.model.layer import Layer
from bessemer.model.mla import LATENT_EPS
from bessemer.model.moe import FFN
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import Transformer

PASS = 512
"""Tokens of a prefill that go through the network together: its buffers stay in a core's L2 cache. A long prompt's
blocks of as many tokens share the keys that they expand."""
LONG = 2048
"""Positions before this one attend in the absorbed form, whatever the prompt."""


class KernelSteps(TorchSteps):
    """The steps of one model; `of` makes them if the kernels support it."""

    def __init__(self, model: Transformer):
        super().__init__(model)
        cfg, self._dtype = model.cfg, library.DTYPES[model.embed.weight.dtype]
        grouped = cfg.topk_method != "greedy" and cfg.n_expert_groups > 1
        self._shape = torch.tensor([
            cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim,
            cfg.v_head_dim, cfg.n_routed_experts, cfg.n_activated_experts, cfg.n_expert_groups if grouped else 1,
            cfg.n_limited_groups, cfg.n_rated_experts, cfg.moe_inter_dim, cfg.shared_width,
            cfg.inter_dim, cfg.vocab_size, cfg.score_func == "softmax", cfg.norm_topk_prob,
        ])  # fmt: skip
        self._factors = torch.tensor(
            [cfg.norm_eps, LATENT_EPS, cfg.softmax_scale, cfg.route_scale], dtype=torch.float64
        )
        self._main = _Table(_weights(model.layers), [model.embed.weight, None, None, None, model.norm.weight], model)
        self._mtp = [
            _Table(
                _weights([module.layer]),
                [model.embed.weight, module.enorm.weight, module.hnorm.weight, module.eh_proj.weight,
                 module.norm.weight],
                model,
            )
            for module in model.mtp
        ]  # fmt: skip
        self._layers, self._sparse = cfg.n_layers, sum(not layer.dense for layer in model.layers)
        self._rope = model.rope_table(1)
        self.attention_products = torch.zeros(1, dtype=torch.int64)
        """Multiplications so far of queries with keys and probabilities with values, with those that expand keys and
        values. Rounds do not count."""

    @classmethod
    def of(cls, model: LanguageModel) -> KernelSteps | None:
        """The steps of a model of this family on a CPU, in a dtype that the kernels know; None otherwise."""
        if not isinstance(model, Transformer) or not library.fits(model.embed.weight):
            return None
        if max(model.cfg.n_activated_experts, model.cfg.n_rated_experts) > gate.MOST:
            return None
        dtype = model.embed.weight.dtype
        for name, parameter in model.named_parameters():
            wide = name.endswith(("norm.weight", "gate.weight"))
            if parameter.dtype != (torch.float32 if wide else dtype) or not parameter.is_contiguous():
                return None
        return cls(model)

    def batch_invariant(self) -> StepBackend:
        return AbsorbedSteps(self.model)

    def expanded(self, prompt: PromptPages) -> tuple[int, int]:
        """The positions [start, end) whose tokens attend in the expanded form: whole blocks beyond LONG of what was
        asked, without the last token, whose logits are read. Nothing else decides it, neither where a prompt is cut nor
        what other rows do; so a preempted sequence, whose own tokens are prefilled like a prompt, gets the same bits
        again."""
        n_positions = len(prompt.ids) if prompt.asked is None else prompt.asked
        return LONG, max(LONG, (n_positions - 1) // PASS * PASS)

    def forward(
        self, token_BT: Tensor, position_B: Tensor, cache: LatentCache, trace: RoutingTrace | None = None
    ) -> ForwardOutput:
        B, T = token_BT.shape
        state_BTD = self.model.embed.weight.new_empty(B, T, self.model.cfg.dim)
        record = None if trace is None else self._record(B * T)
        rows = self._rows(token_BT, position_B, cache)
        logits_NV = self._run(self._main, cache.layers[: self._layers], rows, state=state_BTD, record=record)
        if trace is not None and record is not None:
            trace.add_layers(record)
        return ForwardOutput(state_BTD, logits_NV.view(B, T, -1))

    def draft(
        self, k: int, hidden_BTD: Tensor, token_BT: Tensor, position_B: Tensor, last_B: Tensor, cache: LatentCache
    ) -> tuple[Tensor, Tensor]:
        """Nothing reads positions before the beginning; their keys go where those of later tokens will go."""
        out_BTD = torch.empty_like(hidden_BTD, memory_format=torch.contiguous_format)
        rows = self._rows(token_BT, position_B, cache)
        logits_BV = self._run(
            self._mtp[k], [cache.layers[self._layers + k]], rows, hidden=hidden_BTD.contiguous(),
            pick=last_B + rows.begin[:-1], raw=out_BTD,
        )  # fmt: skip
        return out_BTD, logits_BV

    def prefill(self, cache: LatentCache, chunks: Sequence[PrefillChunk], trace: RoutingTrace | None = None) -> Tensor:
        """In passes of at most PASS tokens; where a prompt is cut does not change its numbers."""
        logits_PV = torch.empty(len(chunks), self.model.cfg.vocab_size)
        passes: list[list[_Piece]] = [[]]
        room = PASS
        for p, chunk in enumerate(chunks):
            start, (first, last) = chunk.prompt.length, self.expanded(chunk.prompt)
            while start < chunk.end:
                end = min(chunk.end, start + room)
                if first <= start < last:  # a block expands its keys once, in one pass
                    end = min(chunk.end, (start // PASS + 1) * PASS)
                if end - start > room or not room:
                    passes.append([])
                    room = PASS
                    continue
                passes[-1].append(_Piece(p, chunk.prompt, start, end, end == chunk.end))
                start, room = end, room - (end - start)
        for pieces in passes:
            self._prefill(cache, pieces, logits_PV, trace)
        for chunk in chunks:
            chunk.prompt.length = chunk.end
        return logits_PV

    def _prefill(
        self, cache: LatentCache, pieces: Sequence[_Piece], logits_PV: Tensor, trace: RoutingTrace | None
    ) -> None:
        lengths = [piece.end - piece.start for piece in pieces]
        begin = torch.tensor([0, *accumulate(lengths)])
        width = max(len(piece.prompt.pages) for piece in pieces)
        rows = _Rows(
            torch.tensor([token for piece in pieces for token in piece.prompt.ids[piece.start : piece.end]]),
            torch.tensor([piece.start for piece in pieces]),
            begin,
            torch.tensor([piece.prompt.pages + [0] * (width - len(piece.prompt.pages)) for piece in pieces]),
            max(piece.end for piece in pieces),
            torch.tensor([self.expanded(piece.prompt) for piece in pieces]),
        )
        last = torch.tensor([b for b, piece in enumerate(pieces) if piece.last], dtype=torch.int64)
        state_ND = self.model.embed.weight.new_empty(sum(lengths), self.model.cfg.dim) if cache.drafts else None
        record = None if trace is None else self._record(sum(lengths))
        logits = self._run(
            self._main, cache.layers[: self._layers], rows, pick=begin[1:][last] - 1, raw=state_ND, record=record
        )
        logits_PV[[piece.chunk for piece in pieces if piece.last]] = logits
        if trace is not None and record is not None:
            trace.add_layers(record)
            for piece, expert_TLK in zip(pieces, trace.take().split(lengths), strict=True):
                piece.prompt.routing.append(expert_TLK)
        if state_ND is not None:
            states = state_ND.split(lengths)
            if cache.drafts == 1:
                return self._write_mtp_latents(cache, pieces, rows.table, states)
            for piece, state_TD in zip(pieces, states, strict=True):
                write_mtp_latents(self.model, cache, piece.prompt, piece.start, state_TD)

    def _write_mtp_latents(
        self, cache: LatentCache, pieces: Sequence[_Piece], table_BP: Tensor, states: Sequence[Tensor]
    ) -> None:
        """`decode.write_mtp_latents` for one module and all pieces at once."""
        base, hidden, tokens = [], [], []
        for piece, state_TD in zip(pieces, states, strict=True):
            prompt, before = piece.prompt, piece.prompt.states
            hidden += [*(state_D[None] for state_D in before), state_TD[:-1]]
            base.append(piece.start - len(before))
            tokens.append(prompt.ids[base[-1] + 1 : piece.end])
            prompt.states = [state_TD[-1]]
        begin = torch.tensor([0, *accumulate(map(len, tokens))])
        token_N = torch.tensor([token for part in tokens for token in part], dtype=torch.int64)
        if len(token_N):
            rows = _Rows(token_N, torch.tensor(base), begin, table_BP, max(piece.end for piece in pieces))
            pools = [cache.layers[self._layers]]
            self._run(self._mtp[0], pools, rows, hidden=torch.cat(hidden), pick=token_N[:0])

    def round(
        self, rows: LiveRows, cache: LatentCache, drafts: Drafting, draws: Draws, trace: RoutingTrace | None = None
    ) -> Round:
        """One call of the kernel, unless several MTP modules draft."""
        if len(drafts.modules) > 1:
            return drafts.round(self, rows, cache, draws, trace)
        B, V, J, states = len(rows.newest_B), self.model.cfg.vocab_size, drafts.depth, drafts.states
        lengths = [position + J + 1 for position in rows.position_B.tolist()]
        cache.reserve(lengths)
        self._reach(max(lengths))
        self._main.point(cache.layers[: self._layers])
        logits_BTV = torch.empty(B, J + 1, V)
        record = None if trace is None else self._record(B * (J + 1))
        kept_BV = torch.empty(B, draws.vocab, dtype=torch.bool) if draws.kept else None
        sampled = SampledTokens(torch.empty(B, dtype=torch.int64), torch.empty(B), torch.empty(B), kept_BV)
        module = last_BV = logp_2BJ = rejected = None
        if states is not None:
            module = self._mtp[0]
            module.point(cache.layers[self._layers :])
            last_BV, logp_2BJ = torch.empty(B, V), torch.empty(2, B, J)
            if not draws.greedy:
                rejected = RejectedDrafts(torch.empty(B, dtype=torch.bool), torch.empty(B, draws.vocab))
        library.call(
            f"decode_round_{self._dtype}", "pppippp" + "pip" + "iii" + "ppii" + "p" * 7 + "ppp" + "pp" + "ppppp" + "i",
            self._shape, self._factors, self._main.layers, self._layers, self._main.ends,
            *((None, None) if module is None else (module.layers, module.ends)),
            cache.table_BP, cache.table_BP.shape[1], self._rope,
            B, J, draws.vocab,
            rows.rules_B4, rows.key_B, DRAFT, ACCEPT,
            rows.newest_B, rows.position_B,
            None if states is None else drafts.most_B, *(states or (None,) * 4),
            logits_BTV, last_BV, logp_2BJ,
            *((None, None) if rejected is None else (rejected.rejected_B, rejected.q_BV)),
            record, *sampled,
            library.threads(),
        )  # fmt: skip
        drafts.rejected, accepted, expert_BTLK = rejected, [], None
        if states is not None and logp_2BJ is not None:
            accepted = accepted_of(states.known_B, states.token_BT, logp_2BJ)
        if trace is not None and record is not None:
            trace.add_layers(record)
            expert_BTLK = trace.take().unflatten(0, (B, J + 1))
        return Round(logits_BTV, logits_BTV[:, 0] if last_BV is None else last_BV, sampled, accepted, expert_BTLK)

    def _reach(self, length: int) -> None:
        """Extends the rotary table to this many positions, with room for the next steps."""
        if len(self._rope) < length:
            self._rope = self.model.rope_table(length + 1024)

    def _record(self, N: int) -> Tensor:
        return torch.empty(N, self._sparse, self.model.cfg.n_activated_experts, dtype=torch.int64)

    def _rows(self, token_BT: Tensor, position_B: Tensor, cache: LatentCache) -> _Rows:
        B, T = token_BT.shape
        length = [max(position + T, T - 1 - position) for position in position_B.tolist()]
        cache.reserve(length)
        begin = torch.arange(0, B * T + 1, T)
        return _Rows(token_BT.contiguous(), position_B.contiguous(), begin, cache.table_BP, max(length))

    def _run(
        self,
        table: _Table,
        pools: list[Tensor],
        rows: _Rows,
        hidden: Tensor | None = None,
        pick: Tensor | None = None,
        raw: Tensor | None = None,
        state: Tensor | None = None,
        record: Tensor | None = None,
    ) -> Tensor:
        """Logits of the tokens `pick`, or of all, [M, V]."""
        M = rows.token.numel() if pick is None else len(pick)
        logits_MV = torch.empty(M, self.model.cfg.vocab_size)
        self._reach(rows.longest)
        table.point(pools)
        library.call(
            f"decode_step_{self._dtype}", "pppip" + "ppppi" + "pipp" + "pi" + "pppp" + "ip",
            self._shape, self._factors, table.layers, len(pools), table.ends,
            rows.token, hidden, rows.begin, rows.base, len(rows.base),
            rows.table, rows.table.shape[1], self._rope, rows.expand,
            pick, M, raw, state, logits_MV, record, library.threads(), self.attention_products,
        )  # fmt: skip
        return logits_MV


class AbsorbedSteps(KernelSteps):
    """Every token attends in the absorbed form, so pages hold the same bits whatever text they were computed for: a
    prefix that an earlier answer left in a server's cache equals one that is computed anew."""

    def batch_invariant(self) -> StepBackend:
        return self

    def expanded(self, prompt: PromptPages) -> tuple[int, int]:
        return 0, 0

    def new_cache(self, drafts: int = 0, make: Callable[..., LatentCache] = LatentCache) -> Any:
        check_modules(self.model, drafts)
        return super().new_cache(drafts, make)


def _serves_rows(logits_BV: Tensor, *_: object, **__: object) -> bool:
    return sampling_kernel.serves(logits_BV)


def _sample_rows(
    logits_BV: Tensor, vocab: int, rows: LiveRows, rejected: RejectedDrafts | None = None, kept: bool = False,
    scored_BV: Tensor | None = None,
) -> SampledTokens:  # fmt: skip
    """`sampling.sample_rows` in one pass."""
    rejected_B, q_BV = (None, None) if rejected is None else (rejected.rejected_B, rejected.q_BV)
    kept_BV = torch.empty(len(logits_BV), vocab, dtype=torch.bool) if kept else None
    own = rows.rules_B4, rows.key_B, rows.position_B
    sampled = sampling_kernel.sample(logits_BV, vocab, *own, rejected_B, q_BV, kept_BV, scored_BV)
    return SampledTokens(*sampled, kept_BV)


def _serves_after(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float) -> bool:
    return attention.serves(q, kv, k_rope, rope, scale)


def _attend_after(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float) -> Tensor:
    return attention.attention(q, kv, k_rope, rope, None, None, scale)[0]


register(lambda model: KernelSteps.of(model))
decode.attend_after.register(_serves_after, _attend_after)
sampling.sample_rows.register(_serves_rows, _sample_rows)


class _Piece(NamedTuple):
    """Tokens [start, end) of a prompt, in one pass of a prefill."""

    chunk: int
    prompt: PromptPages
    start: int
    end: int
    last: bool
    """Whether the chunk ends here."""


class _Rows(NamedTuple):
    """The tokens of a pass, int64."""

    token: Tensor
    """[N], row by row."""
    base: Tensor
    """[B]: position of each row's first token."""
    begin: Tensor
    """[B + 1]: where each row begins in `token`, and N."""
    table: Tensor
    """[B, P]: the pages of each row."""
    longest: int
    """Positions of the longest row."""
    expand: Tensor | None = None
    """[B, 2]: the positions of each row whose tokens attend in the expanded form; None: none."""


class _Table:
    """Addresses of weights and pools, as the kernel reads them."""

    def __init__(self, layers: list[list[Tensor | None]], ends: list[Tensor | None], model: Transformer):
        self._layers, self._ends = layers, [*ends, model.head.weight]
        self._parameters = [tensor for row in [*layers, self._ends] for tensor in row if tensor is not None]
        self._seen: list[int] = []
        self.ends = torch.empty(0, dtype=torch.int64)
        self.layers = torch.empty(0, dtype=torch.int64)

    def point(self, pools: list[Tensor]) -> None:
        """Fills `layers` and `ends` if anything has moved."""
        pointers = [*map(Tensor.data_ptr, self._parameters), *map(Tensor.data_ptr, pools)]
        if pointers == self._seen:
            return
        self._seen = pointers
        self.ends = torch.tensor(_addresses(self._ends))
        self.layers = torch.tensor(
            [[*_addresses(row), pool.data_ptr()] for row, pool in zip(self._layers, pools, strict=True)]
        )


def _addresses(row: list[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in row]


def _weights(layers: Iterable[Layer]) -> list[list[Tensor | None]]:
    """The tensors of every layer in the kernel's order; None for what a layer does not have."""
    rows: list[list[Tensor | None]] = []
    for layer in layers:
        attn, query = layer.attn, None
        if layer.cfg.q_lora_rank:
            query = (attn.wq_a.weight, attn.wq_b.weight, attn.q_norm.weight)
        wq_a, wq_b, q_norm = query or (None, attn.wq.weight, None)
        row = [layer.attn_norm.weight, wq_a, wq_b, attn.wkv_a.weight, attn.wkv_b.weight, attn.wo.weight, q_norm,
               attn.kv_norm.weight, layer.ffn_norm.weight]  # fmt: skip
        if isinstance(layer.ffn, FFN):
            row += [None, None, layer.ffn.w13.weight, layer.ffn.w2.weight, None, None]
        else:
            ffn = layer.sparse_ffn
            shared = (None, None) if ffn.shared is None else (ffn.shared.w13.weight, ffn.shared.w2.weight)
            row += [ffn.gate.weight, ffn.gate.bias_E, ffn.experts.w13, ffn.experts.w2, *shared]
        rows.append(row)
    return rows
