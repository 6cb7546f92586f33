"""Environments: tasks whose problems are episodes of several turns. The model writes, the environment answers, until
the environment or a bound ends the episode; then there is one verdict.

    environment.reset(problem, seed) -> episode        episode.start: what the model reads first
    episode.step(turn) -> observation                  after every turn of the model
    episode.verdict(text)                              at the end; `text` is the model's last turn

The simplest environment is a task with tools: it inherits `make` and `grade` from its task and lists its tools. A turn
that calls tools is answered with their outputs; a turn without a call ends the episode and is verified as usual.

What an environment returns should depend only on (problem, seed, turns); a resumed or replayed run then has the same
bits. An external server does not ensure that, nor does a program of the tool `python` that reads a clock or random
numbers: a resumed run gets other samples for rollouts that it has to sample again, and a replay may differ.

The model reads the errors that it causes inside an episode (a call that is not JSON, a tool that fails). Any other
error is an `EnvironmentFailure`: the episode counts as failed, is not trained on, and the run continues.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

from bessemer.errors import UserError
from bessemer.repeatable import repeatable
from bessemer.tasks.base import CORRECT, WRONG_VALUE, Problem, Task, TaskOptions, Verdict, Written, page

FAILED = "environment-failed"
"""Reason of the verdict on an episode that the environment could not finish."""
SLACK = 1e-9
"""What a sum of rewards may lack: 0.7 + 0.2 + 0.1 is a little less than 1."""
MOST_STUCK = 16
"""A run stops once this many calls hold a thread for longer than their limit and PATIENCE."""
PATIENCE = 10.0
"""Seconds beyond its limit after which a call counts as stuck; one with a limit of its own may end a little later."""
Message = dict[str, str]
_Result = TypeVar("_Result")


class EnvironmentFailure(Exception):
    """The environment, not the model, is at fault: a server that died, an invalid answer."""


class Invocation(NamedTuple):
    """A tool call that the model wrote."""

    name: str
    arguments: Mapping[str, Any]
    fault: str = ""
    """Why the call cannot be made, in words for the model: what it wrote was not JSON."""


@dataclass(frozen=True)
class ModelTurn:
    """One turn of the model."""

    text: str
    """All of it, including the opening that the template wrote."""
    calls: tuple[Invocation, ...] = ()


@dataclass(frozen=True)
class Observation:
    """What the model reads next: messages with the role "tool" or "user". None are needed if the episode is over."""

    messages: Sequence[Message] = ()
    done: bool = False


class Episode(Protocol):
    start: Sequence[Message]

    def step(self, turn: ModelTurn) -> Observation: ...

    def verdict(self, text: str) -> Verdict: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class LocalTool:
    """A tool that runs in this process or below it. `run` takes the arguments by name and returns text; what it raises
    is shown to the model."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object."""
    run: Callable[..., str]

    @property
    def schema(self) -> dict[str, Any]:
        """The form that OpenAI's API and chat templates take."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}

    def fault(self, arguments: Mapping[str, Any]) -> str | None:
        """What is wrong with the arguments, by their names and plain types; None if nothing."""
        known = self.parameters.get("properties", {})
        for name in self.parameters.get("required", ()):
            if name not in arguments:
                return f"{self.name} needs the argument {name}"
        for name, value in arguments.items():
            if name not in known:
                return f"{self.name} has no argument {name[:40]}"
            expected = known[name].get("type", ())
            kinds = [expected] if isinstance(expected, str) else list(expected)
            if kinds and not any(_is_a(value, kind) for kind in kinds):
                return f"the argument {name} of {self.name} must be of type {' or '.join(kinds)}"
        return None


_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
    "null": type(None),
}  # fmt: skip


def _is_a(value: object, kind: str) -> bool:
    odd = isinstance(value, bool) and kind != "boolean"  # True is an int
    return kind not in _TYPES or (isinstance(value, _TYPES[kind]) and not odd)


@dataclass(frozen=True)
class WrittenTurns(Written):
    """A page with several turns, of which `response` is the last."""

    turns: tuple[dict[str, Any], ...] = ()
    """The messages between question and response, such as calls of tools and their outputs, in OpenAI's form."""

    @property
    def text(self) -> str:
        return page(self.problem.prompt, "\n".join([*map(_shown, self.turns), self.response]))

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        question, answer = super().messages
        return question, *self.turns, answer


