"""Speculative decoding with the MTP module (V3 2.2, 5.4.3; reference H.3): it drafts, the main model verifies.

Each turn the module guesses the tokens after the newest one, and the main model takes in all of them in one pass: its
logits after each say which guesses it would have drawn itself. A guess x drawn from q is taken with probability
min(1, p(x) / q(x)); at the first one refused the next token is drawn from (p - q)+. So what is written is distributed
as without guesses, and greedy decoding writes the same tokens.

The module reads, at position i, the main model's hidden state there and the token at i + 1; its keys lie in the cache
as one more layer. One module serves every depth: for the second guess it reads its own output in the place of a hidden
state it cannot have yet. The slots that this leaves wrong are written again, from true states, before they are read:
every turn begins with all positions that the last pass made known. (Of a prompt's remembered beginning the last slot
may belong to another continuation. That can cost a guess, never a token.)

Shapes: B rows, T = depth + 1 tokens of a pass, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.compiled import DEEPEST, Compiled
from bessemer.engine.decode import layer_step
from bessemer.engine.kv_cache import LatentCache
from bessemer.engine.sampling import Sampling, truncate
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer


def check_drafts(model: Any, depth: int) -> int:
    """The number of guesses per turn; UserError where the model cannot make any."""
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= DEEPEST:
        raise UserError(f"drafts must be a whole number from 0 to {DEEPEST}, is {depth!r}")
    if depth and not (isinstance(model, Transformer) and len(model.mtp)):
        raise UserError("drafts need the model's MTP module, and this model has none (or was loaded without it)")
    return depth


class Drafter:
    """The module with what it knows of every live row."""

    def __init__(self, model: Transformer, cache: LatentCache, depth: int, compiled: Compiled | None = None):
        self.model, self.cache, self.depth, self.compiled = model, cache, depth, compiled
        self.module, self.place = model.mtp[0], model.cfg.n_layers
        weight = model.embed.weight
        self.hidden_BTD = weight.new_zeros(0, depth + 1, model.cfg.dim)
        """The main model's states at base, base + 1, ...; the last known one is number `known`, what follows is not."""
        self.token_BT = torch.zeros(0, depth + 1, dtype=torch.int64, device=weight.device)
        """The tokens one position further on; the newest, drawn after the last known state, is yet to come."""
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

    def take(self, source_B: Tensor) -> None:
        """Row b is now what row source_B[b] was."""
        self.hidden_BTD, self.token_BT = self.hidden_BTD[source_B], self.token_BT[source_B]
        self.base_B, self.known_B = self.base_B[source_B], self.known_B[source_B]

    def learn(self, hidden_BTD: Tensor, token_BT: Tensor, base_B: Tensor, known_B: Tensor) -> None:
        """A pass over token_BT, the first at base_B, left these states; of its guesses known_B were right."""
        self.hidden_BTD, self.base_B, self.known_B = hidden_BTD, base_B, known_B
        self.token_BT = torch.cat((token_BT[:, 1:], token_BT[:, :1]), 1)

    def logits(self, token_B: Tensor) -> Tensor:
        """What the module expects after the newest token, [B, V], float32; takes in all that is known before."""
        row_B = torch.arange(len(token_B), device=token_B.device)
        self.token_BT[row_B, self.known_B] = token_B
        self._position = self.base_B + self.known_B
        return self._pass(self.hidden_BTD, self.token_BT, self.base_B, self.known_B)

    def further(self, guess_B: Tensor) -> Tensor:
        """What it expects after its own guess."""
        self._position = self._position + 1
        state_BD = self.module.norm(self._state)
        return self._pass(state_BD.unsqueeze(1), guess_B.unsqueeze(1), self._position, torch.zeros_like(guess_B))

    def _pass(self, hidden_BTD: Tensor, token_BT: Tensor, base_B: Tensor, known_B: Tensor) -> Tensor:
        """Logits after place known_B of the T that the module takes in; its state there stays in `_state`."""
        if self.compiled is not None and token_BT.numel() <= self.compiled.most_tokens:
            self._state, logits_BV = self.compiled.guess(hidden_BTD, token_BT, base_B, known_B, self.cache)
            return logits_BV
        T = token_BT.shape[1]
        position_BT = base_B[:, None] + torch.arange(T, device=base_B.device)
        self.cache.reserve([base + T for base in base_B.tolist()])
        rope = self.model.rope_table(int(position_BT.max()) + 1)[position_BT]
        x_BTD = self.module.join(hidden_BTD, F.embedding(token_BT, self.model.embed.weight))
        blocks, slot_N = self.cache.blocks(base_B, T), self.cache.slots_BT(position_BT).flatten()
        x_BTD = layer_step(self.module.layer, self.place, x_BTD, rope, self.cache, blocks, slot_N)
        self._state = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), known_B]
        return self.model.head(self.module.norm(self._state)).float()


def shares(logits_BV: Tensor, sampling: Sampling, vocab: int) -> Tensor:
    """The probabilities that a token is drawn with, cuts included, [B, V]; ids from `vocab` on have none."""
    logits_BV = logits_BV[:, :vocab]
    if sampling.temperature == 0:
        return F.one_hot(logits_BV.argmax(-1), vocab).to(logits_BV.dtype)
    p_BV = truncate((logits_BV / sampling.temperature).softmax(-1), sampling)
    return p_BV / p_BV.sum(-1, keepdim=True)


def accepted(p_BV: Tensor, q_BV: Tensor, guess_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Whether each guess is taken: with probability min(1, p / q)."""
    p_B, q_B = (x_BV.gather(-1, guess_B[:, None]).squeeze(-1).double() for x_BV in (p_BV, q_BV))
    return uniform_B * q_B < p_B


def rest(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """(p - q)+, what a token is drawn from after a guess was refused; p itself where nothing is left."""
    left_BV = (p_BV - q_BV).clamp_(min=0.0)
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BV)
