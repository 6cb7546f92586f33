"""Shared by all servers here: a bound socket, a clean stop on a signal, a page's files under a content policy."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response

from bessemer.addons.serve.protocol import ApiError
from bessemer.addons.watch import chinese
from bessemer.errors import UserError

SPEECH = Path(chinese.__file__).with_name("speech")
"""What every page speaks English and Chinese with."""
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names that a browser may use for a server on the loopback address (`ServeConfig.hosts`)."""
PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class UnsignalledServer(uvicorn.Server):
    """uvicorn that ends quietly after SIGINT and SIGTERM."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but does not raise the signal again afterwards: stopping on request is not a failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)


def add_page(app: FastAPI | APIRouter, *folders: Path, home: str = "/") -> None:
    """Adds a page at `home` that serves the files in `folders` (the first of each name), what it speaks with and
    nothing else, under a policy that allows nothing from other origins."""

    @app.get(home, include_in_schema=False)
    async def index(request: Request) -> Response:
        return static("index.html", request)

    @app.get(f"{home}static/{{name}}", include_in_schema=False)
    async def static_file(name: str, request: Request) -> Response:
        return static(name, request)

    def static(name: str, request: Request) -> Response:
        places = (SPEECH, *reversed(folders))
        files = (path for folder in places for path in folder.iterdir() if path.suffix in PAGE_TYPES)
        by_name = {path.name: path for path in files}
        if name not in by_name:
            raise ApiError(404, f"there is no file {name!r} here", code="not_found")
        data = by_name[name].read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:24]}"'
        headers = PAGE_HEADERS | {"ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers | {"Content-Type": PAGE_TYPES[by_name[name].suffix]})


def bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise UserError(f"{host!r} is not an address of this machine ({error.strerror}); use 127.0.0.1") from error
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


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
