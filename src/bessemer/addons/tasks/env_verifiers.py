"""`verifiers:NAME`: an environment of the package verifiers, as `verifiers.load_environment(NAME)` finds it.

The environment runs its own loop (`Environment.rollout`: its turns, tools, stop conditions, time limits and cleanup) in
a thread, and asks our client for every answer; the client returns what the model has written. The environment's rubric
scores the episode: a reward of `solved` or more is correct, and one below it earns its share. So every class of
environment works that only adds to its messages. One that rewrites them fails its episodes, because the model would
then read something other than what it wrote.

Written for the environments of versions 0.1 to 0.3 (in 0.3 `verifiers.legacy`); 0.4 has others, around agents that run
by themselves, and is refused. The package needs some fifty others and pins some, so it is not one of our extras.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

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
from bessemer.tasks.base import WRONG_VALUE, Problem, Verdict


def library() -> Any:
    """The module with `load_environment`, `Client` and `types`."""
    try:
        for name in ("verifiers", "verifiers.legacy"):
            module = import_module(name)
            if hasattr(module, "load_environment"):
                return module
    except ImportError as error:
        raise UserError(f'verifiers environments need the package ({error}): pip install "verifiers<0.4"') from error
    raise UserError('this version of verifiers has no load_environment: pip install "verifiers<0.4"')


class VerifiersEnvironment(Environment):
    """`verifiers:NAME`. Problems are the rows of its data set, held-out ones the rows of its evaluation set."""

    domain = "tools"
    all_languages = ("en",)
    phrasings = ("seen",)
    seconds = 60.0
    parallel = 32
    Options = RewardOptions
    options: RewardOptions
    solved: float = 1.0
    """The least reward of a correct episode."""
    max_turns = 1_000
    """The environment's own bound decides."""

    def __init__(self, environment: str, **settings: Any) -> None:
        self.name = f"verifiers:{environment}"
        super().__init__(**settings)
        self.solved = self.options.solved or self.solved
        self.vf = library()
        try:
            self.environment = self.vf.load_environment(environment)
            self.rows = {"train": self.environment.get_dataset(), "test": self.environment.get_eval_dataset()}
        except Exception as error:
            raise UserError(
                f"{self.name}: verifiers cannot load it ({error}); install the environment's package first"
            ) from error

    def size(self, split: str) -> int | None:
        return len(self.rows[split])

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        row = dict(self.rows[split][index % len(self.rows[split])])
        prompt = row.get("prompt")
        text = prompt if isinstance(prompt, str) else "\n".join(_content(message) for message in prompt or [])
        meta = {"row": row, "difficulty": 0}
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", text, language, meta)

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _Episode(self, problem)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [_function(tool) for tool in getattr(self.environment, "tool_defs", None) or ()]