def _shown(message: dict[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return " ".join([message["content"], *(f"{call['name']} {call['arguments']}" for call in calls)]).strip()


@dataclass(frozen=True)
class RewardOptions(TaskOptions):
    """Settings of an environment that gives rewards."""

    solved: float | None = None
    """Least reward of a correct episode. Default: the environment's own, 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.solved, int | float) and not isinstance(self.solved, bool)
        if self.solved is not None and not (number and 0 < self.solved < math.inf):
            raise UserError(f"solved is {self.solved!r}; set the reward of a solved episode, a number above 0")


def verdict_of_reward(reward: float, solved: float) -> Verdict:
    """The verdict on an episode with this reward: correct from `solved` on; the credit is its share of `solved`, from
    0 to 1."""
    right = reward >= solved - SLACK
    credit = 1.0 if right else max(0.0, reward / solved)
    return Verdict(right, True, CORRECT if right else WRONG_VALUE, f"{reward:g}", partial=credit)


class Environment(Task):
    """Base class. A subclass is a task that lists `tools`, or overrides `reset` to return its own episodes."""

    episodic = True
    tools: Sequence[LocalTool] = ()
    described: bool = True
    """Whether the prompt describes the tools; a model that has read pages with calls needs no description."""
    max_turns: int = 6
    """Maximum turns of the model."""
    seconds: float = 10.0
    """Time limit of all calls of one turn together, and of one step of a subclass's own episode."""
    observed: int = 2_000
    """Maximum characters of one answer to the model; the rest is left out. What the model reads first stays whole."""
    parallel: int = 1
    """Maximum episodes that step at the same time, in threads; no answer may depend on it."""

    def reset(self, problem: Problem, seed: int) -> Episode:
        """A new episode. `seed` is the same for all samples of a problem in a rollout, and differs in the next."""
        return ToolEpisode(self, problem)

    @classmethod
    def repeated(cls) -> dict[str, Any]:
        return {} if cls.reset is Environment.reset else {"reset": _repeated_episode(cls.reset)}

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self.tools] if self.described else []


def _repeated_episode(reset: Callable[..., Episode]) -> Callable[..., Episode]:
    """`reset` of an environment whose episodes draw the same random numbers after the same turns. Episodes that step at
    the same time share the generators, so theirs are left alone."""

    @wraps(reset)
    def call(self: Environment, problem: Problem, seed: int) -> Episode:
        if self.parallel > 1:
            return reset(self, problem, seed)
        with repeatable(self.name, "reset", problem.id, seed):
            return _RepeatedEpisode(reset(self, problem, seed), (self.name, problem.id, seed))

    return call


class _RepeatedEpisode:
    def __init__(self, episode: Episode, parts: tuple[object, ...]) -> None:
        self.episode, self.parts, self.start, self.close = episode, parts, episode.start, episode.close

    def step(self, turn: ModelTurn) -> Observation:
        self.parts = (*self.parts, turn.text)
        with repeatable(*self.parts):
            return self.episode.step(turn)

    def verdict(self, text: str) -> Verdict:
        with repeatable(*self.parts, "verdict"):
            return self.episode.verdict(text)


class ToolEpisode:
    """Answers calls of the environment's tools; a turn without a call is the last."""

    def __init__(self, environment: Environment, problem: Problem) -> None:
        self.environment, self.problem = environment, problem
        self.start: Sequence[Message] = [{"role": "user", "content": problem.prompt}]
        self.said: tuple[str, ...] = ()

    def step(self, turn: ModelTurn) -> Observation:
        until = time.monotonic() + self.environment.seconds
        self.said = (*self.said, turn.text)
        alone = self.environment.parallel == 1  # episodes that step at the same time would share the generators
        with repeatable("tools", self.problem.id, *self.said) if alone else nullcontext():
            outputs = [self._output(call, until) for call in turn.calls]
        return Observation([{"role": "tool", "content": text} for text in outputs], done=not outputs)

    def verdict(self, text: str) -> Verdict:
        return self.environment.verify(self.problem, text)

    def close(self) -> None:
        pass

    def _output(self, call: Invocation, until: float) -> str:
        if call.fault:
            return f"error: {call.fault}"
        tools = {tool.name: tool for tool in self.environment.tools}
        if call.name not in tools:
            return f"error: there is no tool {call.name[:40]}; there is {', '.join(tools)}"
        tool = tools[call.name]
        if fault := tool.fault(call.arguments):
            return f"error: {fault}"
        if time.monotonic() >= until:
            return f"error: {tool.name} was not started: the {self.environment.seconds:g} s of this turn are used up"
        try:
            return str(bounded(lambda: tool.run(**call.arguments), until - time.monotonic()))
        except UserError:
            raise
        except TimeoutError:
            return f"error: {tool.name} did not return within {self.environment.seconds:g} s"
        except Exception as error:
            return f"error: {error}" if isinstance(error, ValueError) else f"error: {type(error).__name__}: {error}"


def finite(number: float) -> bool:
    """Whether a number is finite as a float, too."""
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of 309 digits
        return False


def bounded(function: Callable[[], _Result], seconds: float) -> _Result:
    """The result of a function; TimeoutError after `seconds`. A thread cannot be ended from outside, so one that never
    returns stays until the process ends; UserError if there are MOST_STUCK."""
    if seconds <= 0:  # nothing could come of a thread
        raise TimeoutError
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="bessemer-tool", daemon=True)
    thread.start()
    thread.join(seconds)
    if not thread.is_alive():
        return future.result()
    now = time.monotonic()
    _late[thread] = now + PATIENCE
    if (stuck := sum(late.is_alive() and since <= now for late, since in list(_late.items()))) >= MOST_STUCK:
        raise UserError(f"{stuck} calls of tools or environments have not returned; give them their own time limits")
    raise TimeoutError


_late: WeakKeyDictionary[threading.Thread, float] = WeakKeyDictionary()
"""Threads of calls beyond their limits, and from when on they count as stuck."""
