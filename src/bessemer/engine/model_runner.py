"""The sequences that decode together: they enter with their prompt's logits, sample a token, and go through the model.

A `step` is `sample` (a token for every sequence), `retire` (finished sequences leave and free their rows at once) and
`advance` (a round of the step backend: the new tokens through the network, and the next ones drawn). Sequences can join
between steps; outputs do not depend on batch composition, because a token depends only on the logits, key and position
of its own sequence.

With drafts a step may append several tokens: a round processes the sampled token together with drafts of what follows,
and those that the main model accepts are appended.

Shapes: B live sequences, T tokens of one pass, V vocabulary, L sparse layers, K experts per token.
"""

from __future__ import annotations

from math import isfinite
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.kept_tokens import ids_of_mask
from bessemer.engine.kv_cache import LatentCache, PromptPages, indices
from bessemer.engine.routing_record import RoutingRecord
from bessemer.engine.sampling import LiveRows, SampledTokens, rules, sample_rows
from bessemer.engine.sequence import Sequence
from bessemer.engine.speculative import drafts_of
from bessemer.engine.steps import Draws, PrefillChunk, Round, RoutingTrace, StepBackend
from bessemer.errors import UserError
from bessemer.probe import float64_home

AnySequence = TypeVar("AnySequence", bound=Sequence)


