"""What stands around the choices of an answer: its id, kind, time, model and usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from bessemer.engine.sequence import Token
from bessemer.serve.answer import Answer
from bessemer.serve.errors import ApiError
from bessemer.serve.protocol import Generation

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON does not have; the same number as OpenAI's."""


class Envelope:
    """The same in every chunk of an answer."""

    def __init__(self, prefix: str, kind: str, model: str, chunk_kind: str | None = None):
        self.facts = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.kind, self.chunk_kind = kind, chunk_kind or f"{kind}.chunk"

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        found = {**self.facts, "object": self.chunk_kind, "choices": choices}
        return found if usage is None else found | {"usage": usage}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.facts, "object": self.kind, "choices": choices, "usage": usage}

    def check(self, answer: Answer) -> None:
        """ApiError where the model failed on this answer."""
        if answer.finish in ("error", "cancelled"):
            raise ApiError(500, answer.error or "the answer was broken off; ask again", code="generation_failed")

    def extras(self, body: Generation, tokens: Sequence[Token]) -> dict[str, Any]:
        """What is reported token by token, if it was asked for."""
        found: dict[str, Any] = {}
        if body.return_routing:
            found["routing"] = [token.routing for token in tokens]
        if body.return_token_ids:
            found["token_ids"] = [token.token for token in tokens]
        return found
