"""One sample's tokens gathered into pieces, each of which becomes a chunk of a stream or a part of a whole answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bessemer.engine.sequence import Finished, Request, Token
from bessemer.serve.inflight import Event
from bessemer.serve.reasoning_parser import Writing


@dataclass
class Piece:
    """Text of one kind with the tokens that came along. Texts may lag behind their tokens: see `writing`."""

    thinking: bool = False
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    """Without the one that ended the answer."""


class Answer:
    """One sample."""

    def __init__(self, request: Request, writing: Writing):
        self.request, self.writing = request, writing
        self.tokens = 0
        """Drawn so far, the ending one included."""
        self.cached = 0
        """Tokens of the prompt that were in the cache before."""
        self.finish: str | None = None
        self.error = ""
        """With `finish` "error": why."""

    def take(self, events: Iterable[Event]) -> list[Piece]:
        """The pieces that these events make."""
        pieces: list[Piece] = []
        for event in events:
            if type(event) is Token:
                self._token(event, pieces)
            else:
                self._finished(event, pieces)
        return pieces

    def _token(self, event: Token, pieces: list[Piece]) -> None:
        self.tokens += 1
        deltas = self.writing.push(event.token)
        if event.token not in self.request.stop_ids:
            if not pieces or (deltas and pieces[-1].text and pieces[-1].thinking != deltas[0].thinking):
                pieces.append(Piece(deltas[0].thinking if deltas else False))
            pieces[-1].tokens.append(event)
        _append(pieces, deltas)

    def _finished(self, event: Finished, pieces: list[Piece]) -> None:
        _append(pieces, self.writing.end())
        self.finish, self.error, self.cached = event.reason, event.message, event.cached_tokens


def _append(pieces: list[Piece], deltas: Iterable[Any]) -> None:
    for thinking, text in deltas:
        if not pieces or (pieces[-1].text and pieces[-1].thinking != thinking):
            pieces.append(Piece(thinking))
        pieces[-1].thinking = thinking
        pieces[-1].text += text


def likeliest(token: Token) -> list[tuple[int, float]]:
    """(id, log-probability) of the likeliest tokens in a token's place. The token itself has the same figure there as
    outside, to the last bit, so that who compares the two sees that it was the likeliest."""
    return [(i, token.raw_logprob if i == token.token else logprob) for i, logprob in token.top]


def usage(answers: Iterable[Answer], prompt_tokens: int) -> dict[str, Any]:
    """The `usage` object of some answers to prompts of so many tokens together."""
    answers = list(answers)
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": max((answer.cached for answer in answers), default=0)},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.writing.thoughts for answer in answers)},
    }
