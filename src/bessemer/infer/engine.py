"""`Engine`: the one way to turn prompts into completions. RL rollouts, evaluation, `generate` and chat all call it.

Rows (samples) run in static batches, with one prefill per distinct prompt of a batch (prompts are cut apart only where
one alone asks for more samples than fit). Results do not depend on the batching: every sample has its own random
stream, named by the seed, the prompt's tokens and the sample's number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.infer import loop
from bessemer.infer.sampling import Sampling, stream_key
from bessemer.infer.stop import StopStrings, check_strings, cut
from bessemer.infer.trace import Trace
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
class _Row:
    """One sample to be generated."""

    prompt: int
    """Index into the caller's prompts."""
    sample: int
    ids: tuple[int, ...]
    key: int


@dataclass(frozen=True)
class _Call:
    """One batch with how to sample it."""

    rows: list[_Row]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: Sequence[int]
    stop_strings: list[str]
    on_tokens: OnTokens | None
    record_routing: bool


class Engine:
    """Generates with a model and its tokenizer. No state outlives a call, so the model may be trained in between."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, workers: Workers | None = None):
        if tokenizer.vocab_size > model.cfg.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.cfg.vocab_size}; they do "
                "not belong together: load both from one directory"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.workers = workers or Workers(1)
        """Processes that run batches side by side; their number does not change the result."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = None,
        batch_rows: int = 512,
        seeds: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
        record_routing: bool = False,
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, in order.

        A prompt is text (a document's beginning: BOS is put in front) or ids, taken as they are. stop_ids None is what
        the tokenizer ends a text or an answer with. A row also ends at the model's max_seq_len. Sample k of a prompt is
        the same whatever else is in the call; when a prompt occurs twice, the second continues the first one's
        numbering. `seeds`, one per prompt, replaces seed and prompt as the name of the streams: sample k is then a
        function of (seeds[p], k).
        on_tokens is called after each step with (prompt index, sample, token) of every row that is still running.
        record_routing fills `Completion.routing`; it changes nothing else.
        """
        sampling = Sampling(temperature, top_p, top_k, min_p)
        for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("batch_rows", batch_rows)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, is {value!r}")
        if record_routing and all(layer.dense for layer in self.model.layers):
            raise UserError("record_routing: no layer of this model has routed experts; leave it off")
        strings = check_strings(stop_strings)
        stop_ids = list(self.tokenizer.stop_ids if stop_ids is None else stop_ids)
        rows = self._rows(self._encode(prompts), samples, seed, seeds)
        results: list[list[Completion | None]] = [[None] * samples for _ in prompts]
        side_by_side = self.workers.map if on_tokens is None else map
        calls = (
            _Call(batch, max_new_tokens, sampling, stop_ids, strings, on_tokens, record_routing)
            for batch in _batches(rows, batch_rows)
        )
        for batch, written in side_by_side(self._run, calls):
            for i, row in enumerate(batch):
                results[row.prompt][row.sample] = self._completion(row, written, i, strings)
        return results

    def _encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list; write [{prompts[:20]!r}]")
        texts = iter(self.tokenizer.encode_batch([p for p in prompts if isinstance(p, str)]))
        begin = () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,)
        found = [(*begin, *next(texts)) if isinstance(p, str) else tuple(int(i) for i in p) for p in prompts]
        longest, vocab = self.model.cfg.max_seq_len, self.model.cfg.vocab_size
        for number, ids in enumerate(found):
            if not ids:
                raise UserError(f"prompt {number} is empty; give at least the tokenizer's bos_id")
            if len(ids) >= longest:
                raise UserError(
                    f"prompt {number} has {len(ids)} tokens; the model's max_seq_len {longest} leaves no room for an "
                    "answer. Shorten the prompt"
                )
            if not 0 <= min(ids) <= max(ids) < vocab:
                bad = next(i for i in ids if not 0 <= i < vocab)
                raise UserError(f"prompt {number} holds token id {bad}, outside the model's vocabulary of {vocab}")
        return found

    def _rows(self, encoded: list[tuple[int, ...]], samples: int, seed: int, seeds: Sequence[int] | None) -> list[_Row]:
        """All samples, equal prompts side by side and prompts of like length near each other."""
        if seeds is not None and len(seeds) != len(encoded):
            raise UserError(f"seeds has {len(seeds)} entries for {len(encoded)} prompts; give one per prompt")
        rows, seen = [], {}
        for p, ids in enumerate(encoded):
            first = 0 if seeds is not None else seen.get(ids, 0)
            seen[ids] = first + samples
            name = (seeds[p],) if seeds is not None else (seed, _digest(ids))
            rows += [_Row(p, k, ids, stream_key(*name, first + k)) for k in range(samples)]
        return sorted(rows, key=lambda row: (len(row.ids), row.ids))

    def _run(self, call: _Call) -> tuple[list[_Row], loop.Written]:
        batch, on_tokens = call.rows, call.on_tokens
        prompts = list(dict.fromkeys(row.ids for row in batch))
        index = {ids: i for i, ids in enumerate(prompts)}
        device = self.model.embed.weight.device
        longest = self.model.cfg.max_seq_len
        emit = None
        if on_tokens is not None:

            def emit(numbers: list[int], tokens: list[int]) -> None:
                pairs = zip(numbers, tokens, strict=True)
                on_tokens([(batch[n].prompt, batch[n].sample, token) for n, token in pairs])

        strings = call.stop_strings
        with evaluating(self.model), torch.inference_mode():
            written = loop.run(
                self.model,
                prompts,
                prompt_R=[index[row.ids] for row in batch],
                key_R=[row.key for row in batch],
                limit_R=[min(call.max_new_tokens, longest - len(row.ids)) for row in batch],
                sampling=call.sampling,
                stop_ids=call.stop_ids,
                stop_strings=StopStrings(self.tokenizer, strings, len(batch), device) if strings else None,
                vocab=self.tokenizer.vocab_size,
                emit=emit,
                trace=Trace(self.model.cfg) if call.record_routing else None,
            )
        return batch, written

    def _completion(self, row: _Row, written: loop.Written, i: int, strings: list[str]) -> Completion:
        text = self.tokenizer.decode(written.tokens[i])
        return Completion(
            tokens=written.tokens[i],
            text=cut(text, strings) if strings else text,
            logprobs=written.logp[i],
            raw_logprobs=written.raw_logp[i],
            finish_reason="stop" if written.stopped[i] else "length",
            prompt_tokens=len(row.ids),
            routing=None if written.routing is None else written.routing[i],
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in the mode it had, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(rows: list[_Row], batch_rows: int) -> Iterator[list[_Row]]:
    """Batches of at most batch_rows; the samples of one prompt stay together where they fit into a batch."""
    batch: list[_Row] = []
    for _, group in groupby(rows, key=lambda row: row.ids):
        same = list(group)
        if batch and len(batch) + len(same) > batch_rows:
            yield batch
            batch = []
        for row in same:
            if len(batch) == batch_rows:
                yield batch
                batch = []
            batch.append(row)
    if batch:
        yield batch


def _digest(ids: tuple[int, ...]) -> int:
    """64 bits of a prompt's ids, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(ids).encode(), digest_size=8).digest(), "little")
