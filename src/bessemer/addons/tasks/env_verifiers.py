"""`verifiers:NAME`: an environment of Prime Intellect's package verifiers, version 0.4.

There an environment is a set of tasks and a loop, and agents play it: programs ("harnesses") that ask an
OpenAI-compatible endpoint for every turn. Ours (env_endpoint.py) hands each request to the episode as what the model
reads, and answers it with what the model has written. The environment's own loop, tools, stop conditions, time limits
and rewards run unchanged; an episode whose reward is `solved` or more is correct, and one below it earns its share.

A program may only add to a conversation. One that rewrites an earlier message fails its episodes, because the model
would then read something other than what it wrote.

NAME is the id of an installed set of tasks. NAME.toml is a file with the package's own table, as under [env] in its
configurations: other settings, another environment or program, other agents' models. One agent plays with the policy:
the one without a model of its own. Without a setting, a program is a plain chat loop in this process (env_chat.py). A
program that runs commands of the model must run in a container.
"""

from __future__ import annotations

import itertools
import queue
import tomllib
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

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
from bessemer.config.places import located, looked_in
from bessemer.errors import UserError
from bessemer.tasks.base import WRONG_VALUE, Problem, Verdict, split_of_text

OLDEST, NEWEST = (0, 4), (0, 5)
"""Versions from the first, before the second."""
MOST_TASKS = 100_000
"""Tasks that are listed of a set without an end."""
SPLITS = ("train", "test")


def library() -> Any:
    """The module `verifiers.v1`. UserError unless the package is installed in a version that this file is written
    for."""
    advice = 'pip install "bessemer[verifiers]"'
    try:
        installed = version("verifiers")
    except PackageNotFoundError:
        raise UserError(f"verifiers:NAME needs the package verifiers: {advice}") from None
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdecimal())
    if not OLDEST <= numbers < NEWEST:
        raise UserError(f"verifiers {installed} is installed, and verifiers:NAME needs >=0.4,<0.5: {advice}")
    try:
        import verifiers.v1
    except ImportError as error:
        raise UserError(f"verifiers {installed} cannot be loaded ({error}): {advice}") from error
    return verifiers.v1


