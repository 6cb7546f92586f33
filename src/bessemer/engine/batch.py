"""The rows that decode together: they enter with their prompt's logits, draw a token, and go through the network once.

One turn is `draw` (a token for every row), `retire` (what is finished leaves, its place is free at once) and `advance`
(the new tokens through the network). Between turns anybody may `admit` more rows; nobody waits for anybody. What a row
draws depends on its own logits, key and position only, so it is the same in any company.

With a drafter a turn may write several tokens: `advance` takes in the drawn token together with guesses of what
follows, and writes those that the main model accepts.

Shapes: B live rows, T tokens of one pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine import drawing, hf_decode  # noqa: F401 (registers how foreign models decode)
from bessemer.engine.compiled import Compiled, Passed
from bessemer.engine.decode import hidden_step, step
from bessemer.engine.drawing import Refused
from bessemer.engine.kv_cache import Held
from bessemer.engine.routing_trace import Trace
from bessemer.engine.sampling import Peaks, Sampled, inverse_cdf, peaks, stream_key, uniform
from bessemer.engine.sequence import Row
from bessemer.engine.speculative import Drafter, accepted
from bessemer.errors import UserError

GUESS, ACCEPT = (stream_key(number) for number in (1, 2))
"""Turn a row's stream into two further ones."""


