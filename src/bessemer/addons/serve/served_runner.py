"""What a server's rows do beside decoding: they bring controls, report likely tokens and experts, leave their pages to
later prompts, and may be preempted."""

from __future__ import annotations

from torch import Tensor

from bessemer.addons.serve.prefix_cache import PrefixCache
from bessemer.addons.serve.requests import Control, Controls, ServedRequest, ServedSequence, TopTokens
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.kv_cache import PAGE, PromptPages, indices
from bessemer.engine.model_runner import ModelRunner
from bessemer.engine.sampling import SampledTokens, sample_rows
from bessemer.engine.steps import PrefillChunk, Round, RoutingTrace, StepBackend


class ServedRunner(ModelRunner[ServedSequence]):
    cache: PrefixCache
    """Or one like it, of another family's model."""

    def __init__(self, steps: StepBackend, tokenizer: Tokenizer, cache: PrefixCache, drafts: int = 0) -> None:
        self.controls: Controls | None = None
        """Brought by the first request with a control."""
        self._tokenizer = tokenizer
        super().__init__(steps, tokenizer, cache, drafts)

    def _look_at_requests(self) -> None:
        """What the requests of the live sequences have in common."""
        super()._look_at_requests()
        requests = [sequence.request for sequence in self.sequences]
        if self.controls is not None:
            self.controls.follow(self.sequences)
        free = [sequence.control is None for sequence in self.sequences]
        self.drafts.limit(free)
        self._drafted = self.drafts.depth * sum(free)
        self.draws = self.draws._replace(greedy=self.draws.greedy and all(free))
        self._top = any(request.top for request in requests)
        self._routing = any(request.routing for request in requests)

    def control_of(self, request: ServedRequest) -> Control | None:
        """The control of a request's sequence. The first request with one brings the controls of all."""
        if request.control is None:
            return None
        if self.controls is None:
            self.controls = request.control.controls(self._tokenizer, self.steps.model)
        return self.controls.of(request)

    def trace(self) -> RoutingTrace | None:
        return RoutingTrace(self._n_experts) if self._routing else None

    def prefill(self, chunks: list[PrefillChunk], routing: bool = False) -> Tensor:
        """routing: prompts record experts."""
        return self.steps.prefill(self.cache, chunks, RoutingTrace(self._n_experts) if routing else None)

    def _admitted(self, prompts: list[tuple[PromptPages, list[ServedSequence]]]) -> None:
        for prompt, sequences in prompts:
            for sequence in sequences:
                sequence.page_keys = list(prompt.keys)
                sequence.shared = prompt.full_pages * PAGE if len(sequences) > 1 else 0
                if sequence.request.routing and len(sequence.routes) == len(sequence.tokens):
                    sequence.add_routes(prompt.routing[-1][-1:])
                if sequence.control is not None:
                    sequence.control.start(sequence)

    def sample(self) -> None:
        if self.controls is not None and (bound := self.controls.bound()):
            self._choose_bound(self.controls, bound, self.sampled)
        super().sample()

    def _choose_bound(self, controls: Controls, bound: list[int], sampled: SampledTokens) -> None:
        """Replaces the tokens of the rows that are not free to follow their logits; the others cost nothing more."""
        index = indices(bound, self.logits_BV.device)
        first, last = bound[0], bound[-1]
        one_after_another = bound == list(range(first, last + 1))
        own_BV = self.logits_BV[first : last + 1] if one_after_another else self.logits_BV[index]
        changed_BV = own_BV.clone()
        controls.change([self.sequences[b] for b in bound], changed_BV, self.vocab)
        chosen = sample_rows(changed_BV, self.vocab, self.rows.at(index), scored_BV=own_BV)
        for column, values in zip(sampled[:3], chosen[:3], strict=True):
            column[index] = values

    def retire(self) -> list[ServedSequence]:
        if any(sequence.finish is not None for sequence in self.sequences):
            self._leave_pages()
        return super().retire()

    def _leave_pages(self) -> None:
        """Later prompts may begin with the full pages of the sequences that have finished."""
        position_B = self.positions()
        for b, sequence in enumerate(self.sequences):
            if sequence.finish == "error":
                self.cache.scrub(b)
            elif sequence.finish is not None:
                # the last pass left keys of drafts in the modules' layers, which its next step would have overwritten
                self.cache.cache_row(b, sequence.ids, position_B[b] + 1 - self.lookahead, sequence.page_keys)

    def positions(self) -> list[int]:
        """The position of every sequence's next token."""
        position: list[int] = self.rows.position_B.tolist()
        return position

    def preempt(self, b: int) -> ServedSequence:
        """Removes a sequence before it samples; admitted again with all its tokens, it continues unchanged. Its pages
        stay available to it until others need them."""
        sequence, rejected = self.sequences[b], self.drafts.rejected
        self.cache.cache_row(b, sequence.ids, self.positions()[b] + 1 - self.lookahead, sequence.page_keys)
        if rejected is not None and rejected.rejected_B[b]:
            sequence.rejected_q_V = rejected.q_BV[b].clone()
        self.keep([other != b for other in range(len(self.sequences))])
        return sequence

    def _report_routes(self, out: Round, expert_BTLK: Tensor) -> None:
        for b, sequence in enumerate(self.sequences) if self._routing else ():
            if sequence.request.routing:
                known = out.accepted[b].known if out.accepted else 0
                sequence.add_routes(expert_BTLK[b, : known + 1])

    def _before_tokens(self, logits_BV: Tensor, selected: list[bool] | None = None) -> None:
        """Stores the requested top tokens of the token about to be appended, for `selected` sequences."""
        if not self._top:
            return
        tops = top_tokens(self.sequences, logits_BV, self.vocab) or []
        for b, (sequence, top) in enumerate(zip(self.sequences, tops, strict=True)):
            if sequence.request.top and (selected is None or selected[b]):
                sequence.top.append(top)


def top_tokens(sequences: list[ServedSequence], logits_BV: Tensor, vocab: int) -> list[TopTokens] | None:
    """The most likely tokens for every sequence that requests them; None if none does."""
    rows = [b for b, sequence in enumerate(sequences) if sequence.request.top]
    if not rows:
        return None
    most = max(sequences[b].request.top for b in rows)
    own_BV = logits_BV if len(rows) == len(sequences) else logits_BV[indices(rows, logits_BV.device)]
    best = own_BV.log_softmax(-1)[:, :vocab].topk(min(most, vocab), -1)
    tops: list[TopTokens] = [()] * len(sequences)
    for b, ids, values in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True):
        tops[b] = tuple(zip(ids, values, strict=True))[: sequences[b].request.top]
    return tops
