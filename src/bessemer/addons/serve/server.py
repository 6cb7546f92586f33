"""`bessemer serve`: one process, one port, until a signal.

On SIGTERM or Ctrl-C the server accepts no new connection and no new request; unfinished answers have `drain_seconds` to
complete, then they end with an error event. A second signal ends the wait. The exit status is 0.
"""

from __future__ import annotations

import asyncio
import gc
import math
import socket
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from bessemer.addons.serve import ServeConfig
from bessemer.addons.serve.app import build
from bessemer.addons.serve.connections import HEAD_BYTES, ConnectionLimiter, ConnectionLimits
from bessemer.addons.serve.http import LOOPBACK_HOSTS, UnsignalledServer, bind, is_loopback
from bessemer.addons.serve.models import Models, find_models
from bessemer.addons.serve.service import Launch, launch
from bessemer.errors import UserError
from bessemer.system import raise_open_files

BACKLOG = 2048
"""Connections that the system queues until the server accepts them."""
LAST_SECONDS = 5
"""Time for error events to reach their clients after the drain."""


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    config: ServeConfig | None = None,
    drain_seconds: float = 30.0,
    force: bool = False,
    launch: Launch = launch,
) -> None:
    """Serves a run, a stage or a model directory until a signal ends it.

    port 0 takes a free one. name: what requests call a single model. force: allow a host that other machines can reach
    without an API key. `launch` starts a model's worker. Raises UserError if there is no such model, its tokenizer
    belongs to another model, the port is taken, or the host is not an address of this machine.
    """
    config = config or ServeConfig()
    address = f"[{host}]" if ":" in host else host
    if not is_loopback(host) and not config.api_key and not force:
        raise UserError(
            f"{host} can be reached from other machines, and without an API key anybody could use the model; set one "
            "(--api-key), stay on 127.0.0.1, or say --force"
        )
    if is_loopback(host) and not config.api_key and config.hosts is None:
        config = replace(config, hosts=tuple(dict.fromkeys((*LOOPBACK_HOSTS, address.lower()))))
    models = find_models(model, config, name, launch)
    for line in models.broken:
        print(f"not served: {line}", flush=True)
    with bind(host, port) as bound:
        models.preload()
        bound.listen(BACKLOG)  # whoever reads the next line may connect at once
        names = f"models: {', '.join(models.offers)} (default {models.default.name})"
        print(f"bessemer: http://{address}:{bound.getsockname()[1]}  {names}; Ctrl-C stops", flush=True)
        if models.rounding:
            print(models.rounding, flush=True)
        raise_open_files()  # the usual 1024, or 256 on macOS, are too few for a server
        server = Server(models, ConnectionLimits(), drain_seconds)
        gc.freeze()  # these objects stay; every garbage collection would spend 0.1 s on them
        try:
            server.run(sockets=[bound])
        finally:
            gc.unfreeze()  # else Python cannot free them at exit, and C++ libraries report them as leaks


class Server(UnsignalledServer):
    """uvicorn with limits on connections, a drain at shutdown, and only error logs."""

    def __init__(self, models: Models, limits: ConnectionLimits, drain_seconds: float):
        self.models, self.drain_seconds = models, drain_seconds
        self.application, self.limiter = build(models), ConnectionLimiter(limits)
        config = uvicorn.Config(
            self.application,
            http=self.limiter.connect,  # type: ignore[arg-type]  # uvicorn only calls it
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_graceful_shutdown=math.ceil(drain_seconds) + LAST_SECONDS,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.application.state.draining = True
        self.limiter.close_incomplete()
        abort = asyncio.create_task(self._abort_after_drain())
        try:
            await super().shutdown(sockets)
        finally:
            abort.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.drain_seconds = 0.0
        self.should_exit = True

    async def _abort_after_drain(self) -> None:
        waited = 0.0
        while waited < self.drain_seconds:
            await asyncio.sleep(0.1)
            waited += 0.1
        while True:
            self.models.abort("the server is shutting down and the rest of the answer is lost")
            await asyncio.sleep(0.5)
