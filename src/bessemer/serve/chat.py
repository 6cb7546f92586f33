"""POST /v1/chat/completions: chunks and whole answers from one description of each.

Thoughts go out under both names in use, `reasoning_content` (DeepSeek, SGLang, llama.cpp) and `reasoning` (vLLM).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from bessemer.data.special import THINK
from bessemer.engine.sequence import Request, Token
from bessemer.serve import prompt, sampling_params
from bessemer.serve.answer import Answer, Piece, likeliest, usage
from bessemer.serve.envelope import LEAST_LOGPROB, Envelope
from bessemer.serve.errors import invalid, too_long, unsupported
from bessemer.serve.events import KEEP_ALIVE, event
from bessemer.serve.inflight import Event, Stream
from bessemer.serve.models import Loaded
from bessemer.serve.protocol import ChatRequest, StreamOptions
from bessemer.serve.reasoning_parser import Writing
from bessemer.serve.settings import ReasoningFormat
from bessemer.serve.text import Vocabulary

LONG_TEXT = 20_000
"""Characters above which a text is tokenised beside the event loop."""


class ChatCompletion:
    """One request on its way: what to ask the model, and what to make of its tokens."""

    def __init__(self, body: ChatRequest, model: Loaded, asked: prompt.Prompt, how: ReasoningFormat, client: str):
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        self.body, self.model, self.asked = body, model, asked
        self.how = body.reasoning_format or how
        most = body.max_completion_tokens or body.max_tokens
        if most == 0:
            raise invalid("max_tokens must be at least 1", "max_tokens")
        budget = prompt.budget(body, sampling_params.room(model, len(asked.ids), most))
        self.requests = sampling_params.requests(
            body, model, [asked.ids], most=most, param="messages", top=body.top_logprobs or 0, thinking_budget=budget,
            client=client,
        )  # fmt: skip
        self.answers = [Answer(request, self._writing(request)) for request in self.requests]
        self.prompt_tokens = len(asked.ids)
        self.envelope = Envelope("chatcmpl", "chat.completion", model.facts.name)

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The chunks of a stream, up to the usage."""
        options = self.body.stream_options or StreamOptions()
        self._running = bool(options.continuous_usage_stats)
        lead = f"{THINK}\n" if self.how == "none" and self.asked.thinking else ""
        yield b"".join(self._chunk(n, {"role": "assistant", "content": lead}) for n in range(len(self.answers)))
        async for events in stream:
            yield KEEP_ALIVE if events is None else b"".join(self._chunks(events))
        if options.include_usage:
            yield event(self.envelope.chunk([], usage(self.answers, self.prompt_tokens)))

    async def whole(self, stream: Stream) -> dict[str, Any]:
        """The answer in one object."""
        pieces: list[list[Piece]] = [[] for _ in self.answers]
        async for events in stream:
            for n, one in events or ():
                pieces[n] += self.answers[n].take((one,))
                self.envelope.check(self.answers[n])
        choices = [self._choice(n, found) for n, found in enumerate(pieces)]
        return self.envelope.whole(choices, usage(self.answers, self.prompt_tokens))

    def _writing(self, request: Request) -> Writing:
        split = self.how != "none"
        return Writing(
            self.model.tokenizer, request.stop_strings, thinking=self.asked.thinking, split=split,
            trim=not self.asked.continued,
        )  # fmt: skip

    def _chunks(self, events: Sequence[tuple[int, Event]]) -> list[bytes]:
        found = []
        for n in sorted({n for n, _ in events}):
            answer = self.answers[n]
            pieces = answer.take(one for m, one in events if m == n)
            found += [self._chunk(n, self._texts(piece), piece.tokens) for piece in pieces]
            self.envelope.check(answer)
            if answer.finish:
                found.append(self._chunk(n, {}, finish=answer.finish))
        return found

    def _chunk(
        self, n: int, delta: dict[str, Any], tokens: Sequence[Token] | None = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": n, "delta": delta, "logprobs": None, "finish_reason": finish}
        if tokens is not None:
            choice |= {"logprobs": self._logprobs(tokens), **self.envelope.extras(self.body, tokens)}
        so_far = usage((self.answers[n],), self.prompt_tokens) if self._running else None
        return event(self.envelope.chunk([choice], so_far))

    def _texts(self, piece: Piece) -> dict[str, str]:
        if not piece.text or (piece.thinking and self.how == "hidden"):
            return {}
        if piece.thinking:
            return {"reasoning_content": piece.text, "reasoning": piece.text}
        return {"content": piece.text}

    def _choice(self, n: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        thought = "".join(piece.text for piece in pieces if piece.thinking) if self.how != "hidden" else ""
        content = "".join(piece.text for piece in pieces if not piece.thinking)
        tokens = [token for piece in pieces for token in piece.tokens]
        if self.how == "none" and self.asked.thinking:
            content = f"{THINK}\n{content}"
        message = {"role": "assistant", "content": content}
        message |= {"reasoning_content": thought, "reasoning": thought} if thought else {}
        return {
            "index": n, "message": message, "logprobs": self._logprobs(tokens),
            "finish_reason": self.answers[n].finish, **self.envelope.extras(self.body, tokens),
        }  # fmt: skip

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        vocabulary = self.model.vocabulary
        content = []
        for token in tokens:
            top = [_entry(vocabulary, i, logprob) for i, logprob in likeliest(token)]
            content.append(_entry(vocabulary, token.token, token.raw_logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


async def prepare(body: ChatRequest, model: Loaded, how: ReasoningFormat, client: str) -> ChatCompletion:
    """A request as a task for this model; ApiError or UserError if it cannot be one."""
    if body.tools:
        raise unsupported("tools", "tools are not supported by these models; leave them out")
    if body.response_format and body.response_format.get("type", "text") != "text":
        raise unsupported("response_format", "only text is supported; ask for the format in the message")
    return ChatCompletion(body, model, await render(body, model), how, client)


async def render(body: ChatRequest, model: Loaded) -> prompt.Prompt:
    """The conversation as ids."""
    tokenizer, turns = model.tokenizer, body.messages
    size = sum(len(part) for turn in turns for part in prompt.texts(turn))
    check_size(size, model, "messages")
    if size < LONG_TEXT:
        return prompt.of(tokenizer, turns, prompt.switch(body))
    return await asyncio.to_thread(prompt.of, tokenizer, turns, prompt.switch(body))


def check_size(characters: int, model: Loaded, param: str) -> None:
    """Refuses a text that is too long whatever its tokens, without tokenising it."""
    least = characters // model.vocabulary.longest
    if least > model.facts.context:
        raise too_long(f"more than {least}", model.facts.context, param)


def _entry(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    raw = vocabulary.tokenizer.token_bytes(token_id)
    return {"token": vocabulary.name(token_id), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}