class VerifiersEnvironment(Environment):
    """`verifiers:NAME` or `verifiers:FILE.toml`, with @train or @test if all its tasks belong to that split. Otherwise
    a task is held out if the hash of its key says so, about one in ten."""

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
    suffix: ClassVar = ".toml"

    def __init__(self, environment: str, **settings: Any) -> None:
        from bessemer.addons.tasks import env_endpoint

        self.name = f"verifiers:{environment}"
        super().__init__(**settings)
        self.solved = self.options.solved or self.solved
        self.vf = library()
        source, only_split = _split_of_name(environment)
        table = _table(source) if source.endswith(self.suffix) else {"taskset": {"id": source}}
        try:
            self.loaded = env_endpoint.loaded(table, self.name)
            tasks = list(itertools.islice(self.loaded.environment.taskset, MOST_TASKS))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.name}: verifiers cannot load it ({error}); install the package of the environment first"
            ) from error
        self.rows: dict[str, list[Any]] = {split: [] for split in SPLITS}
        for task in tasks:
            self.rows[only_split or split_of_text(f"verifiers {task.key}")].append(task)

    @classmethod
    def source(cls, argument: str) -> tuple[str, str | None] | None:
        name, only_split = _split_of_name(argument)
        return (name, only_split) if name.endswith(cls.suffix) else None

    def size(self, split: str) -> int | None:
        return len(self.rows[split])

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rows = self.rows[split]
        if not rows:
            raise UserError(
                f"{self.name} has no {split} task among its {sum(map(len, self.rows.values()))}; write "
                f"{self.name}@{split} if all of them belong to it"
            )
        row = index % len(rows)
        meta = {"split": split, "row": row, "difficulty": 0}
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", rows[row].data.prompt_text, language, meta)

    def reset(self, problem: Problem, seed: int) -> Episode:
        task = self.rows[problem.meta["split"]][problem.meta["row"]]
        episode = VerifiersEpisode(self, task)
        if episode.tools != self.schemas:
            episode.close()
            raise EnvironmentFailure("its tools are other than those of its first task")
        return episode

    @cached_property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools of the first task, which its program names in its first request."""
        if not self.loaded.has_tools:
            return []
        episode = VerifiersEpisode(self, next(task for rows in self.rows.values() for task in rows))
        episode.close()
        return episode.tools

    @cached_property
    def endpoint(self) -> Any:
        from bessemer.addons.tasks.env_endpoint import PolicyEndpoint

        endpoint = PolicyEndpoint(self.vf, self.loaded.environment, self.seconds)
        weakref.finalize(self, endpoint.close)
        return endpoint


class VerifiersEpisode:
    """One episode of the environment, in the endpoint's event loop. A thread of ours waits for its requests."""

    def __init__(self, task: VerifiersEnvironment, row: Any) -> None:
        self.task, self.fault = task, ""
        self.requests: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        """Bodies of the program's requests; None after the last."""
        self.messages: list[Message] = []
        """The whole conversation up to the model's next turn."""
        self.running = task.endpoint.play(self, row)
        self.running.add_done_callback(lambda _: self.requests.put(None))
        first = self._next()
        if first is None:
            raise EnvironmentFailure(self._failure() or "it asked the model for nothing")
        self.messages = _messages(first)
        self.tools: list[dict[str, Any]] = list(first.get("tools") or ())
        self.start: Sequence[Message] = list(self.messages)

    def step(self, action: ModelTurn) -> Observation:
        self.task.endpoint.reply(self, action)
        request = self._next()
        if request is None:
            if failure := self._failure():
                raise EnvironmentFailure(failure)
            return Observation(done=True)
        known = [*self.messages, {"role": "assistant", "content": action.text}]
        messages = _messages(request)
        if messages[: len(known)] != known or len(messages) == len(known):
            self.close()
            raise EnvironmentFailure("its program rewrote the conversation, which is not supported")
        self.messages = messages
        return Observation(messages[len(known) :])

    def verdict(self, text: str) -> Verdict:
        if not self.running.done():  # a bound of ours ended it before its own loop did
            return Verdict(False, True, WRONG_VALUE, None, partial=0.0)
        if failure := self._failure():
            raise EnvironmentFailure(failure)
        reward = self._trace().reward
        if not finite(reward):
            raise EnvironmentFailure(f"its reward is {reward}")
        return verdict_of_reward(reward, self.task.solved)

    def close(self) -> None:
        self.running.cancel()

    def _next(self) -> Mapping[str, Any] | None:
        try:
            return self.requests.get(timeout=self.task.seconds)
        except queue.Empty:
            self.close()
            raise EnvironmentFailure(f"it did not answer within {self.task.seconds:g} s") from None

    def _failure(self) -> str:
        """Why the episode, which is over, has no reward; "" if it has one."""
        if self.fault:
            return self.fault
        try:
            episode = self.running.result()
        except CancelledError:
            return "it was given up"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if not episode.traces or not episode.ok:
            errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
            return " ".join(f"{errors[-1].type}: {errors[-1].message}".split()) if errors else "it was not completed"
        return ""

    def _trace(self) -> Any:
        """What the policy's agent did last."""
        traces = self.running.result().traces
        return [trace for trace in traces if trace.agent is None or trace.agent.name == self.task.loaded.seat][-1]


def _split_of_name(argument: str) -> tuple[str, str | None]:
    """NAME@train gives (NAME, "train")."""
    name, mark, split = argument.rpartition("@")
    return (name, split) if mark and split in SPLITS else (argument, None)


def _table(name: str) -> dict[str, Any]:
    path = located(name)
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{name}{looked_in(name)} holds no settings of an environment ({error})") from error


def _messages(request: Mapping[str, Any]) -> list[Message]:
    """The messages of a request for a chat completion, as text."""
    return [{"role": _role(message), "content": _content(message)} for message in request["messages"]]


def _role(message: Mapping[str, Any]) -> str:
    role = message["role"]
    return role if role in ("system", "user", "assistant", "tool") else "user"


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n".join(part.get("text", "") for part in content)
