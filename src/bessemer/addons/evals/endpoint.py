"""A server with OpenAI's chat completions as the model of a suite: `bessemer eval http://127.0.0.1:8000/v1 --suite r1`.

It gets the question as the user's message, so its own template applies. Its thoughts come in `reasoning` or
`reasoning_content`, or as tags in the text. Whether equal seeds give equal answers is up to the server; an answer that
is written down is never asked for again.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from bessemer.addons.distributed.json_server import JSONServer, checked_url
from bessemer.data.chat import THINK, THINK_END
from bessemer.errors import UserError
from bessemer.eval.scoring import Answer

AT_ONCE = 64
"""Requests under way."""


class Endpoint:
    """The model `served_model` of the server at `url`; None: its only one. `key_in`: the environment variable with its
    key."""

    def __init__(self, url: str, served_model: str | None = None, key_in: str = "") -> None:
        resumes = "the same command goes on with the answers that are missing"
        self.http = JSONServer(checked_url(url, "the endpoint"), "the endpoint", key_in, resumes)
        names = [entry["id"] for entry in self.http.models()]
        if served_model is None and len(names) > 1:
            raise UserError(f"{self.http.name} serves {', '.join(names[:6])}; choose one with --served-model")
        if served_model is not None and served_model not in names:
            raise UserError(f"{self.http.name} does not serve {served_model}; it serves {', '.join(names[:6])}")
        self.model: str = served_model or names[0]

    @property
    def identity(self) -> dict[str, str]:
        """What stands for the model in files of answers."""
        return {"endpoint": self.http.url, "served_model": self.model}

    def answers(self, asked: list[tuple[str, int]], **sampling: Any) -> Iterator[tuple[int, Answer]]:
        """(place, answer) of each (question, seed), as they come. The first UserError is raised after the others."""
        failure = None
        with ThreadPoolExecutor(min(AT_ONCE, len(asked))) as pool:
            places = {pool.submit(self.answer, *pair, **sampling): place for place, pair in enumerate(asked)}
            for future in as_completed(places):
                try:
                    yield places[future], future.result()
                except UserError as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def answer(self, question: str, seed: int, *, temperature: float, top_p: float, max_new_tokens: int) -> Answer:
        reply = self.http.call(
            "/v1/chat/completions",
            {
                "model": self.model, "messages": [{"role": "user", "content": question}], "seed": seed,
                "temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens,
            },
        )  # fmt: skip
        try:
            (choice,) = reply["choices"]
            message, finish = choice["message"], choice.get("finish_reason")
            content = message["content"] or ""
            thoughts = message.get("reasoning") or message.get("reasoning_content") or ""
            if not all(isinstance(text, str) for text in (content, thoughts, finish or "")):
                raise TypeError
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.http.name} replies with no chat completion; name another server") from None
        tokens = _tokens(reply)
        text = f"{THINK}\n{thoughts}\n{THINK_END}\n\n{content}" if thoughts else content
        text = text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair, which no file can
        return Answer(text, tokens, finish)


def _tokens(reply: dict[str, Any]) -> int | None:
    """How many it counts, thoughts included."""
    usage = reply.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if type(tokens) is int else None
