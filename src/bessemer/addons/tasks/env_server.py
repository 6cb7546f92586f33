"""`env:URL`: an environment behind a server, in the style of Gym and OpenEnv.

    POST URL/reset   {"seed": ..., "episode_id": ...}
    POST URL/step    {"action": ..., "episode_id": ..., "timeout_s": ...}
    both answer      {"observation": ..., "reward": ..., "done": ...}

A server keeps one state for each `episode_id`, since many episodes run at a time. OpenEnv's own servers do so only over
their WebSocket: `env:ws://HOST:PORT/ws` speaks its protocol, with one connection per episode (needs the package
websockets). Answers have the same fields either way.

An action is `{"message": TEXT}`, or for a turn that calls a tool OpenEnv's `{"type": "call_tool", "tool_name": ...,
"arguments": ...}`. The model reads the first field in `TEXTS` that the observation has, or else its JSON. An episode is
correct if its rewards sum to at least `solved`, and a smaller sum earns its share; the sum is the verdict's answer. A
user's own class (`FILE.py:CLASS`, derived from `ServerEnvironment`) sets `url` and can change any of this.

A reset that finds no server is tried up to three times in all. A step is tried only once, because it might count twice.
A server that dies, hangs, or answers with an error or invalid JSON fails the episode, not the run.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from bessemer.addons.tasks.environment import (
    Environment,
    EnvironmentFailure,
    Episode,
    Message,
    ModelTurn,
    Observation,
    RewardOptions,
    finite,
    verdict_of_reward,
)
from bessemer.errors import UserError
from bessemer.escape import shortened
from bessemer.tasks.base import Problem, Verdict, stable_hash

LARGEST = 1 << 20
"""Maximum bytes of an answer."""
PAUSES = (0.2, 1.0)
"""Seconds before a reset is tried again."""
CLOSING = 1.0
"""Seconds that a server has to close its end of a WebSocket."""
TEXTS = ("message", "messages", "text", "prompt", "question", "result", "output", "stdout", "content")
"""Fields of an observation that hold what the model reads; the first one present is used."""
_OUTER = ("reward", "done", "metadata")
Ask = Callable[[str, Mapping[str, Any]], Any]
"""(reset or step, its fields) -> the answer as JSON."""


class ServerEnvironment(Environment):
    """`env:URL`."""

    name, domain = "env:URL", "tools"
    all_languages = ("en",)
    phrasings = ("seen",)
    url: str = ""
    seconds = 30.0
    parallel = 32
    Options = RewardOptions
    options: RewardOptions
    solved: float = 1.0
    """The least sum of rewards of a correct episode."""

    def __init__(self, url: str = "", **settings: Any) -> None:
        if url:
            self.url, self.name = url.rstrip("/"), f"env:{url}"
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
            raise UserError(f"{self.name}: {self.url!r} is not the URL of a server; write env:http://127.0.0.1:8000")
        super().__init__(**settings)
        self.solved = self.options.solved or self.solved

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        """A problem is a seed: even ones are for training. What it asks is known once the server is reset."""
        chosen = (stable_hash("server", split, seed, index) & (2**30 - 1)) * 2 + (split == "test")
        meta = {"seed": chosen, "difficulty": 0}
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", f"(seed {chosen})", language, meta)

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _ServerEpisode(self, problem)

    def action(self, action: ModelTurn) -> dict[str, Any]:
        """The action that the server gets for a turn of the model."""
        for call in action.calls:
            if not call.fault:
                return {"type": "call_tool", "tool_name": call.name, "arguments": dict(call.arguments)}
        return {"message": action.text}

    def text(self, observation: Mapping[str, Any] | str) -> str:
        """What the model reads from an observation."""
        if isinstance(observation, str):
            return observation
        found = next((observation[name] for name in TEXTS if name in observation), None)
        if found is None:
            found = {name: value for name, value in observation.items() if name not in _OUTER}
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    def verdict_of(self, total: float) -> Verdict:
        """The verdict on an episode with this sum of rewards."""
        return verdict_of_reward(total, self.solved)


class _ServerEpisode:
    def __init__(self, environment: ServerEnvironment, problem: Problem) -> None:
        self.environment, self.id, self.total, self.over = environment, uuid.uuid4().hex, 0.0, False
        scheme = urlsplit(environment.url).scheme
        self.close: Callable[[], None] = lambda: None
        fields = {"seed": problem.meta["seed"], "episode_id": self.id}
        for pause in (*PAUSES, None):
            try:
                self._ask, self.close = (_socket if scheme in ("ws", "wss") else _posts)(environment)
                answer = self._ask("reset", fields)
                self.start: Sequence[Message] = [{"role": "user", "content": self._read(answer)}]
                break
            except Exception as failure:  # nobody else has the episode, so nobody else would close its connection
                self.close()
                if pause is None or not isinstance(failure.__cause__, ConnectionError):
                    raise
                time.sleep(pause)

    def step(self, action: ModelTurn) -> Observation:
        fields = {"action": self.environment.action(action), "episode_id": self.id}
        answer = self._ask("step", fields | {"timeout_s": self.environment.seconds})
        role = "tool" if any(not call.fault for call in action.calls) else "user"
        text = self._read(answer)
        return Observation([{"role": role, "content": text}], self.over)

    def verdict(self, text: str) -> Verdict:
        return self.environment.verdict_of(self.total)

    def _read(self, answer: Any) -> str:
        """The text of an answer; adds its reward."""
        if not isinstance(answer, dict) or not isinstance(observation := answer.get("observation"), dict | str):
            raise EnvironmentFailure(f"the server's answer has no observation: {shortened(json.dumps(answer), 200)}")
        reward, done = answer.get("reward"), answer.get("done", False)
        number = isinstance(reward, int | float | None) and not isinstance(reward, bool) and finite(reward or 0)
        if not number or not isinstance(done, bool):
            raise EnvironmentFailure(f"the server's answer has the reward {reward!r} and done {done!r}"[:300])
        self.total += float(reward or 0.0)
        if not finite(self.total):
            raise EnvironmentFailure(f"the sum of the server's rewards is {self.total}")
        self.over = done
        return self.environment.text(observation)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _posts(environment: ServerEnvironment) -> tuple[Ask, Callable[[], None]]:
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))

    def ask(path: str, fields: Mapping[str, Any]) -> Any:
        body = json.dumps(fields).encode()
        request = urllib.request.Request(f"{environment.url}/{path}", body, {"Content-Type": "application/json"})
        try:
            with opener.open(request, timeout=environment.seconds) as answer:
                text = answer.read(LARGEST + 1)
        except urllib.error.HTTPError as error:
            raise EnvironmentFailure(f"{environment.url}/{path} answered with status {error.code}") from error
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            known = cause if isinstance(cause, Exception) else error
            raise EnvironmentFailure(f"{environment.url}/{path}: {cause or type(error).__name__}") from known
        return _parsed(text, environment.url)

    return ask, lambda: None


def _socket(environment: ServerEnvironment) -> tuple[Ask, Callable[[], None]]:
    """OpenEnv's WebSocket: one connection is one session."""
    try:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect
    except ImportError as error:
        raise UserError(f"{environment.name} needs websockets ({error}): pip install websockets") from error
    stack = ExitStack()
    try:
        connecting = connect(
            environment.url, open_timeout=environment.seconds, close_timeout=CLOSING, max_size=LARGEST, proxy=None
        )
        connection = stack.enter_context(connecting)
    except (OSError, WebSocketException) as error:
        raise EnvironmentFailure(f"{environment.url}: {error or type(error).__name__}") from error

    def ask(kind: str, fields: Mapping[str, Any]) -> Any:
        try:
            data = fields if kind == "reset" else fields["action"]
            connection.send(json.dumps({"type": kind, "data": data}))
            answer = _parsed(connection.recv(timeout=environment.seconds), environment.url)
        except (OSError, WebSocketException) as error:
            raise EnvironmentFailure(f"{environment.url}: {error or type(error).__name__}") from error
        if not isinstance(answer, dict) or answer.get("type") != "observation":
            raise EnvironmentFailure(f"{environment.url} answered {shortened(json.dumps(answer), 200)}")
        return answer.get("data")

    return ask, stack.close


def _parsed(text: bytes | str, url: str) -> Any:
    if len(text) > LARGEST:
        raise EnvironmentFailure(f"{url} answered with more than {LARGEST:,} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EnvironmentFailure(f"{url} answered with something that is not JSON") from error
