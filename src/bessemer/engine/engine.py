"""`Engine`: the one way to turn prompts into completions. RL rollouts, evaluation, `generate` and chat all call it.

Rows (samples) run in static batches, with one prefill per distinct prompt of a batch (prompts are cut apart only where
one alone asks for more samples than fit). Results do not depend on the batching: every sample has its own random
stream, named by the seed, the prompt's tokens and the sample's number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.batch import Batch, not_finite
from bessemer.engine.compiled import Compiled
from bessemer.engine.decode import new_cache
from bessemer.engine.prefill import take_in
from bessemer.engine.request import Request
from bessemer.engine.routing_trace import Record, Trace
from bessemer.engine.sampling import Sampling, stream_key
from bessemer.engine.sequence import Row
from bessemer.engine.speculative import check_drafts
from bessemer.engine.stop import StopStrings, check_strings, cut
from bessemer.errors import UserError
from bessemer.model.mode import evaluating
from bessemer.model.transformer import Transformer
from bessemer.workers import Workers

Prompt = str | Sequence[int]
OnTokens = Callable[[list[tuple[int, int, int]]], None]


@dataclass(frozen=True)
class Completion:
    """One sample."""

    tokens: list[int]
    """Generated ids, the stop id included."""
    text: str
    """Decoded without control tokens, up to the stop string if one ended it."""
    logprobs: list[float]
    """Of each token under softmax(logits / temperature), uncut, as the trainer computes it; 0 counts as 1."""
    raw_logprobs: list[float]
    """The same at temperature 1."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    routing: Tensor | None = field(default=None, compare=False, repr=False)
    """Experts that every token chose in every sparse layer, [prompt_tokens + len(tokens) - 1, L, K], uint8 or int16:
    the last token was drawn and never fed, so it chose none. None unless asked for."""


@dataclass(frozen=True)
class _Sample:
    """One sample to be generated."""

    prompt: int
    """Index into the caller's prompts."""
    sample: int
    request: Request


@dataclass(frozen=True)
class Call:
    """Samples that are generated together, whichever process does it."""

    samples: list[_Sample]
    strings: list[str]
    on_tokens: OnTokens | None
    record_routing: bool
    drafts: int


@dataclass(frozen=True)
class Plan:
    """What was asked, cut into calls."""

    calls: list[Call]
    prompts: int
    samples: int

    def answers(self, found: Iterable[list[Completion]]) -> list[list[Completion]]:
        """`samples` completions of each prompt, in order, from those of each call, in order."""
        results: list[list[Completion | None]] = [[None] * self.samples for _ in range(self.prompts)]
        for call, completions in zip(self.calls, found, strict=True):
            for sample, completion in zip(call.samples, completions, strict=True):
                results[sample.prompt][sample.sample] = completion
        return results