class ModelRunner(Generic[AnySequence]):
    """Live sequences and their rows in the cache. Row b of every tensor, `sequences` and the cache is one sequence."""

    def __init__(
        self,
        steps: StepBackend,
        tokenizer: Tokenizer,
        cache: LatentCache,
        drafts: int = 0,
        record: RoutingRecord | None = None,
        kept: bool = False,
    ):
        """record: receives the experts of every token fed. kept: every sequence records the tokens that truncation
        kept. Neither goes with drafts."""
        self.steps, self.cache, self.record = steps, cache, record
        cfg, device = steps.model.cfg, steps.model.embed.weight.device
        self.vocab, self._n_experts = tokenizer.vocab_size, cfg.n_routed_experts
        self.drafts = drafts_of(steps.model, drafts, self.vocab)
        self.draws = Draws(self.vocab, kept=kept)
        self.sequences: list[AnySequence] = []
        none_B = torch.zeros(0, dtype=torch.int64, device=device)
        self.rows = LiveRows(none_B, none_B, rules([], float64_home(device)), none_B)
        """Before `sample`, the newest tokens are those that the network has seen."""
        self.logits_BV = torch.zeros(0, cfg.vocab_size, device=device)
        self.sampled = SampledTokens(none_B, self.logits_BV[:, 0], self.logits_BV[:, 0])
        """The next tokens, as far as nothing but the logits decides about them."""
        self._look_at_requests()

    def _look_at_requests(self) -> None:
        """What the requests of the live sequences have in common."""
        self.drafts.limit([True] * len(self.sequences))
        self._drafted = self.drafts.depth * len(self.sequences)
        greedy = all(sequence.request.sampling.temperature == 0 for sequence in self.sequences)
        self.draws = self.draws._replace(greedy=greedy)

    def trace(self) -> RoutingTrace | None:
        """What a pass records its experts in, if anybody wants them."""
        return RoutingTrace(self._n_experts) if self.record is not None else None

    @property
    def lookahead(self) -> int:
        """Slots that a step writes in every row."""
        return self.drafts.depth + 1

    def prefill(self, chunks: list[PrefillChunk]) -> Tensor:
        """`StepBackend.prefill`: the logits after each chunk, [len(chunks), V]."""
        return self.steps.prefill(self.cache, chunks, self.trace())

    def admit(self, prompts: list[tuple[PromptPages, list[AnySequence]]], logits_PV: Tensor) -> None:
        """Adds the sequences of prefilled prompts, with the logits after each prompt."""
        device, rows = logits_PV.device, self.rows
        self.cache.admit([(prompt, len(sequences)) for prompt, sequences in prompts])
        fresh = [sequence for _, sequences in prompts for sequence in sequences]
        source = indices([p for p, (_, sequences) in enumerate(prompts) for _ in sequences], device)
        position_B = indices([len(prompt.ids) for prompt, _ in prompts], device)[source]
        own = LiveRows(
            torch.zeros_like(source), position_B,
            rules([sequence.request.sampling for sequence in fresh], rows.rules_B4.device),
            indices([sequence.request.key for sequence in fresh], device),
        )  # fmt: skip
        self.rows = LiveRows(*map(torch.cat, zip(rows, own, strict=True)))
        self.logits_BV = torch.cat((self.logits_BV, logits_PV[source]))
        self.drafts.admit([prompt for prompt, _ in prompts], source, position_B - 1, fresh)
        self.sequences = self.sequences + fresh
        self.sampled = sample_rows(self.logits_BV, self.vocab, self.rows, self.drafts.rejected, self.draws.kept)
        self._admitted(prompts)
        self._look_at_requests()

    def _admitted(self, prompts: list[tuple[PromptPages, list[AnySequence]]]) -> None:
        """The sequences of these prompts have become rows."""
        if self.record is not None:
            for prompt, sequences in prompts:
                self.record.start([sequence.number for sequence in sequences], torch.cat(prompt.routing))

    def step(self) -> list[AnySequence]:
        """Draws one token for every sequence, more with drafts, and feeds them to the network. Returns the sequences
        that have finished and left."""
        self.sample()
        finished = self.retire()
        if self.sequences:
            self.advance()
            finished += self.retire()
        return finished

    def sample(self) -> None:
        """Appends one token to every sequence. Finished sequences have `finish` set and stay until `retire`."""
        self._before_tokens(self.logits_BV)
        sampled = self.sampled
        kept = [None] * len(self.sequences) if sampled.kept_BV is None else ids_of_mask(sampled.kept_BV.cpu())
        columns = [column.tolist() for column in (sampled.token_B, sampled.logp_B, sampled.raw_logp_B)]
        for sequence, token, logp, raw_logp, ids in zip(self.sequences, *columns, kept, strict=True):
            if not isfinite(logp):
                sequence.finish = "error"
            elif sequence.finish is None:
                sequence.append(token, logp, raw_logp, ids)
        self.rows = self.rows._replace(newest_B=sampled.token_B)

    def retire(self) -> list[AnySequence]:
        """Drops the finished sequences and returns them."""
        finished = [sequence for sequence in self.sequences if sequence.finish is not None]
        if not finished:
            return []
        self.keep([sequence.finish is None for sequence in self.sequences])
        return finished

    def keep(self, live: list[bool]) -> None:
        """Keeps the sequences where `live` is True, and drops the others."""
        source = self.cache.keep(live)
        self.sequences = [self.sequences[b] for b in source]
        index = indices(source, self.logits_BV.device)
        self.rows = self.rows.at(index)
        self.logits_BV = self.logits_BV[index]
        self.sampled = self.sampled.at(index)
        self.drafts.select(index)
        self._look_at_requests()

    def advance(self) -> None:
        """Runs the sampled tokens through the network; with drafts also those that follow them, which may finish some
        sequences."""
        out = self.steps.round(self.rows, self.cache, self.drafts, self.draws, self.trace())
        self.logits_BV, self.sampled = out.last_BV, out.sampled
        if out.expert_BTLK is not None:
            self._report_routes(out, out.expert_BTLK)
        if out.accepted:
            self._append_drafts(out)

    def _append_drafts(self, out: Round) -> None:
        """Appends the accepted drafts to every sequence, up to the one that finishes it."""
        self.drafts.drafted += self._drafted
        for j in range(max(row.known for row in out.accepted)):
            pairs = list(zip(out.accepted, self.sequences, strict=True))
            open_ = [row.known > j and sequence.finish is None for row, sequence in pairs]
            self._before_tokens(out.logits_BTV[:, j], open_)
            for (row, sequence), more in zip(pairs, open_, strict=True):
                if more:
                    sequence.append(row.tokens[j], row.logp[j], row.raw_logp[j])
            self.drafts.accepted += sum(open_)

    def _report_routes(self, out: Round, expert_BTLK: Tensor) -> None:
        if self.record is not None:
            self.record.add_step([sequence.number for sequence in self.sequences], expert_BTLK[:, 0])

    def _before_tokens(self, logits_BV: Tensor, selected: list[bool] | None = None) -> None:
        """The `selected` sequences, by default all, are about to receive a token drawn from these logits."""


def not_finite(rows: int, of: int, token: int) -> UserError:
    return UserError(
        f"the model's logits are not finite for {rows} of {of} rows at generated token {token}: its weights have NaN "
        "or infinity, or overflow in this number format; load an earlier checkpoint or compute in float32"
    )
