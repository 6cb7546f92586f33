"""The sequences that decode together: they enter with their prompt's logits, sample a token, and go through the model.

One step is `sample` (a token for every sequence), `retire` (finished sequences leave and free their rows at once) and
`advance` (the new tokens through the network). Sequences can join between steps; outputs do not depend on batch
composition, because a token depends only on the logits, key and position of its own sequence.

With a drafter a step may append several tokens: `advance` processes the sampled token together with drafts of what
follows, and appends those that the main model accepts. Where kernels serve, one call does all of `advance` and samples
the next tokens.

Shapes: B live sequences, T tokens of one pass, V vocabulary, L sparse layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.decode import ForwardOutput, Model, PrefillChunk, RoutingTrace, hidden_step, prefill, step
from bessemer.engine.kept_tokens import ids_of_mask
from bessemer.engine.kernel_steps import KernelSteps, LiveRows
from bessemer.engine.kv_cache import PAGE, LatentCache, PromptPages, indices
from bessemer.engine.penalties import Penalties
from bessemer.engine.random_streams import ACCEPT, DRAFT, uniform
from bessemer.engine.sampling import (
    GreedyTokens,
    RejectedDrafts,
    RowStreams,
    SampledTokens,
    accept,
    inverse_cdf,
    most_likely,
    probabilities_batch,
    rules,
    sample_batch,
    sample_bound,
    sample_rows,
    score_batch,
    top_tokens,
)
from bessemer.engine.sequence import Sequence
from bessemer.engine.speculative import Accepted, Drafter
from bessemer.errors import UserError
from bessemer.kernels import sampling as kernel
from bessemer.model.transformer import Transformer
from bessemer.probe import float64_home


class ModelRunner:
    """Live sequences and their rows in the cache. Row b of every tensor, `sequences` and the cache is one sequence."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        cache: LatentCache,
        trace: RoutingTrace | None = None,
        drafts: int = 0,
        trace_all: bool = True,
        kept: bool = False,
    ):
        """trace_all: steps always record experts, not only if a live request wants them. kept: every sequence records
        the tokens that truncation kept; all must have the same parameters, and there are no drafts."""
        self.model, self.cache, self.trace, self.kept = model, cache, trace, kept
        self._trace_all = trace_all
        self.kernels = KernelSteps.of(model)
        self.vocab = tokenizer.vocab_size
        self.drafter: Drafter | None = None
        if drafts:
            assert isinstance(model, Transformer)
            self.drafter = Drafter(model, cache, drafts, self.kernels)
        device = model.embed.weight.device
        self.sequences: list[Sequence] = []
        self.key_B = torch.zeros(0, dtype=torch.int64, device=device)
        self.position_B = torch.zeros(0, dtype=torch.int64, device=device)
        """Position of each sequence's next token."""
        self.rules_B4 = torch.zeros(0, 4, dtype=torch.float64, device=float64_home(device))
        """How each sequence is sampled, see `sampling.rules`."""
        self.token_B: Tensor | None = None
        """Between `sample` and `advance`: the sampled tokens."""
        self.logits_BV: Tensor | None = None
        self.ahead: SampledTokens | None = None
        """The next tokens, if `advance` has already sampled them."""
        self.expert_BLK: Tensor | None = None
        """The experts of each sequence's last fed token, if they are recorded; 0 for a sequence that needs none."""
        self.rejected: RejectedDrafts | None = None
        self.penalties = Penalties(model.cfg.vocab_size, device)
        self._bound_order: list[int] = []
        """All rows, those of `penalties` first."""
        self._look_at_requests()

    def _look_at_requests(self) -> None:
        """What the requests of the live sequences have in common."""
        requests = [sequence.request for sequence in self.sequences]
        self._draftable = [sequence.draftable for sequence in self.sequences]
        self._by_logits = all(self._draftable)
        self.penalties.follow(self.sequences)
        if not self._by_logits:
            row_of = {id(sequence): b for b, sequence in enumerate(self.sequences)}
            first = [row_of[id(sequence)] for sequence in self.penalties.sequences]
            self._bound_order = first + sorted(set(range(len(self.sequences))).difference(first))
        if self.drafter is not None:
            self._most_B = indices([self.drafter.depth * yes for yes in self._draftable], self.key_B.device)
        self.all_greedy = self._by_logits and all(request.sampling.temperature == 0 for request in requests)
        """Whether every sequence takes its most likely token, whatever came before."""
        self._top = any(request.top for request in requests)
        self._routing = any(request.routing for request in requests)
        self._tracer = self.trace if self._trace_all or self._routing else None

    @property
    def lookahead(self) -> int:
        """Slots that a step writes in every row."""
        return 1 if self.drafter is None else self.drafter.depth + 1

    def prefill(self, chunks: list[PrefillChunk]) -> Tensor:
        """`decode.prefill`: the logits after each chunk, [len(chunks), V]."""
        if self.kernels is not None:
            return self.kernels.prefill(self.cache, chunks, self.trace)
        return prefill(self.model, self.cache, chunks, self.trace)

    def admit(self, prompts: list[tuple[PromptPages, list[Sequence]]], logits_PV: Tensor) -> None:
        """Adds the sequences of prefilled prompts, with the logits after each prompt."""
        device = logits_PV.device
        self.cache.admit([(prompt, len(sequences)) for prompt, sequences in prompts])
        fresh = [sequence for _, sequences in prompts for sequence in sequences]
        source = indices([p for p, (_, sequences) in enumerate(prompts) for _ in sequences], device)
        keys = indices([sequence.request.key for sequence in fresh], device)
        positions = indices([len(prompt.ids) for prompt, _ in prompts], device)[source]
        self.logits_BV, self.ahead = _append(self.logits_BV, logits_PV[source]), None
        self.key_B, self.position_B = torch.cat((self.key_B, keys)), torch.cat((self.position_B, positions))
        self.rules_B4 = torch.cat((self.rules_B4, rules(fresh, self.rules_B4.device)))
        if self.trace is not None:
            last_PLK = torch.stack([prompt.routing[-1][-1] for prompt, _ in prompts])
            if self.expert_BLK is None:
                self.expert_BLK = last_PLK.new_zeros(len(self.sequences), *last_PLK.shape[1:])
            self.expert_BLK = torch.cat((self.expert_BLK, last_PLK[source]))
        if self.drafter is not None:
            self.drafter.admit([prompt.states for prompt, _ in prompts], source, positions - 1)
            zero_V = logits_PV.new_zeros(self.vocab)
            rejected_B = indices([s.rejected_q_V is not None for s in fresh], device).bool()
            q_BV = torch.stack([zero_V if s.rejected_q_V is None else s.rejected_q_V for s in fresh])
            n = len(self.sequences)
            old = self.rejected or RejectedDrafts(rejected_B.new_zeros(n), q_BV.new_zeros(n, self.vocab))
            self.rejected = RejectedDrafts(torch.cat((old.rejected_B, rejected_B)), torch.cat((old.q_BV, q_BV)))
        for prompt, sequences in prompts:
            for sequence in sequences:
                sequence.page_keys = list(prompt.keys)
                sequence.shared = prompt.full_pages * PAGE if len(sequences) > 1 else 0
        for sequence in fresh:
            sequence.start()
            sequence.rejected_q_V = None
        self.sequences += fresh
        self._look_at_requests()

    def sample(self) -> None:
        """Appends one token to every sequence. Finished sequences have `finish` set and stay until `retire`."""
        assert self.logits_BV is not None
        self._record(self.logits_BV, self.expert_BLK)
        sampled = self._choose(self.logits_BV)
        kept = [None] * len(self.sequences) if sampled.kept_BV is None else ids_of_mask(sampled.kept_BV.cpu())
        for sequence, token, logp, raw_logp, ids in zip(
            self.sequences, *map(Tensor.tolist, sampled[:3]), kept, strict=True
        ):
            if not isfinite(logp):
                sequence.finish = "error"
            elif sequence.finish is None:
                sequence.append(token, logp, raw_logp, ids)
        self.token_B = sampled.token_B

    def _choose(self, logits_BV: Tensor) -> SampledTokens:
        """The next token of every sequence. Only the rows that are not free to follow their logits cost more."""
        bound = [] if self._by_logits else [b for b in self._bound_order if not self.sequences[b].free]
        if not bound:
            return self._choose_freely(logits_BV)
        index = indices(bound, logits_BV.device)
        first, last, n = bound[0], bound[-1], len(bound)
        one_after_another = bound == list(range(first, last + 1))
        own_BV = logits_BV[first : last + 1] if one_after_another else logits_BV[index]
        changed_BV = own_BV.clone()
        self.penalties.apply(changed_BV)
        sequences = [self.sequences[b] for b in bound]
        rows = RowStreams(*(rows[index.to(rows.device)] for rows in (self.rules_B4, self.key_B, self.position_B)))
        chosen = sample_bound(sequences, own_BV, changed_BV, rows, self.vocab)
        if n == len(self.sequences) and one_after_another:
            return chosen
        sampled = self._choose_freely(logits_BV)
        for column, values in zip(sampled[:3], chosen[:3], strict=True):
            column[index] = values
        return sampled

    def _choose_freely(self, logits_BV: Tensor) -> SampledTokens:
        """The next token of every sequence by its logits alone."""
        if self.ahead is not None:
            return self.ahead
        if kernel.serves(logits_BV):
            rows = (self.rules_B4, self.key_B, self.position_B)
            return sample_rows(logits_BV, self.vocab, *rows, self.rejected, self.kept)
        uniform_B = uniform(self.key_B, self.position_B)
        return sample_batch(self.sequences, logits_BV, uniform_B, self.vocab, self.rejected, self.kept)

    def retire(self) -> None:
        """Drops the finished sequences."""
        live = [sequence.finish is None for sequence in self.sequences]
        if all(live):
            return
        fed = self.positions()
        for b, sequence in enumerate(self.sequences):
            if sequence.finish == "error":
                self.cache.scrub(b)
            elif sequence.finish is not None:
                # the last pass left keys of drafts in the modules' layers, which its next step would have overwritten
                self.cache.cache_row(b, sequence.ids, fed[b] + 1 - self.lookahead, sequence.page_keys)
        self.keep(live)

    def positions(self) -> list[int]:
        """The position of every sequence's next token."""
        position: list[int] = self.position_B.tolist()
        return position

    def keep(self, live: list[bool]) -> None:
        """Keeps the sequences where `live` is True, and drops the others."""
        source = self.cache.keep(live)
        self.sequences = [self.sequences[b] for b in source]
        self._select(indices(source, self.key_B.device))
        self.token_B = self.token_B if self.sequences else None  # without sequences no `advance` follows
        self._look_at_requests()

    def _select(self, source: Tensor) -> None:
        """New row b of every tensor is old row source[b]."""
        self.key_B, self.position_B = self.key_B[source], self.position_B[source]
        self.rules_B4 = self.rules_B4[source.to(self.rules_B4.device)]
        self.token_B = None if self.token_B is None else self.token_B[source]
        self.expert_BLK = None if self.expert_BLK is None else self.expert_BLK[source]
        self.logits_BV, self.ahead = None if self.logits_BV is None else self.logits_BV[source], None
        self.rejected = None if self.rejected is None else self.rejected.select(source)
        if self.drafter is not None:
            self.drafter.select(source)

    def preempt(self, b: int) -> Sequence:
        """Removes a sequence before it samples; admitted again with all its tokens, it continues unchanged. Its pages
        stay available to it until others need them."""
        sequence = self.sequences[b]
        self.cache.cache_row(b, sequence.ids, self.positions()[b] + 1 - self.lookahead, sequence.page_keys)
        if self.rejected is not None and self.rejected.rejected_B[b]:
            sequence.rejected_q_V = self.rejected.q_BV[b].clone()
        self.keep([other != b for other in range(len(self.sequences))])
        return sequence

    def advance(self) -> None:
        """Runs the sampled tokens through the network; with a drafter also the drafts that follow them, which may
        finish some sequences."""
        assert self.token_B is not None
        token_B, self.token_B = self.token_B, None
        drafter = self.drafter
        if self.kernels is not None and (drafter is None or len(drafter.modules) == 1):
            return self._round(self.kernels, token_B)
        if drafter is not None:
            return self._advance_with_drafts(drafter, token_B)
        _, logits_BTV = self._forward(token_B.unsqueeze(1))
        self.logits_BV, self.ahead = logits_BTV.squeeze(1), None
        self.position_B = self.position_B + 1
        self.expert_BLK = None if self._tracer is None else self._tracer.take()

    def _round(self, kernels: KernelSteps, token_B: Tensor) -> None:
        """`advance` and the next samples in one call of a kernel."""
        rows, tracer = LiveRows(token_B, self.position_B, self.rules_B4, self.key_B), self._tracer
        states, most_B = (None, None) if self.drafter is None else (self.drafter.states, self._most_B)
        out = kernels.round(
            rows, self.cache, self.vocab, states, most_B,
            sample=any(sequence.free for sequence in self.sequences), greedy=self.all_greedy,
            trace=tracer is not None, kept=self.kept,
        )  # fmt: skip
        self.logits_BV, self.ahead, self.rejected = out.last_BV, out.sampled, out.rejected
        expert_BTLK = self.expert_BLK = None
        if tracer is not None and out.expert_NLK is not None:
            expert_BTLK = out.expert_NLK.to(tracer.dtype).unflatten(0, out.logits_BTV.shape[:2])
            known_B = 0 if states is None else states.known_B
            self.expert_BLK = expert_BTLK[torch.arange(len(token_B)), known_B]
        if states is not None and out.logp_2BJ is not None:
            self._append_drafts(_on_host(states.known_B, states.token_BT, out.logp_2BJ), out.logits_BTV, expert_BTLK)

    def _append_drafts(self, rows: Iterable[Accepted], logits_BTV: Tensor | None, expert_BTLK: Tensor | None) -> None:
        """Appends the accepted drafts to every sequence, up to the one that finishes it. Logits and experts are for
        reports."""
        assert self.drafter is not None
        rows = list(rows)
        tried = sum(row.known >= 0 and yes for row, yes in zip(rows, self._draftable, strict=True))
        self.drafter.drafted += self.drafter.depth * tried
        for j in range(max(row.known for row in rows)):
            open_ = [row.known > j and seq.finish is None for row, seq in zip(rows, self.sequences, strict=True)]
            if (self._top or self._routing) and logits_BTV is not None:
                self._record(logits_BTV[:, j], None if expert_BTLK is None else expert_BTLK[:, j], open_)
            for row, sequence, more in zip(rows, self.sequences, open_, strict=True):
                if more:
                    sequence.append(row.tokens[j], row.logp[j], row.raw_logp[j])
            self.drafter.accepted += sum(open_)

    def _advance_with_drafts(self, drafter: Drafter, token_B: Tensor) -> None:
        depth = drafter.depth
        drafts, q = self._draft(drafter, token_B, self.all_greedy)
        token_BT = torch.stack((token_B, *drafts), 1)
        state_BTD, logits_BTV = self._forward(token_BT)
        expert_BTLK = None if self._tracer is None else self._tracer.take().unflatten(0, token_BT.shape)
        best = most_likely(logits_BTV, self.vocab) if self.all_greedy else None
        draftable_B = self._most_B > 0
        if best is not None:
            known_B = (best.token_BT[:, :-1] == token_BT[:, 1:]).cumprod(1).sum(1)
            logp_2BJ = torch.stack((best.logp_BT[:, :-1],) * 2)
        else:
            known_B, logp_2BJ = torch.zeros_like(token_B), logits_BTV.new_zeros(2, len(token_B), depth)
            open_B = draftable_B
            for j in range(depth):
                p_BV = probabilities_batch(self.sequences, logits_BTV[:, j], self.vocab)
                open_B = open_B & accept(p_BV, q[j], drafts[j], self._uniform(ACCEPT, j + 1))
                if not bool(open_B.any()):
                    break
                scored = score_batch(self.sequences, logits_BTV[:, j], drafts[j])
                logp_2BJ[0, :, j], logp_2BJ[1, :, j] = scored.logp_B, scored.raw_logp_B
                known_B = known_B + open_B
        self._append_drafts(_on_host(known_B, token_BT[:, 1:], logp_2BJ), logits_BTV, expert_BTLK)
        assert state_BTD is not None
        row_B = torch.arange(len(token_B), device=token_B.device)
        drafter.update(state_BTD, token_BT, self.position_B, known_B)
        self.position_B = self.position_B + 1 + known_B
        self.logits_BV = logits_BTV[row_B, known_B]
        self.expert_BLK = None if expert_BTLK is None else expert_BTLK[row_B, known_B]
        if best is not None:
            known_B1 = known_B.unsqueeze(1)
            self.ahead, self.rejected = _first(GreedyTokens(*(x_BT.gather(1, known_B1) for x_BT in best))), None
            return
        self.ahead = None
        last_q_BV = torch.stack(q, 1)[row_B, known_B.clamp(max=depth - 1)]
        self.rejected = RejectedDrafts(draftable_B & (known_B < depth), last_q_BV)

    def _draft(self, drafter: Drafter, token_B: Tensor, greedy: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The drafts after token_B, [B] each, and the distributions they were sampled from, [B, V]; none if greedy."""
        drafts: list[Tensor] = []
        q: list[Tensor] = []
        logits_BV = drafter.first_logits(token_B)
        for j in range(drafter.depth):
            if j:
                logits_BV = drafter.next_logits(drafts[-1])
            if greedy:
                drafts.append(most_likely(logits_BV, self.vocab).token_BT)
                continue
            q.append(probabilities_batch(self.sequences, logits_BV, self.vocab))
            drafts.append(inverse_cdf(q[-1], self._uniform(DRAFT, j + 1)))
        return drafts, q

    def _forward(self, token_BT: Tensor) -> ForwardOutput:
        """T tokens of every sequence through the network."""
        if self.kernels is not None:
            return self.kernels(token_BT, self.position_B, self.cache, self._tracer)
        if not isinstance(self.model, Transformer):
            return ForwardOutput(None, step(self.model, token_BT.squeeze(1), self.position_B, self.cache).unsqueeze(1))
        state_BTD = self.model.norm(hidden_step(self.model, token_BT, self.position_B, self.cache, self._tracer))
        return ForwardOutput(state_BTD, self.model.head(state_BTD).float())

    def _uniform(self, purpose: int, ahead: int) -> Tensor:
        return uniform(self.key_B ^ purpose, self.position_B + ahead)

    def _record(self, logits_BV: Tensor, expert_BLK: Tensor | None, selected: list[bool] | None = None) -> None:
        """Stores the requested top tokens and routes of the token about to be appended, for `selected` sequences."""
        top = top_tokens(self.sequences, logits_BV, self.vocab) if self._top else None
        routes = expert_BLK.tolist() if expert_BLK is not None and self._routing else None
        for b, sequence in enumerate(self.sequences) if top or routes else ():
            if selected is None or selected[b]:
                if top and sequence.request.top:
                    sequence.top.append(top[b])
                if routes and sequence.request.routing:
                    sequence.routes.append(tuple(map(tuple, routes[b])))


def _on_host(known_B: Tensor, draft_BJ: Tensor, logp_2BJ: Tensor) -> Iterable[Accepted]:
    return map(Accepted, known_B.tolist(), draft_BJ.tolist(), *logp_2BJ.tolist())


def _first(best: GreedyTokens) -> SampledTokens:
    logp_B = best.logp_BT[:, 0]
    return SampledTokens(best.token_BT[:, 0], logp_B, logp_B)


def _append(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat((old, new))


def not_finite(rows: int, of: int, token: int) -> UserError:
    return UserError(
        f"the model's logits are not finite for {rows} of {of} rows at generated token {token}: its weights have NaN "
        "or infinity, or overflow in this number format; load an earlier checkpoint or compute in float32"
    )