class Engine:
    """Generates with a model and its tokenizer. No state outlives a call, so the model may be trained in between."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, workers: Workers | None = None, compile: bool = False):
        """compile: decoding steps go through torch.compile (`compiled`)."""
        if tokenizer.vocab_size > model.cfg.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.cfg.vocab_size}; they do "
                "not belong together: load both from one directory"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.compiled = Compiled(model, tokenizer.vocab_size) if compile else None
        self.workers = workers or Workers(1)
        """Processes that run batches side by side; their number does not change the result."""

    def generate(
        self, prompts: Sequence[Prompt], *, on_tokens: OnTokens | None = None, **asked: Any
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, in order; `plan` says what may be asked.

        on_tokens is called after each step with (prompt index, sample, token) of every row that is still running.
        """
        plan = self.plan(prompts, on_tokens=on_tokens, **asked)
        side_by_side = self.workers.map if on_tokens is None else map
        return plan.answers(side_by_side(self.run, plan.calls))

    def plan(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = None,
        batch_rows: int = 512,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
        record_routing: bool = False,
        drafts: int = 0,
    ) -> Plan:
        """Calls of at most `batch_rows` samples; `run` carries out one, here or in another process with these weights.

        A prompt is text (a document's beginning: BOS is put in front) or ids, taken as they are. stop_ids None is what
        the tokenizer ends a text or an answer with. A row also ends at the model's max_seq_len. Sample k of a prompt is
        the same whatever else is in the call; when a prompt occurs twice, the second continues the first one's
        numbering. `seeds`, one per prompt, replaces seed and prompt as the name of the streams: sample k is then a
        function of (seeds[p], k).
        record_routing fills `Completion.routing`; it changes nothing else.
        drafts: so many tokens are guessed by the MTP module each turn (`speculate`). Greedy answers stay the same;
        sampled ones are drawn from the same distribution by other numbers. Worth it for few rows.
        """
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
        for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_rows", batch_rows)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, is {value!r}")
        if record_routing and all(layer.dense for layer in self.model.layers):
            raise UserError("record_routing: no layer of this model has routed experts; leave it off")
        if check_drafts(self.model, drafts) and record_routing:
            raise UserError("record_routing and drafts do not go together; leave one of them off")
        strings = check_strings(stop_strings)
        stop_ids = tuple(self.tokenizer.stop_ids if stop_ids is None else stop_ids)
        longest = self.model.cfg.max_seq_len

        def request(ids: tuple[int, ...], key: int) -> Request:
            room = min(max_new_tokens, longest - len(ids))
            return Request(ids, key, room, sampling, stop_ids, tuple(strings))

        wanted = self._samples(self._encode(prompts), samples, seed, seeds, request)
        calls = [Call(part, strings, on_tokens, record_routing, drafts) for part in _batches(wanted, batch_rows)]
        return Plan(calls, len(prompts), samples)

    def _encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list; write [{prompts[:20]!r}]")
        texts = iter(self.tokenizer.encode_batch([p for p in prompts if isinstance(p, str)]))
        begin = () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,)
        found = [(*begin, *next(texts)) if isinstance(p, str) else tuple(int(i) for i in p) for p in prompts]
        for number, ids in enumerate(found):
            self.check_prompt(ids, f"prompt {number}")
        return found

    def check_prompt(self, ids: Sequence[int], name: str = "the prompt") -> None:
        """UserError for a prompt that cannot be answered."""
        longest, vocab = self.model.cfg.max_seq_len, self.model.cfg.vocab_size
        if not ids:
            raise UserError(f"{name} is empty; give at least the tokenizer's bos_id")
        if len(ids) >= longest:
            raise UserError(
                f"{name} has {len(ids)} tokens; the model's max_seq_len {longest} leaves no room for an answer. "
                "Shorten the prompt"
            )
        if not 0 <= min(ids) <= max(ids) < vocab:
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise UserError(f"{name} holds token id {bad}, outside the model's vocabulary of {vocab}")

    def _samples(
        self,
        encoded: list[tuple[int, ...]],
        samples: int,
        seed: int,
        seeds: Sequence[int] | None,
        request: Callable[[tuple[int, ...], int], Request],
    ) -> list[_Sample]:
        """All samples, equal prompts side by side and prompts of like length near each other."""
        if seeds is not None and len(seeds) != len(encoded):
            raise UserError(f"seeds has {len(seeds)} entries for {len(encoded)} prompts; give one per prompt")
        wanted, seen = [], {}
        for p, ids in enumerate(encoded):
            first = 0 if seeds is not None else seen.get(ids, 0)
            seen[ids] = first + samples
            name = (seeds[p],) if seeds is not None else (seed, digest(ids))
            wanted += [_Sample(p, k, request(ids, stream_key(*name, first + k))) for k in range(samples)]
        return sorted(wanted, key=lambda sample: (len(sample.request.prompt), sample.request.prompt))

    def run(self, call: Call) -> list[Completion]:
        """One completion of each of its samples."""
        stop = StopStrings(self.tokenizer, call.strings) if call.strings else None
        rows = [Row(sample.request, number, stop) for number, sample in enumerate(call.samples)]
        by_prompt = {ids: list(same) for ids, same in groupby(rows, key=lambda row: row.request.prompt)}
        trace, record = (Trace(self.model.cfg), Record()) if call.record_routing else (None, None)
        with evaluating(self.model), torch.inference_mode():
            cache = new_cache(self.model, drafts=call.drafts > 0)
            batch = Batch(self.model, self.tokenizer, cache, trace, call.drafts, self.compiled)
            prompts = [cache.open(ids) for ids in by_prompt]
            logits_PV = torch.stack(take_in(self.model, cache, prompts, trace))
            batch.admit(list(zip(prompts, by_prompt.values(), strict=True)), logits_PV)
            while batch.rows:
                token_B = batch.draw()
                if bad := [row for row in batch.rows if row.finish == "error"]:
                    raise not_finite(len(bad), len(batch.rows), len(bad[0].tokens) + 1)
                _tell(call, batch.rows)
                token_B = batch.retire(token_B)
                if batch.rows:
                    batch.advance(token_B)
                    if record is not None:
                        record.step([row.number for row in batch.rows], batch.chosen_BLK)
                    if call.drafts:
                        _tell(call, batch.rows)
                        batch.retire()
        routing = [None] * len(rows)
        if record is not None:
            said = {held.ids: torch.cat(held.routing) for held in prompts}
            routing = record.rows([said[row.request.prompt] for row in rows])
        return [self._completion(*both) for both in zip(rows, routing, strict=True)]

    def _completion(self, row: Row, routing: Tensor | None) -> Completion:
        text, strings = self.tokenizer.decode(row.tokens), row.request.stop_strings
        return Completion(
            tokens=row.tokens,
            text=cut(text, strings) if strings else text,
            logprobs=row.logp,
            raw_logprobs=row.raw_logp,
            finish_reason="stop" if row.finish == "stop" else "length",
            prompt_tokens=len(row.request.prompt),
            routing=routing,
        )


def _tell(call: Call, rows: Sequence[Row]) -> None:
    """What was written since the last time, to who wants to know."""
    if call.on_tokens is None:
        return
    at = [(call.samples[row.number], row) for row in rows]
    call.on_tokens([(s.prompt, s.sample, token) for s, row in at for token in row.tokens[row.said :]])
    for row in rows:
        row.said = len(row.tokens)


def _batches(wanted: list[_Sample], batch_rows: int) -> Iterator[list[_Sample]]:
    """Batches of at most batch_rows; the samples of one prompt stay together where they fit into a batch."""
    batch: list[_Sample] = []
    for _, group in groupby(wanted, key=lambda sample: sample.request.prompt):
        same = list(group)
        if batch and len(batch) + len(same) > batch_rows:
            yield batch
            batch = []
        for sample in same:
            if len(batch) == batch_rows:
                yield batch
                batch = []
            batch.append(sample)
    if batch:
        yield batch


def digest(ids: Sequence[int]) -> int:
    """64 bits of a prompt's ids, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(tuple(ids)).encode(), digest_size=8).digest(), "little")
