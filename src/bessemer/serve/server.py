"""`bessemer serve`: one process, one port, until it is told to stop.

SIGTERM and Ctrl-C: no new connection is taken and no new request; answers under way may end within `drain_seconds`,
then they end with an error event. A second signal does not wait. The exit status is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import math
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from bessemer.errors import UserError
from bessemer.serve.app import build
from bessemer.serve.connection import Limits, protocol
from bessemer.serve.models import Models, offered
from bessemer.serve.service import Launch, launch
from bessemer.serve.settings import Settings

BACKLOG = 2048
"""Connections the system keeps for us until we get to them."""
LAST_SECONDS = 5
"""For error events to reach their clients after the drain."""


def serve(
    model: str | Path, *, host: str = "127.0.0.1", port: int = 8000, name: str | None = None,
    settings: Settings | None = None, limits: Limits | None = None, drain_seconds: float = 30.0, force: bool = False,
    launch: Launch = launch, say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:  # fmt: skip
    """Serves a run, a stage or a model directory until a signal ends it.

    force: allow a host that other machines reach without an API key. port 0 takes a free one. `launch` starts a model's
    worker.
    UserError: no such model, a tokenizer that is not the model's, the port is taken, the host is not this machine's.
    """
    settings = settings or Settings()
    if not _loopback(host) and not settings.api_key and not force:
        raise UserError(
            f"{host} can be reached from other machines, and without an API key anybody could use the model; set one "
            "(--api-key), stay on 127.0.0.1, or say --force"
        )
    if _loopback(host) and not settings.api_key and settings.hosts is None:
        settings = replace(settings, hosts=("127.0.0.1", "localhost", "[::1]"))
    models = offered(model, settings, name, launch)
    for line in models.broken:
        say(f"not served: {line}")
    if settings.compile:
        say("compiling the decoding steps: a minute or two the first time, seconds later")
    with _bind(host, port) as bound:
        models.preload()
        bound.listen(BACKLOG)  # who reads the line may call at once
        say(f"bessemer: http://{_shown(host)}:{bound.getsockname()[1]}  models: {', '.join(models.offers)} "
            f"(default {models.default.name}); Ctrl-C stops")  # fmt: skip
        _room_for_connections()
        server = Server(models, settings, limits or Limits(), drain_seconds)
        gc.freeze()  # what is there by now stays; to look through it again and again would cost 0.1 s each time
        server.run(sockets=[bound])


class Server(uvicorn.Server):
    """uvicorn with our limits, our way to end, and no logs but errors."""

    def __init__(self, models: Models, settings: Settings, limits: Limits, drain_seconds: float):
        self.models, self.drain_seconds = models, drain_seconds
        self.application = build(models, settings)
        super().__init__(
            uvicorn.Config(
                self.application, http=protocol(limits), ws="none", lifespan="on", log_level="error", access_log=False,
                server_header=False, proxy_headers=False,
                timeout_graceful_shutdown=math.ceil(drain_seconds) + LAST_SECONDS,
            )
        )  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.application.state.draining = True
        late = asyncio.create_task(self._end_what_is_late())
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again afterwards: to stop when asked to is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.drain_seconds = 0.0
        self.should_exit = True

    async def _end_what_is_late(self) -> None:
        waited = 0.0
        while waited < self.drain_seconds:
            await asyncio.sleep(0.1)
            waited += 0.1
        while True:
            self.models.abort("the server is shutting down and the rest of the answer is lost")
            await asyncio.sleep(0.5)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise UserError(f"{host!r} is no address of this machine ({error.strerror}); use 127.0.0.1") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use; choose another one with --port, or 0 for a free one") from error
        raise UserError(f"cannot serve at {host}:{port} ({error.strerror}); choose another --host or --port") from error
    return bound


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _room_for_connections() -> None:
    """As many open files as the system allows: the usual 1024 are few for a server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