class _Episode:
    """One rollout of the environment in a thread with an event loop of its own."""

    def __init__(self, task: VerifiersEnvironment, problem: Problem) -> None:
        self.task, self.seconds = task, task.seconds
        self.asked: queue.Queue[Sequence[Any] | None] = queue.Queue()
        """Prompts of the environment; None after the last."""
        self.waiting: tuple[asyncio.AbstractEventLoop, asyncio.Future[ModelTurn | None]] | None = None
        """Where the environment waits for the model's turn; a turn of None gives up the episode."""
        self.state: Mapping[str, Any] = {}
        self.error: BaseException | None = None
        row = problem.meta["row"]
        threading.Thread(target=self._run, args=(row,), name="bessemer-episode", daemon=True).start()
        self.seen: list[Any] = list(self._next() or [])
        if not self.seen:
            raise EnvironmentFailure("the environment asked nothing")
        self.start: Sequence[Message] = [{"role": _role(one), "content": _content(one)} for one in self.seen]

    def step(self, action: ModelTurn) -> Observation:
        self._reply(action)
        prompt = self._next()
        if prompt is None:
            return Observation(done=True)
        known = len(self.seen) + 1  # its messages, the answer, and the new ones
        before = [_content(one) for one in prompt[: len(self.seen)]]
        if before != [_content(one) for one in self.seen] or len(prompt) <= known:
            raise EnvironmentFailure("the environment rewrote the conversation, which is not supported")
        self.seen = list(prompt)
        return Observation([{"role": _role(one), "content": _content(one)} for one in prompt[known:]])

    def verdict(self, text: str) -> Verdict:
        reward = self.state.get("reward")
        if not isinstance(reward, int | float):  # a bound of ours ended it before its own loop did
            return Verdict(False, True, WRONG_VALUE, None, partial=0.0)
        if not finite(reward):
            raise EnvironmentFailure(f"its reward is {reward}")
        return verdict_of_reward(reward, self.task.solved)

    def close(self) -> None:
        self._reply(None)

    def _reply(self, action: ModelTurn | None) -> None:
        if self.waiting is not None:
            (loop, future), self.waiting = self.waiting, None
            if not future.done():  # else the environment has given up waiting; it may have ended, and its loop with it
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(future.set_result, action)

    def _next(self) -> Sequence[Any] | None:
        try:
            prompt = self.asked.get(timeout=self.seconds)
        except queue.Empty:
            self.close()
            raise EnvironmentFailure(f"{self.task.name} did not answer within {self.seconds:g} s") from None
        if self.error is not None:
            raise EnvironmentFailure(f"{type(self.error).__name__}: {self.error}") from self.error
        return prompt

    def _run(self, row: Mapping[str, Any]) -> None:
        try:
            asyncio.run(self._rollout(row))
        except BaseException as error:
            self.error = error
        self.asked.put(None)

    async def _rollout(self, row: Mapping[str, Any]) -> None:
        environment = self.task.environment
        state = await environment.rollout(dict(row), _client(self.task.vf, self), "policy", {})
        if state.get("error") is not None:
            raise RuntimeError(str(state["error"]))
        await environment.rubric.score_rollout(state)
        self.state = state

    async def answer(self, prompt: Sequence[Any]) -> ModelTurn:
        """The model's turn on a prompt; called by the client in the episode's thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ModelTurn | None] = loop.create_future()
        self.waiting = loop, future  # no thread of a pool may wait here: the interpreter would wait for it at exit
        self.asked.put(list(prompt))
        action = await future
        if action is None:
            raise RuntimeError("the episode was given up")
        return action


def _client(vf: Any, episode: _Episode) -> Any:
    """A client for the library that answers with the episode's turns."""
    types = import_module(f"{vf.__name__}.types")

    class PolicyClient(vf.Client):
        def __init__(self) -> None:
            pass

        def setup_client(self, config: Any) -> Any:
            return None

        async def close(self) -> None:
            pass

        async def get_response(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            action = await episode.answer(prompt)
            calls = [
                types.ToolCall(id=str(number), name=call.name, arguments=json.dumps(dict(call.arguments)))
                for number, call in enumerate(action.calls)
            ]
            message = types.ResponseMessage(
                content=action.text, tool_calls=calls or None, finish_reason="tool_calls" if calls else "stop",
                is_truncated=False, tokens=None,
            )  # fmt: skip
            return types.Response(id="1", created=0, model="policy", usage=None, message=message)

    for name in getattr(PolicyClient, "__abstractmethods__", ()):
        setattr(PolicyClient, name, lambda self, *args, **kwargs: None)
    PolicyClient.__abstractmethods__ = frozenset()  # the calls to a server, which are never made
    return PolicyClient()


def _role(message: Any) -> str:
    role = message["role"]
    return role if role in ("system", "user", "assistant", "tool") else "user"


def _content(message: Any) -> str:
    content = message["content"]
    if isinstance(content, str) or content is None:
        return content or ""
    parts = [part.get("text", "") if hasattr(part, "get") else getattr(part, "text", "") for part in content]
    return "\n".join(parts)


def _function(tool: Any) -> dict[str, Any]:
    """One of their tools in OpenAI's format."""
    named = {name: getattr(tool, name, None) or "" for name in ("name", "description")}
    return {"type": "function", "function": {**named, "parameters": getattr(tool, "parameters", None) or {}}}
