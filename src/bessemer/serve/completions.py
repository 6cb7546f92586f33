"""POST /v1/completions: raw text or ids, several prompts at once, `echo` and `logprobs`.

With `echo` the prompt is part of the answer, and with `logprobs` it is scored: token i given those before it, the first
not at all. A BOS that the server put in front of a text is not listed, since it was not sent; the first token of the
text then has a log-probability too. So positions are those of whoever sent the text, which lm-eval counts on.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from bessemer.engine.sequence import Finished, Request, Token
from bessemer.serve import sampling_params
from bessemer.serve.answer import Answer, Piece, likeliest, usage
from bessemer.serve.chat import LONG_TEXT, check_size
from bessemer.serve.envelope import LEAST_LOGPROB, Envelope
from bessemer.serve.errors import invalid, too_long, unsupported
from bessemer.serve.events import KEEP_ALIVE, event
from bessemer.serve.inflight import Event, Stream
from bessemer.serve.models import Loaded
from bessemer.serve.protocol import CompletionRequest, StreamOptions
from bessemer.serve.reasoning_parser import Writing
from bessemer.serve.score import Scored, batches
from bessemer.serve.text import Vocabulary


class Prompt(NamedTuple):
    """One prompt."""

    ids: tuple[int, ...]
    added: int
    """Ids at the front that the server put there."""
    text: str
    """What `echo` repeats."""


class Completion:
    """One request on its way: what to ask the model, and what to make of its tokens."""

    def __init__(self, body: CompletionRequest, model: Loaded, prompts: Sequence[Prompt], client: str):
        _refuse(body)
        self.body, self.model, self.prompts = body, model, prompts
        self.most = 16 if body.max_tokens is None else body.max_tokens
        if self.most == 0 and not body.echo:
            raise invalid("max_tokens 0 leaves nothing to answer without echo", "max_tokens")
        self.scores = bool(body.echo) and body.logprobs is not None
        for prompt in prompts:
            _check(prompt.ids, model)
        self.requests = [] if self.most == 0 else sampling_params.requests(
            body, model, [prompt.ids for prompt in prompts], most=self.most, param="prompt", top=body.logprobs or 0,
            client=client,
        )  # fmt: skip
        tokenizer = model.tokenizer
        self.answers = [Answer(r, Writing(tokenizer, r.stop_strings, split=False)) for r in self.requests]
        self.tables = [Table(model.vocabulary, body.logprobs) for _ in range(len(prompts) * (body.n or 1))]
        self.envelope = Envelope("cmpl", "text_completion", model.facts.name, "text_completion")
        self.foretold: list[tuple[int, Event]] = []
        """The whole answer, where one greedy token was asked for and the scores hold it (lm-eval asks so)."""
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)

    async def score(self) -> None:
        """Scores the prompts, if that was asked for."""
        ids = [prompt.ids for prompt in self.prompts]
        found: dict[int, Scored] = {}
        for batch in batches(ids) if self.scores else ():
            part = [ids[i] for i in batch]
            found |= zip(batch, await self.model.service.score(part, self.body.logprobs), strict=True)
        for n, table in enumerate(self.tables):
            if self.body.echo:
                prompt = n // (self.body.n or 1)
                table.prompt(self.prompts[prompt], found.get(prompt))
        if found and all(_greedy_one(request) for request in self.requests):
            for n, request in enumerate(self.requests):
                self.foretold += _likeliest(n, request, found[n // (self.body.n or 1)])

    async def submit(self) -> Stream | None:
        """The tokens on their way; None where scoring the prompts has answered already."""
        return await self.model.service.submit(self.requests) if self.requests and not self.foretold else None

    async def events(self, stream: Stream | None) -> AsyncIterator[bytes]:
        """The chunks of a stream, up to the usage."""
        options = self.body.stream_options or StreamOptions()
        self._running = bool(options.continuous_usage_stats)
        if self.body.echo:
            yield b"".join(self._chunk(n, table.text, table.take()) for n, table in enumerate(self.tables))
        async for events in stream or self._foretold():
            yield KEEP_ALIVE if events is None else b"".join(self._chunks(events))
        if options.include_usage:
            yield event(self.envelope.chunk([], usage(self.answers, self.prompt_tokens)))

    async def whole(self, stream: Stream | None) -> dict[str, Any]:
        """The answer in one object."""
        tokens: list[list[Token]] = [[] for _ in self.tables]
        async for events in stream or self._foretold():
            for n, one in events or ():
                for piece in self.answers[n].take((one,)):
                    self.tables[n].piece(piece)
                    tokens[n] += piece.tokens
                self.envelope.check(self.answers[n])
        choices = []
        for n, table in enumerate(self.tables):
            finish = self.answers[n].finish if self.answers else "length"
            choice = {"index": n, "text": table.text, "logprobs": table.take(), "finish_reason": finish}
            choices.append(choice | self.envelope.extras(self.body, tokens[n]))
        return self.envelope.whole(choices, usage(self.answers, self.prompt_tokens))

    def _chunks(self, events: Sequence[tuple[int, Event]]) -> list[bytes]:
        found = []
        for n in sorted({n for n, _ in events}):
            answer, table = self.answers[n], self.tables[n]
            for piece in answer.take(one for m, one in events if m == n):
                table.piece(piece)
                found.append(self._chunk(n, piece.text, table.take(), piece.tokens))
            self.envelope.check(answer)
            if answer.finish:
                found.append(self._chunk(n, "", None, finish=answer.finish))
        return found

    def _chunk(
        self, n: int, text: str, logprobs: dict[str, Any] | None, tokens: Sequence[Token] | None = None,
        finish: str | None = None,
    ) -> bytes:  # fmt: skip
        choice = {"index": n, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if tokens is not None:
            choice |= self.envelope.extras(self.body, tokens)
        so_far = usage((self.answers[n],), self.prompt_tokens) if self._running and self.answers else None
        return event(self.envelope.chunk([choice], so_far))

    async def _foretold(self) -> AsyncIterator[list[tuple[int, Event]]]:
        if self.foretold:
            yield self.foretold


class Table:
    """The `logprobs` object of one choice as it grows, and the choice's text."""

    def __init__(self, vocabulary: Vocabulary, top: int | None):
        self.vocabulary, self.top = vocabulary, top
        self.text = ""
        self._rows: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        """Characters of the text that the tokens so far have completed."""

    def prompt(self, prompt: Prompt, scored: Scored | None) -> None:
        """The prompt comes first."""
        self.text += prompt.text
        for i in range(prompt.added, len(prompt.ids)) if scored else ():
            known = (scored.logprobs[i - 1], scored.tops[i - 1]) if i else (None, None)
            self._row(prompt.ids[i], *known)

    def piece(self, piece: Piece) -> None:
        """A piece of the answer."""
        self.text += piece.text
        for token in piece.tokens if self.top is not None else ():
            self._row(token.token, token.raw_logprob, likeliest(token))

    def take(self) -> dict[str, Any] | None:
        """What has come since the last call; None if it was not asked for."""
        if self.top is None:
            return None
        rows, self._rows = self._rows, []
        columns = list(zip(*rows, strict=True)) or [()] * 4
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        found = {name: list(column) for name, column in zip(names, columns, strict=True)}
        return found if self.top else found | {"top_logprobs": None}

    def _row(self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]] | None) -> None:
        shown: dict[str, float] | None = None
        if logprob is not None:
            logprob = max(logprob, LEAST_LOGPROB)
            shown = {}
            for i, value in (*top[: self.top], (token_id, logprob)):
                # of two tokens that show alike the likelier one counts
                other = self.vocabulary.name(i)
                shown[other] = max(value, shown.get(other, LEAST_LOGPROB))
        name, raw = self.vocabulary.name(token_id), self.vocabulary.text(token_id)
        begin, self._offset = self._offset, self._offset + len(self._decoder.decode(raw))
        if raw == name.encode():  # behind the mark of a character that was left unfinished before it
            begin = self._offset - len(name)
        self._rows.append((name, logprob, shown, begin))


