"""Speculative decoding with the MTP module (V3 2.2, 5.4.3; Leviathan et al. 2023): it drafts, the main model verifies.

Each step the module drafts the tokens after the newest one, and the main model processes all of them in one pass; its
logits after each decide which drafts to accept. A draft x sampled from q is accepted with probability
min(1, p(x) / q(x)); at the first rejection the next token is sampled from (p - q)+. The output therefore has the same
distribution as without drafts, and greedy decoding gives the same tokens.

The module reads, at position i, the main model's hidden state there and the token at i + 1; its keys are one more layer
of the cache. One module serves every depth: for the second draft it reads its own output in place of a hidden state
that does not exist yet. The slots that this leaves wrong are rewritten from true states before they are read: every
step starts with all positions that the last pass made known. (The last slot of a cached prefix may belong to another
continuation. That can cost a draft, never a token.)

Shapes: B rows, T = depth + 1 tokens of a pass, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.compiled import MAX_DRAFTS, CompiledSteps
from bessemer.engine.decode import Model, layer_step
from bessemer.engine.kv_cache import LatentCache
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer


def check_drafts(model: Model, depth: int) -> int:
    """The number of drafts per step; UserError where the model cannot draft."""
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= MAX_DRAFTS:
        raise UserError(f"drafts must be a whole number from 0 to {MAX_DRAFTS}, is {depth!r}")
    if depth and not (isinstance(model, Transformer) and len(model.mtp)):
        raise UserError("drafts need the model's MTP module, and this model has none (or was loaded without it)")
    return depth


class Drafter:
    """The MTP module and its state for every live row."""

    def __init__(self, model: Transformer, cache: LatentCache, depth: int, compiled: CompiledSteps | None = None):
        self.model, self.cache, self.depth, self.compiled = model, cache, depth, compiled
        self.module, self.layer_index = model.mtp[0], model.cfg.n_layers
        weight = model.embed.weight
        self.hidden_BTD = weight.new_zeros(0, depth + 1, model.cfg.dim)
        """The main model's states at base, base + 1, ...; valid up to number `known`."""
        self.token_BT = torch.zeros(0, depth + 1, dtype=torch.int64, device=weight.device)
        """The tokens one position further on; the one after the last known state is set by `first_logits`."""
        self.base_B = self.token_BT.new_zeros(0)
        self.known_B = self.token_BT.new_zeros(0)
        self.drafted = self.accepted = 0

    def admit(self, hidden_BD: Tensor, position_B: Tensor) -> None:
        """New rows: the state at their last token, which stands at position_B."""
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
        self.base_B, self.known_B = self.base_B[source_B], self.known_B[source_B]

    def update(self, hidden_BTD: Tensor, token_BT: Tensor, base_B: Tensor, known_B: Tensor) -> None:
        """The states of a pass over token_BT, the first at base_B, of whose drafts known_B were accepted."""
        self.hidden_BTD, self.base_B, self.known_B = hidden_BTD, base_B, known_B
        self.token_BT = torch.cat((token_BT[:, 1:], token_BT[:, :1]), 1)

    def first_logits(self, token_B: Tensor) -> Tensor:
        """Logits of the token after the newest one, [B, V], float32; processes all known positions."""
        row_B = torch.arange(len(token_B), device=token_B.device)
        self.token_BT[row_B, self.known_B] = token_B
        self._position = self.base_B + self.known_B
        return self._pass(self.hidden_BTD, self.token_BT, self.base_B, self.known_B)

    def next_logits(self, draft_B: Tensor) -> Tensor:
        """Logits of the token after its own draft."""
        self._position = self._position + 1
        state_BD = self.module.norm(self._state)
        return self._pass(state_BD.unsqueeze(1), draft_B.unsqueeze(1), self._position, torch.zeros_like(draft_B))

    def _pass(self, hidden_BTD: Tensor, token_BT: Tensor, base_B: Tensor, known_B: Tensor) -> Tensor:
        """Logits after token known_B of the T tokens; the module's state there is stored in `_state`."""
        if self.compiled is not None and token_BT.numel() <= self.compiled.max_tokens:
            self._state, logits_BV = self.compiled.draft(hidden_BTD, token_BT, base_B, known_B, self.cache)
            return logits_BV
        T = token_BT.shape[1]
        position_BT = base_B[:, None] + torch.arange(T, device=base_B.device)
        self.cache.reserve([base + T for base in base_B.tolist()])
        rope = self.model.rope_table(int(position_BT.max()) + 1)[position_BT]
        x_BTD = self.module.join(hidden_BTD, F.embedding(token_BT, self.model.embed.weight))
        groups, slot_N = self.cache.row_groups(base_B, T), self.cache.slots_BT(position_BT).flatten()
        x_BTD = layer_step(self.module.layer, self.layer_index, x_BTD, rope, self.cache, groups, slot_N)
        self._state = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), known_B]
        return self.model.head(self.module.norm(self._state)).float()
