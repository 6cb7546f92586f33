"""Speculative decoding with the MTP modules (V3 2.2, 5.4.3; Leviathan et al. 2023).

The modules draft the tokens after the newest one, and the main model processes all of them in one pass; its logits
after each decide which drafts to accept. A draft x sampled from q is accepted with probability min(1, p(x) / q(x)); at
the first rejection the next token is sampled from (p - q)+. The output therefore has the same distribution as without
drafts, and greedy decoding gives the same tokens.

Module k reads, at position i, the state h^(k-1) there (h^0 is the main model's) and the token at i + k, and drafts the
token at i + k + 1; its keys are one more layer of the cache. Module k makes draft k. If there are more drafts than
modules (V3 has one module), the last module continues: it reads its own output in place of a state that does not exist
yet. Slots that drafts leave wrong are rewritten from true states before they are read: every step starts with all
positions that the last pass made known.

Shapes: B rows, T = depth + 1 tokens of a pass, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.kv_cache import LatentCache, PromptPages, indices
from bessemer.engine.random_streams import ACCEPT, DRAFT, uniform
from bessemer.engine.sampling import (
    LiveRows,
    RejectedDrafts,
    accept,
    inverse_cdf,
    most_likely,
    probabilities,
    sample_rows,
    score,
)
from bessemer.engine.sequence import Sequence as LiveSequence
from bessemer.engine.steps import Accepted, Drafting, DraftStates, Draws, Round, RoutingTrace, StepBackend
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel

MAX_DRAFTS = 8
"""Largest number of tokens drafted per step."""


def check_drafts(model: LanguageModel, depth: int) -> int:
    """The number of drafts per step; UserError if the model cannot draft."""
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= MAX_DRAFTS:
        raise UserError(f"drafts must be a whole number from 0 to {MAX_DRAFTS}, not {depth!r}")
    if depth and not len(model.mtp):
        raise UserError("drafts need the model's MTP module, and this model has none (or was loaded without it)")
    return depth


def drafts_of(model: LanguageModel, depth: int, vocab: int) -> Drafting:
    """What drafts `depth` tokens below `vocab` per round."""
    return Drafter(model, depth, vocab) if depth else NoDrafts(model.embed.weight.device)


class NoDrafts:
    """Rounds of one token."""

    depth = drafted = accepted = 0
    modules: Sequence[Any] = ()
    rejected: RejectedDrafts | None = None
    states: DraftStates | None = None

    def __init__(self, device: torch.device) -> None:
        self.most_B = torch.zeros(0, dtype=torch.int64, device=device)

    def admit(
        self, prompts: Sequence[PromptPages], source_B: Tensor, position_B: Tensor, fresh: Sequence[LiveSequence]
    ) -> None:
        """Nothing to prepare."""

    def select(self, source_B: Tensor) -> None:
        """Nothing to keep."""

    def limit(self, draftable: Sequence[bool]) -> None:
        """No row is drafted for."""

    def round(
        self, steps: StepBackend, rows: LiveRows, cache: LatentCache, draws: Draws, trace: RoutingTrace | None
    ) -> Round:
        logits_BTV = steps.forward(rows.newest_B.unsqueeze(1), rows.position_B, cache, trace).logits_BTV
        rows.position_B.add_(1)
        last_BV = logits_BTV.squeeze(1)
        expert_BTLK = None if trace is None else trace.take().unsqueeze(1)
        return Round(logits_BTV, last_BV, sample_rows(last_BV, draws.vocab, rows, None, draws.kept), [], expert_BTLK)


class Drafter:
    """The MTP modules and their state for every live row."""

    def __init__(self, model: LanguageModel, depth: int, vocab: int):
        self.depth = depth
        self.modules: Sequence[Any] = list(model.mtp)[:depth]
        weight = model.embed.weight
        self.hidden_BTD = weight.new_zeros(0, depth + 1, model.cfg.dim)
        """The main model's states at base, base + 1, ...; valid up to number `known`."""
        self.token_BT = torch.zeros(0, depth + 1, dtype=torch.int64, device=weight.device)
        """The tokens one position further on; the one after the last known state is set by `first_logits`."""
        self.carried = [weight.new_zeros(0, model.cfg.dim) for _ in self.modules[1:]]
        """For module k + 1, h^k at position base - k: the last one before those of the next pass."""
        self.base_B = self.token_BT.new_zeros(0)
        self.known_B = self.token_BT.new_zeros(0)
        self.most_B = self.token_BT.new_zeros(0)
        """How many drafts each row may accept."""
        self.rejected: RejectedDrafts | None = RejectedDrafts(
            self.token_BT.new_zeros(0, dtype=torch.bool), weight.new_zeros(0, vocab, dtype=torch.float32)
        )
        """The drafts that the last round rejected; None if all rows were greedy."""
        self.vocab = vocab
        self.drafted = self.accepted = 0

    def admit(
        self, prompts: Sequence[PromptPages], source_B: Tensor, position_B: Tensor, fresh: Sequence[LiveSequence]
    ) -> None:
        """New rows: row b, `fresh[b]`, continues prompt source_B[b], whose last token is at position_B[b]."""
        states_P = [prompt.states for prompt in prompts]
        hidden_BD = torch.stack([states[0] for states in states_P])[source_B]
        for k, old_BD in enumerate(self.carried, start=1):
            last_states = [states[k] if len(states) > k else torch.zeros_like(states[0]) for states in states_P]
            self.carried[k - 1] = torch.cat((old_BD, torch.stack(last_states)[source_B]))
        fresh_BTD = hidden_BD.new_zeros(len(hidden_BD), self.depth + 1, hidden_BD.shape[1])
        fresh_BTD[:, 0] = hidden_BD
        zero_BT = self.token_BT.new_zeros(len(hidden_BD), self.depth + 1)
        rejected_B = indices([drafted.rejected_q_V is not None for drafted in fresh], zero_BT.device).bool()
        zero_V = torch.zeros(self.vocab, dtype=torch.float32, device=zero_BT.device)
        q_BV = torch.stack([zero_V if drafted.rejected_q_V is None else drafted.rejected_q_V for drafted in fresh])
        n = len(self.base_B)
        old = self.rejected or RejectedDrafts(rejected_B.new_zeros(n), q_BV.new_zeros(n, self.vocab))
        self.rejected = RejectedDrafts(torch.cat((old.rejected_B, rejected_B)), torch.cat((old.q_BV, q_BV)))
        for sequence in fresh:
            sequence.rejected_q_V = None
        self.hidden_BTD = torch.cat((self.hidden_BTD, fresh_BTD))
        self.token_BT = torch.cat((self.token_BT, zero_BT))
        self.base_B = torch.cat((self.base_B, position_B))
        self.known_B = torch.cat((self.known_B, zero_BT[:, 0]))

    def select(self, source_B: Tensor) -> None:
        """New row b is old row source_B[b]."""
        self.hidden_BTD, self.token_BT = self.hidden_BTD[source_B], self.token_BT[source_B]
        self.carried = [state_BD[source_B] for state_BD in self.carried]
        self.base_B, self.known_B = self.base_B[source_B], self.known_B[source_B]
        self.rejected = None if self.rejected is None else self.rejected.select(source_B)

    def limit(self, draftable: Sequence[bool]) -> None:
        """Rows that may not be drafted for accept no draft."""
        self.most_B = indices([self.depth * yes for yes in draftable], self.token_BT.device)

    @property
    def states(self) -> DraftStates:
        return DraftStates(self.base_B, self.known_B, self.token_BT, self.hidden_BTD)

    def round(
        self, steps: StepBackend, rows: LiveRows, cache: LatentCache, draws: Draws, trace: RoutingTrace | None
    ) -> Round:
        drafts, q = self._draft(steps, rows, cache, draws)
        token_BT = torch.stack((rows.newest_B, *drafts), 1)
        state_BTD, logits_BTV = steps.forward(token_BT, rows.position_B, cache, trace)
        expert_BTLK = None if trace is None else trace.take().unflatten(0, token_BT.shape)
        open_B = self.most_B > 0
        known_B, logp_2BJ = torch.zeros_like(rows.newest_B), logits_BTV.new_zeros(2, len(token_BT), self.depth)
        if draws.greedy:
            best = most_likely(logits_BTV, draws.vocab)
            known_B = (best.token_B[:, :-1] == token_BT[:, 1:]).cumprod(1).sum(1)
            logp_2BJ = torch.stack((best.logp_B[:, :-1],) * 2)
        else:
            for j in range(self.depth):
                p_BV = probabilities(logits_BTV[:, j], rows.rules_B4, draws.vocab)
                open_B = open_B & accept(p_BV, q[j], drafts[j], _uniform(rows, ACCEPT, j + 1))
                if not bool(open_B.any()):
                    break
                scored = score(logits_BTV[:, j], rows.rules_B4, drafts[j])
                logp_2BJ[0, :, j], logp_2BJ[1, :, j] = scored.logp_B, scored.raw_logp_B
                known_B = known_B + open_B
        row_B = torch.arange(len(token_BT), device=token_BT.device)
        self.hidden_BTD, self.base_B, self.known_B = state_BTD, rows.position_B.clone(), known_B
        self.token_BT = torch.cat((token_BT[:, 1:], token_BT[:, :1]), 1)
        rows.position_B.add_(1 + known_B)
        self.rejected = None
        if not draws.greedy:
            last_q_BV = torch.stack(q, 1)[row_B, known_B.clamp(max=self.depth - 1)]
            self.rejected = RejectedDrafts((self.most_B > 0) & (known_B < self.depth), last_q_BV)
        last_BV = logits_BTV[row_B, known_B]
        sampled = sample_rows(last_BV, draws.vocab, rows, self.rejected, draws.kept)
        return Round(logits_BTV, last_BV, sampled, accepted_of(known_B, token_BT[:, 1:], logp_2BJ), expert_BTLK)

    def _draft(
        self, steps: StepBackend, rows: LiveRows, cache: LatentCache, draws: Draws
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The drafts after the newest tokens, [B] each, and the distributions they were sampled from, [B, V]; none if
        greedy."""
        drafts: list[Tensor] = []
        q: list[Tensor] = []
        logits_BV = self.first_logits(steps, rows.newest_B, cache)
        for j in range(self.depth):
            if j:
                logits_BV = self.next_logits(steps, drafts[-1], cache)
            if draws.greedy:
                drafts.append(most_likely(logits_BV.unsqueeze(1), draws.vocab).token_B.squeeze(1))
                continue
            q.append(probabilities(logits_BV, rows.rules_B4, draws.vocab))
            drafts.append(inverse_cdf(q[-1], _uniform(rows, DRAFT, j + 1)))
        return drafts, q

    def first_logits(self, steps: StepBackend, token_B: Tensor, cache: LatentCache) -> Tensor:
        """Logits of the token after the newest one, [B, V], float32; module 1 processes all known positions."""
        self.token_BT[self._rows, self.known_B] = token_B
        self._position, self._drafting = self.base_B + self.known_B, 0
        self._drafted_BT = self.token_BT
        return self._pass(steps, cache, self.hidden_BTD, self.token_BT, self.base_B, self.known_B)

    def next_logits(self, steps: StepBackend, draft_B: Tensor, cache: LatentCache) -> Tensor:
        """Logits of the token after the newest draft."""
        if (k := self._drafting + 1) < len(self.modules):
            return self._next_module(k, steps, draft_B, cache)
        self._position = self._position + 1
        state_BD = self.modules[-1].norm(self._state)
        tokens, last_B = draft_B.unsqueeze(1), torch.zeros_like(draft_B)
        return self._pass(steps, cache, state_BD.unsqueeze(1), tokens, self._position, last_B)

    def _next_module(self, k: int, steps: StepBackend, draft_B: Tensor, cache: LatentCache) -> Tensor:
        """Runs module k + 1 at the same positions and the one before them, where its token has become known."""
        self._drafting = k
        hidden_BTD = torch.cat((self.carried[k - 1].unsqueeze(1), self._out_BTD), 1)
        self.carried[k - 1] = self._out_BTD[self._rows, self.known_B]  # true: it reads no draft
        self._drafted_BT = F.pad(self._drafted_BT, (0, 1))
        self._drafted_BT[self._rows, self.known_B + k] = draft_B
        return self._pass(steps, cache, hidden_BTD, self._drafted_BT, self.base_B - k, self.known_B + k)

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.known_B), device=self.known_B.device)

    def _pass(
        self, steps: StepBackend, cache: LatentCache, hidden_BTD: Tensor, token_BT: Tensor, base_B: Tensor,
        last_B: Tensor,
    ) -> Tensor:  # fmt: skip
        """Runs the module over T tokens, the first at position base_B. Sets its states `_out_BTD` and the one at token
        last_B, `_state`; returns the logits there."""
        self._out_BTD, logits_BV = steps.draft(self._drafting, hidden_BTD, token_BT, base_B, last_B, cache)
        self._state = self._out_BTD[self._rows, last_B]
        return logits_BV


def accepted_of(known_B: Tensor, draft_BJ: Tensor, logp_2BJ: Tensor) -> list[Accepted]:
    return list(map(Accepted, known_B.tolist(), draft_BJ.tolist(), *logp_2BJ.tolist()))


def _uniform(rows: LiveRows, purpose: int, ahead: int) -> Tensor:
    return uniform(rows.key_B ^ purpose, rows.position_B + ahead)
