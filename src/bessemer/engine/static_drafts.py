"""Drafts in static steps: a step drafts, feeds the newest token with its drafts, decides which to accept and samples
the token after them, all in buffers at fixed addresses. The rules are those of `speculative` and `ModelRunner`; the
host reads the outcome of a step once, from one tensor.

To the layers, every token of a pass is a row of its own: it has the pages of its sequence, to which the tokens before
it have just been written.

Shapes: R rows of a step, J drafts, T = J + 1, D hidden, V vocabulary, L sparse layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine import row_sampling
from bessemer.engine.decode import layer_step
from bessemer.engine.kv_cache import LatentCache, own_pages
from bessemer.engine.random_streams import ACCEPT, DRAFT, uniform
from bessemer.engine.row_sampling import Form
from bessemer.engine.sampling import RejectedDrafts, accept, argmax, inverse_cdf
from bessemer.engine.speculative import Accepted, Drafter
from bessemer.model.transformer import Transformer

FRESH = -1.0
"""Takes the place of the number of accepted drafts if the row has not been through a step."""
HEAD = 4
"""Columns before those of the drafts: token, its two log-probabilities, accepted drafts."""


def accepted(row: Sequence[float]) -> Accepted:
    """The drafts of a row that `StaticDrafts.step` returns, given without its first three columns."""
    return Accepted(int(row[0]), [int(token) for token in row[1::3]], list(row[2::3]), list(row[3::3]))


class Rows(NamedTuple):
    """The first rows of a step's buffers."""

    token_R: Tensor
    position_R: Tensor
    key_R: Tensor
    rules_R4: Tensor
    live_R: Tensor
    table_RP: Tensor


