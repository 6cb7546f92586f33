"""`ModelRunner` with static steps (`static_steps`), where the host runs one token behind the device.

The device samples every row's next token right after feeding the last one, and continues with it. `sample` requests a
copy of those tokens, starts the next step, and only then waits for the copy: the device computes while the host appends
tokens and looks for stops. A row that has ended is fed one token too many, into a slot of its own; the output is
dropped with the row.

With drafts, a step also decides which to accept (`static_drafts`), and the copy includes them: `sample` appends the
accepted drafts of the last step and the token after them. The host learns how far a row has advanced one step late, so
pages are reserved as if all drafts were accepted. As elsewhere, a sequence is preempted between its accepted drafts and
the token after them: `settle` reads the drafts first.

If a token depends on more than its logits (a penalty, a grammar, a thinking budget), or the host reports more than
tokens (the most likely ones, routes), the host goes first: a step starts once `ModelRunner.sample` has chosen.

Shapes: B live rows, T tokens of a pass, V vocabulary, L sparse layers, K experts per token.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine import row_sampling, static_drafts
from bessemer.engine.decode import RoutingTrace
from bessemer.engine.kept_tokens import ids_of_words, words
from bessemer.engine.kv_cache import LatentCache, PromptPages
from bessemer.engine.model_runner import ModelRunner
from bessemer.engine.row_sampling import form_of
from bessemer.engine.sampling import RejectedDrafts
from bessemer.engine.sequence import Sequence
from bessemer.engine.static_steps import StepRows, Steps, ahead
from bessemer.engine.transfer import Fetch


class DeviceRunner(ModelRunner):
    """`token_B` and `sampled_B3` hold the next token of every sequence, which the host has not seen yet."""

    def __init__(
        self,
        steps: Steps,
        tokenizer: Tokenizer,
        cache: LatentCache,
        trace: RoutingTrace | None = None,
        trace_all: bool = True,
        kept: bool = False,
    ):
        self.depth = 0 if steps.drafts is None else steps.drafts.depth
        super().__init__(steps.model, tokenizer, cache, trace, self.depth, trace_all=trace_all, kept=kept)
        self.kernels, self.steps = None, steps
        self.sampled_B3 = steps.sampled_R3[:0]
        self.kept_BW = steps.token_R.new_zeros(0, words(self.vocab)) if kept else None
        """Bit masks of the tokens that each of `token_B` was drawn from, if they are recorded."""
        self._moved = True
        """Whether the rows have changed since the last step."""
        self._started = False
        """Whether `sample` has already started the step that `advance` would start."""
        self._settled: list[list[float]] | None = None
        """After `settle`: the rows of `sampled_B3`, whose drafts are appended and whose next tokens are not."""
        self._seen: tuple[Tensor, Tensor | None] | None = None
        """Logits [B, T, V] and experts [B, T, L, K] of the last step, if they are reported."""

    def _look_at_requests(self) -> None:
        super()._look_at_requests()
        self._form = form_of(sequence.request.sampling for sequence in self.sequences)._replace(kept=self.kept)
        self._host_first = not self._by_logits or self._top or self._routing

    @property
    def lookahead(self) -> int:
        return 1 + ahead(self.depth)

    def positions(self) -> list[int]:
        return [len(sequence.request.prompt) + len(sequence.tokens) for sequence in self.sequences]

    def _fed(self) -> list[int]:
        return [position - 1 for position in self.positions()]

    def admit(self, prompts: list[tuple[PromptPages, list[Sequence]]], logits_PV: Tensor) -> None:
        n = len(self.sequences)
        super().admit(prompts, logits_PV)
        assert self.logits_BV is not None
        rejected = self.rejected
        if rejected is not None:
            rejected = RejectedDrafts(rejected.rejected_B[n:], rejected.q_BV[n:])
        kept_BW = None if self.kept_BW is None else self.kept_BW.new_zeros(len(self.sequences) - n, words(self.vocab))
        fresh_B3 = row_sampling.sample(
            self.logits_BV[n:], self.vocab, self.rules_B4[n:], self.key_B[n:], self.position_B[n:], self._form,
            rejected, kept_BW,
        )  # fmt: skip
        if self.kept_BW is not None and kept_BW is not None:
            self.kept_BW = torch.cat((self.kept_BW, kept_BW))
        fresh_B = fresh_B3[:, 0].long()
        self.token_B = fresh_B if self.token_B is None else torch.cat((self.token_B, fresh_B))
        if self.depth:
            rest = fresh_B3.new_full((len(fresh_B3), self.sampled_B3.shape[1] - 3), static_drafts.FRESH)
            fresh_B3 = torch.cat((fresh_B3, rest), 1)
        self.sampled_B3 = torch.cat((self.sampled_B3, fresh_B3))
        if self._seen is not None:
            logits_BTV, expert_BTLK = self._seen
            experts = None if expert_BTLK is None else _padded(expert_BTLK, len(fresh_B3))
            self._seen = _padded(logits_BTV, len(fresh_B3)), experts
        self._moved = True

    def settle(self) -> bool:
        if not self.depth or self._settled is not None or not self.sequences:
            return False
        self._settled = Fetch(self.sampled_B3).read()
        self._append_accepted(self._settled)
        return True

    def sample(self) -> None:
        if self._host_first:
            self._sample_by_host()
            self._moved, self._started = True, False
            return
        fetch = Fetch(self.sampled_B3) if self._settled is None else None
        kept = None if self.kept_BW is None else Fetch(self.kept_BW)
        self._start_step([position + self.lookahead for position in self.positions()])
        self._started = True
        self._append(None if fetch is None else fetch.read(), None if kept is None else ids_of_words(kept.tensor()))

    def _append(self, rows: list[list[float]] | None, kept: list[list[int]] | None = None) -> None:
        """Appends every sequence's next token after its accepted drafts. rows None: the drafts are already appended."""
        if rows is None:
            assert self._settled is not None
            rows = self._settled
        elif self.depth:
            self._append_accepted(rows)
        self._settled = None
        each = [None] * len(rows) if kept is None else kept
        for sequence, (token, logp, raw_logp, *_), ids in zip(self.sequences, rows, each, strict=True):
            if sequence.finish is not None:
                continue
            if isfinite(logp):
                sequence.append(int(token), logp, raw_logp, ids)
            else:
                sequence.finish = "error"

    def _append_accepted(self, rows: list[list[float]]) -> None:
        """Appends the accepted drafts of the last step."""
        logits_BTV, expert_BTLK = (None, None) if self._seen is None else self._seen
        self._append_drafts([static_drafts.accepted(row[3:]) for row in rows], logits_BTV, expert_BTLK)

    def _sample_by_host(self) -> None:
        """`ModelRunner.sample` with one wait, which also covers accepted drafts; if top tokens or routes are reported,
        the drafts are settled first."""
        if not self.depth:
            return super().sample()
        if self._top or self._routing:
            self.settle()
        assert self.logits_BV is not None
        self._record(self.logits_BV, self.expert_BLK, [sequence.finish is None for sequence in self.sequences])
        sampled = self._choose(self.logits_BV)
        sampled_B3 = torch.stack([column.double() for column in sampled[:3]], -1)
        if self._settled is None:
            self._append(Fetch(torch.cat((sampled_B3, self.sampled_B3[:, 3:]), 1)).read())
        else:
            self._settled = Fetch(sampled_B3).read()
            self._append(None)
        self.token_B = sampled.token_B

    def advance(self) -> None:
        if not self._started:
            self._start_step([fed + 1 + self.depth for fed in self._fed()])
        self._started = False

    def keep(self, live: list[bool]) -> None:
        if self._settled is not None:
            self._settled = [row for row, stays in zip(self._settled, live, strict=True) if stays] or None
        super().keep(live)

    def _select(self, source: Tensor) -> None:
        super()._select(source)
        self.sampled_B3 = self.sampled_B3[source]
        self.kept_BW = None if self.kept_BW is None else self.kept_BW[source]
        if self._seen is not None:
            logits_BTV, expert_BTLK = self._seen
            self._seen = logits_BTV[source], None if expert_BTLK is None else expert_BTLK[source]
        self._moved = True

    def _start_step(self, lengths: list[int]) -> None:
        """Feeds `token_B`, in rows of at most these lengths; afterwards the tensors by row are views of the buffers."""
        n, steps, drafter = len(self.sequences), self.steps, self.drafter
        self.cache.reserve(lengths)
        if self._moved:
            assert self.token_B is not None
            steps.load(StepRows(self.token_B, self.position_B, self.key_B, self.rules_B4))
            if steps.drafts is not None and drafter is not None:
                steps.drafts.load(drafter, self._most_B)
            self._moved = False
        record = self._tracer is not None
        steps.run(n, self._form, record)
        self.token_B, self.position_B = steps.token_R[:n], steps.position_R[:n]
        self.sampled_B3, self.logits_BV = steps.sampled_R3[:n], steps.logits_RV[:n]
        self.kept_BW = None if not self.kept or steps.kept_RW is None else steps.kept_RW[:n]
        self.expert_BLK = None if not record or steps.expert_RLK is None else steps.expert_RLK[:n]
        if steps.drafts is not None and drafter is not None:
            self.rejected, self._seen = steps.drafts.show(drafter, n), None
            if self._top or self._routing:
                experts = steps.drafts.expert_RTLK if record else None
                self._seen = steps.drafts.logits_RTV[:n], None if experts is None else experts[:n]


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with `rows` rows of zeros appended."""
    return torch.cat((tensor, tensor.new_zeros(rows, *tensor.shape[1:])))
