"""The endpoint at which programs of the package verifiers ask for the policy's turns (env_verifiers.py).

A thread has an event loop, in which the environment's servers and all its episodes live, and an HTTP server on
127.0.0.1 with one route, chat completions. The header X-Session-ID, the random id of an agent's record, says whose turn
is asked for. Nobody knows such an id who was not given it by the package.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from bessemer.addons.tasks.environment import EnvironmentFailure, ModelTurn
from bessemer.errors import UserError

HARNESS = "bessemer"
"""The id of env_chat.py as a program of the package."""
SESSION = "X-Session-ID"
LARGEST = 64 << 20
"""Bytes of a request."""
MODEL = "policy"


class Loaded(NamedTuple):
    """An environment of the package."""

    environment: Any
    seat: str
    """The agent that the policy plays."""
    has_tools: bool


def loaded(table: Mapping[str, Any], name: str) -> Loaded:
    """The environment of a table. UserError if the policy plays not exactly one of its agents, or if a program would
    run the model's commands on this machine."""
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.utils.loaders import default_harness_id, load_environment, resolve_env_config

    from bessemer.addons.tasks import env_chat

    sys.modules[f"verifiers.v1.harnesses.{HARNESS}"] = env_chat  # where the package looks for a program by its id
    seats = agent_config_fields(resolve_env_config(dict(table)))
    taskset = str(table.get("taskset", {}).get("id", ""))
    own = default_harness_id(taskset)
    harness = {"id": HARNESS if own == "bash" else own}
    agents = {
        seat: {"harness": harness, "runtime": {"type": "subprocess"}, **dict(table.get(seat, {}))} for seat in seats
    }
    environment = load_environment(resolve_env_config({**table, **agents}))
    played = [seat for seat, agent in agent_config_fields(environment.config).items() if agent.model is None]
    if len(played) != 1:
        raise UserError(
            f"{name} has {len(played)} agents without a model of their own ({', '.join(played) or 'none'}), and the "
            "policy plays one; give the others model and client in a file NAME.toml"
        )
    for seat, agent in agent_config_fields(environment.config).items():
        if environment._harnesses[seat].EXECUTES_CODE and agent.runtime.type == "subprocess":
            raise UserError(
                f"{name}: the program {agent.harness.id} of {seat} runs the model's commands on this machine; set "
                f'{seat}.runtime.type to "docker" or another container in a file NAME.toml, or {seat}.harness.id to '
                f'"{HARNESS}"'
            )
    tasks = type(environment.taskset)
    has_tools = bool(
        tasks.toolsets(environment.taskset.config)
        or tasks.task_type().toolsets(environment.taskset.config.task)
        or environment._harnesses[played[0]].EXECUTES_CODE
    )
    return Loaded(environment, played[0], has_tools)


class PolicyEndpoint:
    """The loop of one environment. UserError if it does not start within `seconds`."""

    def __init__(self, vf: Any, environment: Any, seconds: float) -> None:
        self.vf, self.environment = vf, environment
        self.episodes: dict[str, Any] = {}
        """Those being played, by the ids of their agents' records."""
        self.waiting: dict[Any, asyncio.Future[ModelTurn]] = {}
        """Where an episode's program waits for the model."""
        self.loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        started: Future[str] = Future()
        threading.Thread(target=self._run, args=(started,), name="bessemer-verifiers", daemon=True).start()
        try:
            self.url = started.result(seconds)
        except Exception as error:
            self.close()
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            raise UserError(f"the servers of the environment do not start ({why})") from error
        client = vf.EvalClientConfig(base_url=self.url, api_key_var="BESSEMER_HAS_NO_KEY")
        self.context = vf.ModelContext(model=MODEL, client=client)

    def play(self, episode: Any, task: Any) -> Future[Any]:
        """The result of the package's `run_episode`, once it is over."""
        return asyncio.run_coroutine_threadsafe(self._play(episode, task), self.loop)

    def reply(self, episode: Any, turn: ModelTurn) -> None:
        """Answers the request that the episode's program waits for, if it still waits."""

        def answer() -> None:
            future = self.waiting.pop(episode, None)
            if future is not None and not future.done():
                future.set_result(turn)

        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(answer)

    def close(self) -> None:
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._over.set)

    def _run(self, started: Future[str]) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            try:
                runner.run(self._serve(started))
            except BaseException as error:
                if not started.done():
                    started.set_exception(error)

    async def _serve(self, started: Future[str]) -> None:
        from aiohttp import web

        app = web.Application(client_max_size=LARGEST)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            async with self.environment.serving():
                started.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
                await self._over.wait()
        finally:
            await runner.cleanup()

    async def _play(self, episode: Any, task: Any) -> Any:
        ids: list[str] = []

        def minted(trace: Any) -> None:
            self.episodes[trace.id] = episode
            ids.append(trace.id)

        try:
            return await self.environment.run_episode(task, self.context, on_trace=minted)
        finally:
            for key in ids:
                self.episodes.pop(key, None)
            self.waiting.pop(episode, None)

    async def _chat(self, request: Any) -> Any:
        from aiohttp import web

        episode = self.episodes.get(request.headers.get(SESSION, ""))
        if episode is None:
            return web.json_response({"error": {"message": "no episode has this session"}}, status=404)
        try:
            body = await request.json()
            turn = await self._turn(episode, body)
        except (ValueError, EnvironmentFailure) as error:
            episode.fault = episode.fault or str(error)
            return web.json_response({"error": {"message": str(error)}}, status=400)
        message, reason = _message(turn)
        if body.get("stream"):
            return await _streamed(request, message, reason)
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return web.json_response(_completion("chat.completion", [choice]))

    async def _turn(self, episode: Any, body: Mapping[str, Any]) -> ModelTurn:
        """What the model writes next."""
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
            raise EnvironmentFailure("its program sent a request without messages")
        if episode in self.waiting:
            raise EnvironmentFailure("its program asked for two turns at once, which is not supported")
        future: asyncio.Future[ModelTurn] = self.loop.create_future()
        self.waiting[episode] = future
        episode.requests.put(body)
        return await future


def _message(turn: ModelTurn) -> tuple[dict[str, Any], str]:
    """A turn as a message of OpenAI's API, and its finish reason. Arguments that are not JSON are passed on as the
    complaint about them, which is none either, so that the program says so."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if not turn.calls:
        return message, "stop"
    message["tool_calls"] = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.fault or json.dumps(dict(call.arguments))},
        }
        for number, call in enumerate(turn.calls)
    ]
    return message, "tool_calls"


def _completion(kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return {"id": "1", "object": kind, "created": 0, "model": MODEL, "choices": choices, "usage": usage}


async def _streamed(request: Any, message: dict[str, Any], reason: str) -> Any:
    """The answer as one server-sent event, for programs that ask for a stream."""
    from aiohttp import web

    calls = [{"index": number, **call} for number, call in enumerate(message.get("tool_calls", ()))]
    choice = {"index": 0, "delta": {**message, **({"tool_calls": calls} if calls else {})}, "finish_reason": reason}
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await stream.prepare(request)
    chunk = json.dumps(_completion("chat.completion.chunk", [choice]))
    await stream.write(f"data: {chunk}\n\ndata: [DONE]\n\n".encode())
    await stream.write_eof()
    return stream