class Batch:
    """Rows and their place in the cache. Row b of every tensor, of `rows` and of the cache is the same row."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, cache: Any, trace: Trace | None = None, drafts: int = 0,
        compiled: Compiled | None = None,
    ):  # fmt: skip
        self.model, self.cache, self.trace, self.compiled = model, cache, trace, compiled
        self.vocab = tokenizer.vocab_size
        self.drafter = Drafter(model, cache, drafts, compiled) if drafts else None
        device = model.embed.weight.device
        self.rows: list[Row] = []
        self.key_B = torch.zeros(0, dtype=torch.int64, device=device)
        self.position_B = torch.zeros(0, dtype=torch.int64, device=device)
        """Where each row's next token will stand."""
        self.logits_BV: Tensor | None = None
        self.peaks: Peaks | None = None
        """Their likeliest tokens, [B, 1], where the step has found them already."""
        self.chosen_BLK: Tensor | None = None
        """The experts of each row's last fed token, where they are recorded."""
        self.refused: Refused | None = None

    @property
    def greedy(self) -> bool:
        """Every row takes its likeliest token, whatever it wrote before."""
        return all(row.plain and row.request.sampling.temperature == 0 for row in self.rows)

    @property
    def ahead(self) -> int:
        """Slots that a turn writes in every row."""
        return 1 if self.drafter is None else self.drafter.depth + 1

    def admit(self, prompts: Sequence[tuple[Held, Sequence[Row]]], logits_PV: Tensor) -> None:
        """Rows of prompts that were taken in, with the logits after each prompt."""
        device = logits_PV.device
        self.cache.admit([(held, len(rows)) for held, rows in prompts])
        fresh = [row for _, rows in prompts for row in rows]
        source = torch.tensor([p for p, (_, rows) in enumerate(prompts) for _ in rows], device=device)
        keys = torch.tensor([row.request.key for row in fresh], dtype=torch.int64, device=device)
        positions = torch.tensor([len(held.ids) for held, _ in prompts], device=device)[source]
        self.logits_BV, self.peaks = _joined(self.logits_BV, logits_PV[source]), None
        self.key_B, self.position_B = torch.cat((self.key_B, keys)), torch.cat((self.position_B, positions))
        if self.trace is not None:
            last_PLK = torch.stack([held.routing[-1][-1] for held, _ in prompts])
            self.chosen_BLK = _joined(self.chosen_BLK, last_PLK[source])
        if self.drafter is not None:
            state_PD = torch.stack([held.state for held, _ in prompts])
            self.drafter.admit(state_PD[source], positions - 1)
            zero_V = logits_PV.new_zeros(self.vocab)
            refused_B = torch.tensor([row.q_V is not None for row in fresh], device=device)
            q_BV = torch.stack([zero_V if row.q_V is None else row.q_V for row in fresh])
            n = len(self.rows)
            old = self.refused or Refused(refused_B.new_zeros(n), q_BV.new_zeros(n, self.vocab))
            self.refused = Refused(torch.cat((old.refused_B, refused_B)), torch.cat((old.q_BV, q_BV)))
        for row in fresh:
            row.begin()
            row.q_V = None
        self.rows += fresh

    def draw(self) -> Tensor:
        """One token for every row, [B]. Rows it finishes are marked (`Row.finish`); they stay until `retire`."""
        self._report(self.logits_BV, self.chosen_BLK)
        if self.peaks is not None and self.greedy:
            logp_B = self.peaks.logp_BT[:, 0]
            drawn = Sampled(self.peaks.token_BT[:, 0], logp_B, logp_B)
        else:
            uniform_B = uniform(self.key_B, self.position_B)
            drawn = drawing.draw(self.rows, self.logits_BV, uniform_B, self.vocab, self.refused)
        finite_B = torch.isfinite(drawn.logp_B)
        if not bool(finite_B.all()):
            for b in (~finite_B).nonzero().squeeze(-1).tolist():
                self.rows[b].finish = "error"
        for row, token, logp, raw_logp in zip(self.rows, *(column.tolist() for column in drawn), strict=True):
            if row.finish is None:
                row.write(token, logp, raw_logp)
        return drawn.token_B

    def retire(self, token_B: Tensor | None = None) -> Tensor | None:
        """Drops the finished rows; returns the tokens of those that stay."""
        live = [row.finish is None for row in self.rows]
        if all(live):
            return token_B
        fed = self.position_B.tolist()
        for b, row in enumerate(self.rows):
            if row.finish == "error":
                self.cache.scrub(b)
            elif row.finish is not None:
                self.cache.remember(b, row.ids[: fed[b]])
        source = self.take(live)
        return None if token_B is None else token_B[source]

    def take(self, live: Sequence[bool]) -> Tensor:
        """Keeps these rows. Returns source [B']: new row b is old row source[b]."""
        source = self.cache.keep(torch.tensor(live, device=self.key_B.device))
        self.rows = [self.rows[b] for b in source.tolist()]
        self.key_B, self.position_B = self.key_B[source], self.position_B[source]
        self.chosen_BLK = None if self.chosen_BLK is None else self.chosen_BLK[source]
        self.logits_BV, self.peaks = None if self.logits_BV is None else self.logits_BV[source], None
        self.refused = None if self.refused is None else self.refused.take(source)
        if self.drafter is not None:
            self.drafter.take(source)
        return source

    def leave(self, b: int) -> Row:
        """Sends a row away before it draws; admitted again with all its tokens, it goes on as if it had stayed."""
        row = self.rows[b]
        if self.refused is not None and self.refused.refused_B[b]:
            row.q_V = self.refused.q_BV[b]
        self.take([other != b for other in range(len(self.rows))])
        return row

    def advance(self, token_B: Tensor) -> None:
        """The rows' new tokens through the network; with a drafter, also the guesses that follow them, and some rows
        may be finished afterwards."""
        if self.drafter is not None:
            return self._advance_with_guesses(token_B)
        if self._compiles(token_B):
            passed = self._pass(token_B.unsqueeze(1))
            self.logits_BV, self.peaks = passed.logits_BTV.squeeze(1), passed.peaks
        else:
            self.logits_BV = step(self.model, token_B, self.position_B, self.cache, self.trace)
            self.peaks = None
        self.position_B = self.position_B + 1
        if self.trace is not None:
            self.chosen_BLK = self.trace.take()

    def _advance_with_guesses(self, token_B: Tensor) -> None:
        drafter, depth, greedy = self.drafter, self.drafter.depth, self.greedy
        guesses, q = self._guess(token_B, greedy)
        token_BT = torch.stack((token_B, *guesses), 1)
        state_BTD, logits_BTV, best = self._pass(token_BT)
        chosen_BTLK = None if self.trace is None else self.trace.take().unflatten(0, token_BT.shape)
        if greedy:
            best = best or peaks(logits_BTV, self.vocab)
            taken_BT = (best.token_BT[:, :-1] == token_BT[:, 1:]).tolist()
            logp_BT = best.logp_BT.tolist()
        known = [0] * len(self.rows)
        going = [row.plain for row in self.rows]
        drafter.drafted += depth * sum(going)
        for j in range(depth):
            if greedy:
                going = [on and taken[j] for on, taken in zip(going, taken_BT, strict=True)]
            else:
                p_BV = drawing.shares_of(self.rows, logits_BTV[:, j], self.vocab)
                taken_B = accepted(p_BV, q[j], guesses[j], self._uniform(ACCEPT, j + 1))
                going = [on and taken for on, taken in zip(going, taken_B.tolist(), strict=True)]
            if not any(going):
                break
            self._report(logits_BTV[:, j], None if chosen_BTLK is None else chosen_BTLK[:, j], going)
            if greedy:
                figures = [(logp[j], logp[j]) for logp in logp_BT]
            else:
                drawn = drawing.scores(self.rows, logits_BTV[:, j], guesses[j])
                figures = list(zip(drawn.logp_B.tolist(), drawn.raw_logp_B.tolist(), strict=True))
            for b, (token, (logp, raw_logp)) in enumerate(zip(guesses[j].tolist(), figures, strict=True)):
                if going[b]:
                    self.rows[b].write(token, logp, raw_logp)
                    known[b] += 1
                    going[b] = self.rows[b].finish is None
        drafter.accepted += sum(known)
        known_B, row_B = torch.tensor(known, device=token_B.device), torch.arange(len(known), device=token_B.device)
        drafter.learn(state_BTD, token_BT, self.position_B, known_B)
        self.position_B = self.position_B + 1 + known_B
        self.logits_BV = logits_BTV[row_B, known_B]
        self.chosen_BLK = None if chosen_BTLK is None else chosen_BTLK[row_B, known_B]
        if greedy:
            place_B1 = known_B.unsqueeze(1)
            self.peaks, self.refused = Peaks(*(x_BT.gather(1, place_B1) for x_BT in best)), None
            return
        plain_B = torch.tensor([row.plain for row in self.rows], device=token_B.device)
        self.peaks = None
        self.refused = Refused(plain_B & (known_B < depth), torch.stack(q, 1)[row_B, known_B.clamp(max=depth - 1)])

    def _pass(self, token_BT: Tensor) -> Passed:
        if self._compiles(token_BT):
            return self.compiled(token_BT, self.position_B, self.cache, self.trace)
        state_BTD = self.model.norm(hidden_step(self.model, token_BT, self.position_B, self.cache, self.trace))
        return Passed(state_BTD, self.model.head(state_BTD).float())

    def _compiles(self, tokens: Tensor) -> bool:
        return self.compiled is not None and tokens.numel() <= self.compiled.most_tokens

    def _guess(self, token_B: Tensor, greedy: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The guesses after token_B, [B] each, and what each was drawn from, [B, V]; greedy ones from nothing."""
        guesses, q = [], []
        logits_BV = self.drafter.logits(token_B)
        for j in range(self.drafter.depth):
            if j:
                logits_BV = self.drafter.further(guesses[-1])
            if greedy:
                guesses.append(logits_BV[:, : self.vocab].argmax(-1))
                continue
            q.append(drawing.shares_of(self.rows, logits_BV, self.vocab))
            guesses.append(inverse_cdf(q[-1], self._uniform(GUESS, j + 1)))
        return guesses, q

    def _uniform(self, purpose: int, ahead: int) -> Tensor:
        return uniform(self.key_B ^ purpose, self.position_B + ahead)

    def _report(self, logits_BV: Tensor, chosen_BLK: Tensor | None, of: Sequence[bool] | None = None) -> None:
        """What rows want to know beside the token that is about to be written (only rows where `of` is true)."""
        top = drawing.likeliest(self.rows, logits_BV, self.vocab)
        routes = None
        if any(row.request.routing for row in self.rows):
            routes = chosen_BLK.tolist()
        for b, row in enumerate(self.rows) if top or routes else ():
            if of is None or of[b]:
                if row.request.top:
                    row.top.append(top[b])
                if row.request.routing:
                    row.routes.append(tuple(map(tuple, routes[b])))


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat((old, new))


def not_finite(rows: int, of: int, token: int) -> UserError:
    return UserError(
        f"the model's logits are not finite for {rows} of {of} rows at generated token {token}: its weights hold NaN "
        "or infinity or overflow in this number format; load an earlier checkpoint or compute in float32"
    )
