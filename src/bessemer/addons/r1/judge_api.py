"""An OpenAI-compatible API that judges (judge.py): requests from several threads, retries, and who answers."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, NoReturn, Protocol

from bessemer import heartbeat
from bessemer.addons.r1.judge_config import AnyJudgeConfig
from bessemer.errors import UserError
from bessemer.train.runtime import Runtime

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
REFUSED = frozenset({400, 413, 422})
"""Statuses that refuse one request; the API may still serve others."""
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_ASKED = 1.0, 60.0, 300.0
"""Seconds: pause before the second try, longest pause, longest Retry-After that is obeyed."""
LARGEST_REPLY = 8_000_000
"""Bytes."""
LISTING, RECENT = 10.0, 60.0
"""Seconds: patience with a list of models; a younger `created` is the time of the request, not the model's."""
PROBED = 48
"""Tokens of an answer to a probe."""


class JudgeContext(Protocol):
    """What a judge needs of its surroundings; a stage's context has it."""

    name: str
    seed: int

    @property
    def stop(self) -> bool: ...

    @property
    def runtime(self) -> Runtime: ...

    def say(self, text: str) -> None: ...

    def interrupt(self) -> NoReturn: ...


def api_key(stage: str, config: AnyJudgeConfig) -> str | None:
    """The API key, None if none is configured; UserError if its variable is empty. No message shows the key."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise UserError(
            f'stage "{stage}": the environment variable {config.api_key_env} of judge.api_key_env holds no key; set it'
        )
    return key


class _Refused(Exception):
    """The API cannot serve this request."""


class _Stopped(Exception):
    """Another request failed for good, or the user wants to stop."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class JudgeAPI:
    """An OpenAI-compatible API; `ask` is called from one thread and sends from several."""

    def __init__(self, config: AnyJudgeConfig, key: str | None) -> None:
        self.config, self.key = config, key
        self.endpoint = f"{config.url}/chat/completions"
        self.opener = urllib.request.build_opener(_NoRedirects)
        self.serves = False  # until its first answer, stored ones of earlier attempts included
        self.form: Mapping[str, Any] = {}
        """What requests say about the form of a reply."""

    def ask(self, questions: dict[str, tuple[str, int]], ctx: JudgeContext) -> Iterator[tuple[str, str]]:
        """Yields (key, reply) for each (question, seed) as replies arrive, without refused ones. UserError if the API
        fails, or refuses all and has never answered. Requests in flight must be paid for anyway, so their replies are
        yielded first."""
        refused: list[str] = []
        failure: UserError | None = None
        over = threading.Event()
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            waiting = {pool.submit(self._send, *question, over): key for key, question in questions.items()}
            try:
                while waiting:
                    heartbeat.beat()  # every request has its own timeout
                    for future in wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        key = waiting.pop(future)
                        try:
                            yield key, future.result()
                            self.serves = True
                        except _Refused as error:
                            refused.append(str(error))
                        except UserError as error:
                            failure = failure or error
                        except _Stopped:
                            pass
                    if (ctx.stop or failure) and not over.is_set():
                        over.set()
                        pool.shutdown(wait=False, cancel_futures=True)
                        waiting = {future: key for future, key in waiting.items() if not future.cancelled()}
            finally:
                over.set()
        if failure is not None:
            raise failure
        if ctx.stop:
            ctx.interrupt()
        if len(refused) == len(questions) and not self.serves:
            raise UserError(f"the judge at {self.config.url} refused all {len(refused)} requests: {refused[0]}")

    def facts(self) -> dict[str, str | int] | None:
        """What the server lists about the model; {} if nothing, None if there is no server."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(f"{self.config.url}/models", headers=headers)
        try:
            with self.opener.open(request, timeout=min(self.config.timeout, LISTING)) as answer:
                listed = json.loads(answer.read(LARGEST_REPLY))["data"]
            (entry,) = (model for model in listed if model["id"] == self.config.served_model)
            own = entry.get("bessemer") or {}
            fields = {name: entry.get(name) for name in ("root", "parent", "max_model_len", "created")}
            fields["digest"] = own.get("digest", entry.get("digest"))
        except (urllib.error.HTTPError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return {}
        except (OSError, http.client.HTTPException):
            return None
        facts = {name: value for name, value in fields.items() if isinstance(value, str | int) and value != ""}
        created = facts.pop("created", None)
        if isinstance(created, int) and created < time.time() - RECENT:
            facts["created"] = created
        return {"digest": facts["digest"]} if "digest" in facts else facts

    def probe(self, question: str) -> tuple[str, str]:
        """The answer at temperature 0, thoughts included, and the server's fingerprint; "" for what it refuses."""
        try:
            reply = self._reply(question, 0, threading.Event(), temperature=0, max_tokens=PROBED)
            response = json.loads(reply)
            return json.dumps(response["choices"][0]["message"], sort_keys=True), str(
                response.get("system_fingerprint")
            )
        except (_Refused, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return "", ""

    def _send(self, question: str, seed: int, over: threading.Event) -> str:
        """Returns the text of the reply; runs in a thread of the pool."""
        return _content(self._reply(question, seed, over))

    def _reply(self, question: str, seed: int, over: threading.Event, **changes: float) -> bytes:
        pause = FIRST_PAUSE
        for retries_left in reversed(range(self.config.retries + 1)):
            if over.is_set():
                raise _Stopped
            delay = ""
            try:
                return self._post(question, seed, changes)
            except urllib.error.HTTPError as error:
                why = f"status {error.code}, {self._said(error)}"
                if error.code in REFUSED:
                    raise _Refused(why) from None
                if error.code not in RETRIED:
                    raise UserError(f"the judge at {self.config.url}: {why}; {self._advice(error.code)}") from None
                delay = error.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException) as error:
                why = self._hidden(str(error)) or type(error).__name__
            if retries_left:
                least = min(float(delay), LONGEST_ASKED) if delay.isdecimal() else 0.0
                over.wait(least + pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE)
        raise UserError(
            f"the judge at {self.config.url} failed {self.config.retries + 1} times: {why}. What it has judged is "
            "kept; run again when it answers"
        )

    def _post(self, question: str, seed: int, changes: Mapping[str, float]) -> bytes:
        body = {
            "model": self.config.served_model, "messages": [{"role": "user", "content": question}], "seed": seed,
            "temperature": self.config.temperature, "max_tokens": self.config.max_new_tokens, **(changes or self.form),
        }  # fmt: skip
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.endpoint, json.dumps(body).encode(), headers)
        end, reply = time.monotonic() + self.config.timeout, b""
        with self.opener.open(request, timeout=self.config.timeout) as answer:
            while part := answer.read1(1 << 16):
                reply += part
                if len(reply) > LARGEST_REPLY or time.monotonic() > end:
                    raise TimeoutError("the reply is too long or too slow")
            announced = answer.headers.get("Content-Length", "")
        if announced.isdecimal() and len(reply) < int(announced):
            raise TimeoutError("the connection ended in the middle of a reply")
        return reply

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The beginning of the server's error message."""
        try:
            body = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            body = ""
        return self._hidden(" ".join(body.split()))[:300] or str(error.reason)

    def _hidden(self, text: str) -> str:
        """Without the key, which some servers repeat, and without control characters."""
        masked = text.replace(self.key, "***") if self.key else text
        return "".join(char if char.isprintable() else " " for char in masked)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"put its key into an environment variable and name it in api_key_env ({self.config.api_key_env})"
        return "check judge.url and judge.served_model"


def _content(reply: bytes) -> str:
    """The message of a chat completion; "" if it has thoughts only."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        content = 0
    if content is not None and not isinstance(content, str):
        raise _Refused("the reply is not a chat completion")
    return content or ""
