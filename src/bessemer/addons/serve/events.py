"""From token records to the JSON of an answer: one `AnswerEvent` per chunk of a stream, or one object at the end.

A server-sent event is `data: JSON` and a blank line in one write, so no character and no event is ever split here.
U+2028, U+2029 and U+0085 are escaped: clients that split lines by Unicode's rules would break an event there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bessemer.addons.serve.models import LoadedModel
from bessemer.addons.serve.protocol import ApiError, ChatRequest, CompletionRequest, StreamOptions
from bessemer.addons.serve.reasoning_parser import AnswerEvent, ReasoningParser
from bessemer.addons.serve.requests import Finished, ServedRequest, Token
from bessemer.addons.serve.service import Gone, Stream

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
MIN_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON cannot represent; OpenAI uses the same number."""
log = logging.getLogger("bessemer.addons.serve")
_ESCAPED = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class ChoiceBuilder:
    """Turns the tokens of one sample into the events of its answer."""

    def __init__(self, parser: ReasoningParser, stop_ids: Collection[int] = (), finish_reason: str | None = None):
        self.parser, self.stop_ids, self.finish_reason = parser, stop_ids, finish_reason
        self.completion_tokens = 0
        """Tokens so far, including the one that ends the answer."""
        self.cached_tokens = 0
        """Prompt tokens that were in the cache."""

    def take(self, records: Iterable[Token | Finished]) -> list[AnswerEvent]:
        """Turns records into events. Raises ApiError if the model failed on this sample."""
        events: list[AnswerEvent] = []
        for record in records:
            if isinstance(record, Finished):
                if record.reason in ("error", "cancelled"):
                    raise ApiError(500, record.message or "the answer was aborted; ask again", code="generation_failed")
                new = self.parser.end()
                self.finish_reason, self.cached_tokens = record.reason, record.cached_tokens
            else:
                self.completion_tokens += 1
                new = self.parser.push(record.token)
                if record.token not in self.stop_ids or not self.parser.tokenizer.is_special(record.token):
                    new = new or [AnswerEvent()]
                    new[0].tokens.append(record)
            for event in new:
                if not events or (event.text and events[-1].text and event.thinking != events[-1].thinking):
                    events.append(event)
                else:
                    events[-1].extend(event)
        return events