async def prepare(body: CompletionRequest, model: Loaded, client: str) -> Completion:
    """A request as a task for this model; ApiError or UserError if it cannot be one."""
    texts = [body.prompt] if isinstance(body.prompt, str) else [p for p in body.prompt if isinstance(p, str)]
    if texts:
        check_size(max(map(len, texts)), model, "prompt")
        encode = lambda: [_of_text(text, model, body.add_special_tokens is not False) for text in texts]  # noqa: E731
        prompts = encode() if sum(map(len, texts)) < LONG_TEXT else await asyncio.to_thread(encode)
    else:
        lists = [body.prompt] if body.prompt and isinstance(body.prompt[0], int) else body.prompt
        decode, known = model.tokenizer.decode, model.tokenizer.vocab_size
        prompts = [Prompt(tuple(ids), 0, decode(i for i in ids if i < known)) for ids in lists]
    if not prompts:
        raise invalid("prompt is an empty list; give a text or ids", "prompt")
    return Completion(body, model, prompts, client)


def _of_text(text: str, model: Loaded, begin: bool) -> Prompt:
    ids = model.vocabulary.prompt_ids(text, begin)
    return Prompt(tuple(ids), len(ids) - len(model.vocabulary.prompt_ids(text, False)), text)


def _refuse(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of not in (0, body.n or 1):
        raise unsupported("best_of", "best_of is not supported; ask for n samples and choose among them")
    if body.suffix:
        raise unsupported("suffix", "suffix is not supported: the answer follows its prompt")


def _check(ids: tuple[int, ...], model: Loaded) -> None:
    if not ids:
        raise invalid("a prompt is empty; give at least one token", "prompt")
    if len(ids) > model.facts.context:
        raise too_long(len(ids), model.facts.context, "prompt")
    if max(ids) >= model.service.facts.vocabulary:
        raise invalid(f"token id {max(ids)} is outside the model's vocabulary", "prompt")


def _greedy_one(request: Request) -> bool:
    plain = request.sampling.temperature == 0 and not request.sampling.penalised
    return plain and request.max_new_tokens == 1 and not request.routing and not request.stop_strings


def _likeliest(n: int, request: Request, scored: Scored) -> list[tuple[int, Event]]:
    token, logprob = scored.tops[-1][0]
    reason = "stop" if token in request.stop_ids else "length"
    return [(n, Token(-1, token, logprob, logprob, scored.tops[-1][: request.top])), (n, Finished(-1, reason))]