Feed = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(tokens [R, T], their positions [R, T], pages [R, P]) -> states after the final norm [R * T, D], and the experts
[R * T, L, K] if they are recorded."""


def width_with(drafts: int) -> int:
    """Number of columns that `StaticDrafts.step` returns, or without drafts `row_sampling.sample`."""
    return HEAD + 3 * drafts if drafts else 3


class StaticDrafts:
    """Buffers for the drafts of static steps. Their first n rows are those of the last step."""

    def __init__(self, model: Transformer, depth: int, rows: int, vocab: int, rope: Tensor) -> None:
        cfg, weight = model.cfg, model.embed.weight
        device, T = weight.device, depth + 1
        self.model, self.depth, self.vocab, self._rope = model, depth, vocab, rope
        self.hidden_RTD = weight.new_zeros(rows, T, cfg.dim)
        self.token_RT = torch.zeros(rows, T, dtype=torch.int64, device=device)
        self.base_R, self.known_R, self.most_R = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
        self.carried = [weight.new_zeros(rows, cfg.dim) for _ in list(model.mtp)[1:depth]]
        self.rejected = RejectedDrafts(
            torch.zeros(rows, dtype=torch.bool, device=device), torch.zeros(rows, vocab, device=device)
        )
        self.logits_RTV = torch.zeros(rows, T, cfg.vocab_size, device=device)
        self.expert_RTLK: Tensor | None = None

    @property
    def advanced(self) -> tuple[Tensor, ...]:
        """The buffers that a step reads and changes."""
        return self.hidden_RTD, self.token_RT, self.base_R, self.known_R, *self.carried

    def load(self, drafter: Drafter, most_B: Tensor) -> None:
        """Loads rows other than those of the last step. most_B: drafts that a row may accept, 0 or all."""
        n = len(most_B)
        values = (drafter.hidden_BTD, drafter.token_BT, drafter.base_B, drafter.known_B, *drafter.carried, most_B)
        for buffer, value in zip((*self.advanced, self.most_R), values, strict=True):
            buffer[:n] = value
            buffer[n:] = 0

    def show(self, drafter: Drafter, n: int) -> RejectedDrafts:
        """After a step: gives the drafter views of the first n rows, and returns their rejected drafts."""
        drafter.hidden_BTD, drafter.token_BT = self.hidden_RTD[:n], self.token_RT[:n]
        drafter.base_B, drafter.known_B = self.base_R[:n], self.known_R[:n]
        drafter.carried = [state_RD[:n] for state_RD in self.carried]
        return RejectedDrafts(self.rejected.rejected_B[:n], self.rejected.q_BV[:n])

    def step(self, rows: Rows, cache: LatentCache, feed: Feed, form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
        """Moves `rows.position_R` to the token after the accepted drafts. Returns [R, columns]: that token with its
        log-probabilities, the number of accepted drafts, and every draft with its log-probabilities; the logits that
        the token was sampled from, [R, V]; and the experts of the last fed token that is kept."""
        R, T, J, vocab = len(rows.token_R), self.depth + 1, self.depth, self.vocab
        row_R = torch.arange(R, device=rows.token_R.device)
        ahead_T = torch.arange(T, device=rows.token_R.device)
        guess = _Pass(self, R, cache, rows.table_RP)
        drafts, q = self._draft(guess, rows, form)
        token_RT, draft_RJ = torch.stack((rows.token_R, *drafts), 1), torch.stack(drafts, 1)
        position_RT = rows.position_R[:, None] + ahead_T
        state_ND, expert_NLK = feed(token_RT, position_RT, rows.table_RP)
        logits_RTV = self.model.head(state_ND).float().view(R, T, -1)
        rules_N4 = rows.rules_R4[:, None].expand(-1, J, -1).flatten(0, 1)
        logits_NV, draft_N = logits_RTV[:, :-1].flatten(0, 1), draft_RJ.flatten()
        if form.drawn:
            p_NV = row_sampling.probabilities(logits_NV, vocab, rules_N4, form)
            key_N = (rows.key_R ^ ACCEPT)[:, None].expand(-1, J).flatten()
            uniform_N = uniform(key_N, position_RT[:, 1:].flatten())
            taken_N = accept(p_NV, torch.stack(q, 1).flatten(0, 1), draft_N, uniform_N)
        else:
            taken_N = argmax(logits_NV[:, :vocab]) == draft_N
        draftable_R = self.most_R[:R] > 0
        known_R = (taken_N.view(R, J) & draftable_R[:, None]).long().cumprod(1).sum(1)
        logp_N, raw_N = row_sampling.score(logits_NV, rules_N4, draft_N, form)
        last_RV = logits_RTV[row_R, known_R]
        base_R = rows.position_R.clone()
        rows.position_R.add_(rows.live_R * (1 + known_R))
        rejected = None
        if form.drawn:
            last_q_RV = torch.stack(q, 1)[row_R, known_R.clamp(max=J - 1)]
            rejected = RejectedDrafts(draftable_R & (known_R < J), last_q_RV)
            self.rejected.rejected_B[:R], self.rejected.q_BV[:R] = rejected.rejected_B, last_q_RV
        else:
            self.rejected.rejected_B[:R] = False
        next_R3 = row_sampling.sample(last_RV, vocab, rows.rules_R4, rows.key_R, rows.position_R, form, rejected)
        self.hidden_RTD[:R] = state_ND.view(R, T, -1)
        self.token_RT[:R] = torch.cat((token_RT[:, 1:], token_RT[:, :1]), 1)
        self.base_R[:R], self.known_R[:R] = base_R, known_R
        for buffer, state_RD in zip(self.carried, guess.carried, strict=True):
            buffer[:R] = state_RD
        self.logits_RTV[:R] = logits_RTV
        expert_RLK = None
        if expert_NLK is not None:
            expert_RTLK = expert_NLK.unflatten(0, (R, T))
            if self.expert_RTLK is not None:
                self.expert_RTLK[:R] = expert_RTLK
            expert_RLK = expert_RTLK[row_R, known_R]
        draft_R3J = torch.stack((draft_N.double(), logp_N.double(), raw_N.double()), -1).view(R, 3 * J)
        return torch.cat((next_R3, known_R[:, None].double(), draft_R3J), 1), last_RV, expert_RLK

    def _draft(self, guess: _Pass, rows: Rows, form: Form) -> tuple[list[Tensor], list[Tensor]]:
        """`ModelRunner._draft` with every row's own rules."""
        drafts: list[Tensor] = []
        q: list[Tensor] = []
        logits_RV = guess.first_logits(rows.token_R)
        for j in range(self.depth):
            if j:
                logits_RV = guess.next_logits(drafts[-1])
            if not form.drawn:
                drafts.append(argmax(logits_RV[:, : self.vocab]).clamp(0, self.vocab - 1))
                continue
            q.append(row_sampling.probabilities(logits_RV, self.vocab, rows.rules_R4, form))
            drafts.append(inverse_cdf(q[-1], uniform(rows.key_R ^ DRAFT, rows.position_R + (j + 1))))
        return drafts, q


class _Pass(Drafter):
    """Runs the modules over the first R rows of the buffers, whose pages are in the table."""

    def __init__(self, drafts: StaticDrafts, R: int, cache: LatentCache, table_RP: Tensor) -> None:
        super().__init__(drafts.model, cache, drafts.depth)
        self._table_RP, self._rope = table_RP, drafts._rope
        drafts.show(self, R)

    def _pass(self, hidden_BTD: Tensor, token_BT: Tensor, base_B: Tensor, last_B: Tensor) -> Tensor:
        module, index = self.modules[self._drafting], self.model.cfg.n_layers + self._drafting
        position_BT = self._positions(base_B, token_BT.shape[1])
        own, slot_N = own_pages(self._table_RP, position_BT)
        x_BTD = module.join(hidden_BTD, F.embedding(token_BT, self.model.embed.weight))
        rope_N = self._rope[own.position_B][:, None]
        x_N1D = layer_step(module.layer, index, x_BTD.flatten(0, 1)[:, None], rope_N, self.cache, own, slot_N)
        self._out_BTD = x_N1D.view_as(x_BTD)
        self._state = self._out_BTD[self._rows, last_B]
        return self.model.head(module.norm(self._state)).float()