class Responder(ABC):
    """One generation request: what to ask the model, and how its answer is written."""

    id_prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]
    end: ClassVar[bytes] = DONE
    """The bytes that end a stream."""

    def __init__(
        self,
        body: ChatRequest | CompletionRequest,
        model: LoadedModel,
        requests: Sequence[ServedRequest],
        choices: Sequence[ChoiceBuilder],
        prompt_tokens: int,
    ):
        self.model, self.requests, self.choices, self.prompt_tokens = model, requests, choices, prompt_tokens
        self.precomputed: list[Token | Finished] = []
        """The whole answer, if it is known without the scheduler."""
        self._routing, self._token_ids = body.return_routing, body.return_token_ids
        self._options = body.stream_options or StreamOptions()
        self._envelope = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.facts.name,
        }

    @abstractmethod
    def opening(self) -> Sequence[dict[str, Any]]:
        """The fields of each choice in the first chunk of a stream; none if the stream begins with the answer."""

    @abstractmethod
    def fields(self, n: int, event: AnswerEvent) -> dict[str, Any]:
        """Text and log-probabilities of choice n in a chunk of a stream."""

    @abstractmethod
    def whole_fields(self, n: int, events: Sequence[AnswerEvent]) -> dict[str, Any]:
        """The same in a complete answer."""

    def last_fields(self, n: int) -> dict[str, Any]:
        """The same in the last chunk of a choice, which has no tokens."""
        return self.fields(n, AnswerEvent()) | {"logprobs": None}

    def finish_reason(self, n: int) -> str | None:
        """Why choice n ended."""
        return self.choices[n].finish_reason

    def error_event(self, error: Exception) -> bytes:
        """The last event of a stream that failed."""
        return _error_event(error)

    async def submit(self, gone: Gone) -> Stream | None:
        """The stream of the answer's tokens; None if the answer is already known. Raises ClientDisconnect if the client
        has `gone` before."""
        return await self.model.service.submit(self.requests) if self.requests and not self.precomputed else None

    async def events(self, stream: Stream | None) -> AsyncIterator[bytes]:
        """The chunks of a stream, up to and including the usage."""
        if opening := self.opening():
            yield b"".join(self._chunk(n, fields) for n, fields in enumerate(opening))
        async for records in stream or self._precomputed():
            yield KEEP_ALIVE if records is None else b"".join(self._chunks(records))
        if not self.requests:  # the opening was the whole answer
            yield b"".join(self._chunk(n, self.last_fields(n), self.finish_reason(n)) for n in range(len(self.choices)))
        if self._options.include_usage:
            yield event(self._envelope | {"object": self.chunk_object, "choices": [], "usage": self._usage()})

    async def whole(self, stream: Stream | None) -> dict[str, Any]:
        """The complete answer in one object."""
        events: list[list[AnswerEvent]] = [[] for _ in self.choices]
        async for records in stream or self._precomputed():
            for record in records or ():
                events[record.ticket] += self.choices[record.ticket].take((record,))
        choices = [
            {
                "index": n,
                **self.whole_fields(n, events[n]),
                "finish_reason": self.finish_reason(n),
                **self._extras([token for event in events[n] for token in event.tokens]),
            }
            for n in range(len(self.choices))
        ]
        return self._envelope | {"object": self.object, "choices": choices, "usage": self._usage()}

    def _chunks(self, records: Sequence[Token | Finished]) -> list[bytes]:
        chunks = []
        for n in sorted({record.ticket for record in records}):
            choice = self.choices[n]
            for part in choice.take(record for record in records if record.ticket == n):
                chunks.append(self._chunk(n, self.fields(n, part), extras=self._extras(part.tokens)))
            if choice.finish_reason:
                chunks.append(self._chunk(n, self.last_fields(n), self.finish_reason(n)))
        return chunks

    def _chunk(
        self, n: int, fields: dict[str, Any], finish: str | None = None, extras: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": n, **fields, "finish_reason": finish, **(extras or {})}
        chunk = self._envelope | {"object": self.chunk_object, "choices": [choice]}
        if self._options.continuous_usage_stats and self.requests:
            chunk["usage"] = self._usage(self.choices[n])
        elif self._options.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _extras(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """What the request wants reported for every token."""
        routing = {"routing": [token.routing for token in tokens]} if self._routing else {}
        return routing | ({"token_ids": [token.token for token in tokens]} if self._token_ids else {})

    def _usage(self, *choices: ChoiceBuilder) -> dict[str, Any]:
        """The `usage` object of these choices, by default of all."""
        choices = choices or tuple(self.choices)
        completion = sum(choice.completion_tokens for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": max(choice.cached_tokens for choice in choices)},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.parser.reasoning_tokens for choice in choices)
            },
        }

    async def _precomputed(self) -> AsyncIterator[list[Token | Finished]]:
        if self.precomputed:
            yield self.precomputed


class EventStream(Response):
    """The events of a stream, including its end."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream | None, responder: Responder, ended: Callable[[], None]):
        """`ended` is called once, however the stream ends."""
        self.status_code, self.background = 200, None
        self.stream, self.responder, self.ended = stream, responder, ended
        # otherwise nginx and similar proxies would buffer events
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with while_connected(receive, self.stream):
                try:
                    async for data in self.responder.events(self.stream):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                except Exception as error:
                    await send(
                        {"type": "http.response.body", "body": self.responder.error_event(error), "more_body": True}
                    )
                await send({"type": "http.response.body", "body": self.responder.end})
        finally:
            self.ended()


@asynccontextmanager
async def while_connected(receive: Receive, stream: Stream | None) -> AsyncIterator[None]:
    """Closes the stream when the block ends, and as soon as the client disconnects."""
    if stream is None:
        yield
        return

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        stream.close()


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = _encode(data)
    return f"data: {text if text.isascii() else text.translate(_ESCAPED)}\n\n".encode()


def _error_event(error: Exception) -> bytes:
    if not isinstance(error, ApiError):
        log.error("a stream failed", exc_info=error)
        error = ApiError(500, "the server failed and the rest of the answer is lost; ask again")
    return event(error.body)


def likeliest(token: Token) -> list[tuple[int, float]]:
    """(id, log-probability) of the likeliest tokens at a token's position. If the token itself is among them, its value
    there equals its own log-probability bit for bit, so that a client can compare the two."""
    return [(i, token.raw_logprob if i == token.token else logprob) for i, logprob in token.top]
