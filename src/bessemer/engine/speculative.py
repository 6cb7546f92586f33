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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.decode import Model, layer_step
from bessemer.engine.kernel_steps import DraftStates, KernelSteps
from bessemer.engine.kv_cache import LatentCache
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer

MAX_DRAFTS = 8
"""Largest number of tokens drafted per step."""


def check_drafts(model: Model, depth: int) -> int:
    """The number of drafts per step; UserError if the model cannot draft."""
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= MAX_DRAFTS:
        raise UserError(f"drafts must be a whole number from 0 to {MAX_DRAFTS}, not {depth!r}")
    if depth and not len(model.mtp):
        raise UserError("drafts need the model's MTP module, and this model has none (or was loaded without it)")
    return depth


class Accepted(NamedTuple):
    """What the host learns about a row's drafts."""

    known: int
    """Number of accepted drafts; below 0 if there were no drafts."""
    tokens: list[int]
    """All drafts, and their log-probabilities at the row's temperature and at 1."""
    logp: list[float]
    raw_logp: list[float]


class Drafter:
    """The MTP modules and their state for every live row."""

    def __init__(
        self,
        model: Transformer,
        cache: LatentCache,
        depth: int,
        kernels: KernelSteps | None = None,
    ):
        self.model, self.cache, self.depth, self.kernels = model, cache, depth, kernels
        self.modules = list(model.mtp)[:depth]
        weight = model.embed.weight
        self.hidden_BTD = weight.new_zeros(0, depth + 1, model.cfg.dim)
        """The main model's states at base, base + 1, ...; valid up to number `known`."""
        self.token_BT = torch.zeros(0, depth + 1, dtype=torch.int64, device=weight.device)
        """The tokens one position further on; the one after the last known state is set by `first_logits`."""
        self.carried = [weight.new_zeros(0, model.cfg.dim) for _ in self.modules[1:]]
        """For module k + 1, h^k at position base - k: the last one before those of the next pass."""
        self.base_B = self.token_BT.new_zeros(0)
        self.known_B = self.token_BT.new_zeros(0)
        self.drafted = self.accepted = 0

    def admit(self, states_P: Sequence[Sequence[Tensor]], source_B: Tensor, position_B: Tensor) -> None:
        """New rows: row b continues prompt source_B[b], whose last token is at position_B[b]. `states_P`: see
        `PromptPages.states`."""
        hidden_BD = torch.stack([states[0] for states in states_P])[source_B]
        for k, old_BD in enumerate(self.carried, start=1):
            known = [states[k] if len(states) > k else torch.zeros_like(states[0]) for states in states_P]
            self.carried[k - 1] = torch.cat((old_BD, torch.stack(known)[source_B]))
        fresh_BTD = hidden_BD.new_zeros(len(hidden_BD), self.depth + 1, hidden_BD.shape[1])
        fresh_BTD[:, 0] = hidden_BD
        zero_BT = self.token_BT.new_zeros(len(hidden_BD), self.depth + 1)
        self.hidden_BTD = torch.cat((self.hidden_BTD, fresh_BTD))
        self.token_BT = torch.cat((self.token_BT, zero_BT))
        self.base_B = torch.cat((self.base_B, position_B))
        self.known_B = torch.cat((self.known_B, zero_BT[:, 0]))

    def select(self, source_B: Tensor) -> None:
        """New row b is old row source_B[b]."""
        self.hidden_BTD, self.token_BT = self.hidden_BTD[source_B], self.token_BT[source_B]
        self.carried = [state_BD[source_B] for state_BD in self.carried]
        self.base_B, self.known_B = self.base_B[source_B], self.known_B[source_B]

    @property
    def states(self) -> DraftStates:
        """What a round of `KernelSteps` changes in place."""
        return DraftStates(self.base_B, self.known_B, self.token_BT, self.hidden_BTD)

    def update(self, hidden_BTD: Tensor, token_BT: Tensor, base_B: Tensor, known_B: Tensor) -> None:
        """Stores the states of a pass over token_BT, the first at base_B; known_B of its drafts were accepted."""
        self.hidden_BTD, self.base_B, self.known_B = hidden_BTD, base_B, known_B
        self.token_BT = torch.cat((token_BT[:, 1:], token_BT[:, :1]), 1)

    def first_logits(self, token_B: Tensor) -> Tensor:
        """Logits of the token after the newest one, [B, V], float32; module 1 processes all known positions."""
        self.token_BT[self._rows, self.known_B] = token_B
        self._position, self._drafting = self.base_B + self.known_B, 0
        self._drafted_BT = self.token_BT
        return self._pass(self.hidden_BTD, self.token_BT, self.base_B, self.known_B)

    def next_logits(self, draft_B: Tensor) -> Tensor:
        """Logits of the token after the newest draft."""
        if (k := self._drafting + 1) < len(self.modules):
            return self._next_module(k, draft_B)
        self._position = self._position + 1
        state_BD = self.modules[-1].norm(self._state)
        return self._pass(state_BD.unsqueeze(1), draft_B.unsqueeze(1), self._position, torch.zeros_like(draft_B))

    def _next_module(self, k: int, draft_B: Tensor) -> Tensor:
        """Runs module k + 1 at the same positions and the one before them, where its token has become known."""
        self._drafting = k
        hidden_BTD = torch.cat((self.carried[k - 1].unsqueeze(1), self._out_BTD), 1)
        self.carried[k - 1] = self._out_BTD[self._rows, self.known_B]  # true: it reads no draft
        self._drafted_BT = F.pad(self._drafted_BT, (0, 1))
        self._drafted_BT[self._rows, self.known_B + k] = draft_B
        return self._pass(hidden_BTD, self._drafted_BT, self.base_B - k, self.known_B + k)

    def _positions(self, base_B: Tensor, T: int) -> Tensor:
        """Where the keys of T tokens go, the first at base_B."""
        position_BT = base_B[:, None] + torch.arange(T, device=base_B.device)
        # nothing reads positions before the beginning; their keys go where those of later tokens will be written
        return torch.where(position_BT < 0, base_B[:, None] + T - 1 - position_BT, position_BT)

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.known_B), device=self.known_B.device)

    def _pass(self, hidden_BTD: Tensor, token_BT: Tensor, base_B: Tensor, last_B: Tensor) -> Tensor:
        """Runs the module over T tokens, the first at position base_B. Sets its states `_out_BTD` and the one at token
        last_B, `_state`; returns the logits there."""
        if self.kernels is not None:
            self._out_BTD, logits_BV = self.kernels.draft(
                self._drafting, hidden_BTD, token_BT, base_B, last_B, self.cache
            )
            self._state = self._out_BTD[self._rows, last_B]
            return logits_BV
        T, module = token_BT.shape[1], self.modules[self._drafting]
        position_BT = self._positions(base_B, T)
        self.cache.reserve([last + 1 for last in position_BT.max(1).values.tolist()])
        rope = self.model.rope_table(int(position_BT.max()) + 1)[position_BT]
        x_BTD = module.join(hidden_BTD, F.embedding(token_BT, self.model.embed.weight))
        groups, slot_N = self.cache.row_groups(base_B, T), self.cache.slots_BT(position_BT).flatten()
        index = self.model.cfg.n_layers + self._drafting
        self._out_BTD = layer_step(module.layer, index, x_BTD, rope, self.cache, groups, slot_N)
        self._state = self._out_BTD[self._rows, last_B]
        return self.model.head(module.norm(self._state)).float()
