"""Between the socket and the endpoints: limits on connections, a count of requests, and checks of every request.

The middlewares are plain ASGI, so that streams pass through untouched. In order: every request is counted; a foreign
Host is refused; the key is checked; a body must be JSON and small. The size is counted as the body comes in, so chunked
bodies are bounded too, and nothing is stored of one that is too large.

uvicorn bounds the time between two requests, but not how long a request may take to arrive, nor how long a client may
leave its answer unread, and ASGI sees a connection only once the head of a request is complete. So a `Connection` of
our own stands in front of uvicorn's protocol and forwards asyncio's callbacks to it. It bounds both times, and the
number of connections: beyond it the one that has waited longest without a complete request is closed, so that a
thousand half-open connections keep nobody out. `RequestCounter` reports to it when a request is complete and answered.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from bessemer.serve import ServeConfig
from bessemer.serve.metrics import CLIENT_GONE, ServerMetrics
from bessemer.serve.protocol import ApiError

NO_KEY = ("/", "/health", "/openapi.json")
"""Paths that need no key; /static/ needs none either."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds on connections."""

    request_seconds: float = 20.0
    """From the first byte of a request (or the connection) to its last."""
    unread_seconds: float = 60.0
    """A client that stops reading its answer is disconnected after this time."""
    connections: int = 4096


class ConnectionLimiter:
    """The connections of one server. Its method `connect` is the option `http` of uvicorn."""

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self.open = 0
        self.incomplete: dict[Connection, None] = {}
        """Connections whose request is not complete, the oldest first."""

    def connect(self, **options: Any) -> Connection:
        return Connection(self, options)

    def close_incomplete(self) -> None:
        for connection in list(self.incomplete):
            connection.transport.close()


class Connection(asyncio.Protocol):
    """One connection: keeps the limits and forwards everything to uvicorn's protocol."""

    def __init__(self, limiter: ConnectionLimiter, options: dict[str, Any]):
        """`options`: uvicorn's for its protocol; `app_state` reaches the application as the scope's state."""
        self.limiter, self.limits = limiter, limiter.limits
        self._http = AutoHTTPProtocol(**options | {"app_state": options["app_state"] | {"connection": self}})
        self._complete = False
        """A complete request is being answered."""
        self._answering = False
        """The answer has started."""
        self.parsing = False
        """uvicorn's protocol is reading bytes."""
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def request_started(self, complete: bool) -> None:
        """The head of a request is complete, or all of it."""
        if complete:
            self._complete = True
            self._stop_clock()
        else:
            self._start_clock()

    def answer_started(self) -> None:
        self._answering = True

    def answered(self) -> None:
        self._complete = self._answering = False
        self._stop_clock()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport = cast("asyncio.Transport", transport)  # a socket's always is
        self.limiter.open += 1
        self._http.connection_made(cast("asyncio.Transport", _Transport(self)))
        if self.limiter.open > self.limits.connections:
            next(iter(self.limiter.incomplete), self).time_out()
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self.limiter.open -= 1
        self._stop_clock()
        self._cancel_unread()
        self._http.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._complete:
            self._start_clock()
        self.parsing = True
        self._http.data_received(data)
        self.parsing = False

    def eof_received(self) -> bool | None:
        return self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()
        self._unread = self.loop.call_later(self.limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_unread()
        self._http.resume_writing()

    def time_out(self) -> None:
        """The request has not arrived in time."""
        late = f"no complete request within {self.limits.request_seconds:g} s"
        self.refuse(ApiError(408, late, code="request_timeout"))

    def refuse(self, error: ApiError) -> None:
        """Answers with an error, unless an answer has started, and closes."""
        if self.transport.is_closing():
            return
        if not self._answering:
            body = json.dumps(error.body).encode()
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_clock(self) -> None:
        if self._deadline is None:
            self.limiter.incomplete[self] = None
            self._deadline = self.loop.call_later(self.limits.request_seconds, self.time_out)

    def _stop_clock(self) -> None:
        self.limiter.incomplete.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cancel_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Transport:
    """The transport that uvicorn's protocol gets. What the protocol writes while it parses is its own refusal of bytes
    that are not HTTP, since applications run in tasks; the client gets that error in the form of all others."""

    def __init__(self, connection: Connection):
        self._connection, self._transport = connection, connection.transport

    def write(self, data: bytes) -> None:
        if self._connection.parsing:
            self._connection.refuse(ApiError(400, "this is not an HTTP request", code="invalid_http"))
        else:
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class RequestCounter:
    """Counts requests by endpoint and status, and tells their connection how far they are."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = gone = 0
        connection: Connection = scope["state"]["connection"]
        lengths = [value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")]
        connection.request_started(complete=all(value == b"0" for value in lengths))

        async def watched_receive() -> Message:
            nonlocal gone
            message = await receive()
            if message["type"] == "http.disconnect":
                gone = CLIENT_GONE
            elif not message.get("more_body"):
                connection.request_started(complete=True)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            connection.answer_started()
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        finally:
            connection.answered()
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, str(gone or status or 500)).inc()


class RequestGuard:
    """Refuses requests that must not reach an endpoint."""

    def __init__(self, app: ASGIApp, config: ServeConfig):
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            self._check_size(received)
            return message

        try:
            self._check(scope, dict(scope["headers"]))
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        else:
            await self.app(scope, bounded_receive, send)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        config, path = self.config, scope["path"]
        host = headers.get(b"host", b"").decode("latin-1")
        if config.hosts is not None and _host_name(host) not in config.hosts:
            known = " or ".join(config.hosts)
            why = f"this server is not known as {host!r}; use {known}, or allow the name when starting it"
            raise ApiError(403, why, code="unknown_host")
        preflight = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if config.api_key and not preflight and path not in NO_KEY and not path.startswith("/static/"):
            _check_key(headers.get(b"authorization", b""), config.api_key)
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if not (kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))):
                what = "the body must be JSON: send Content-Type: application/json"
                raise ApiError(415, what, code="unsupported_media_type")
            length = headers.get(b"content-length", b"0")
            self._check_size(int(length[:20]) if length.isdigit() else 0)

    def _check_size(self, size: int) -> None:
        limit = self.config.body_bytes
        if size > limit:
            message = f"the body is larger than {limit} bytes; send less, or start the server with a higher limit"
            raise ApiError(413, message, code="body_too_large")


def _check_key(given: bytes, key: str) -> None:
    scheme, _, token = given.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
        what = f"the API key is {'wrong' if given else 'missing'}: send Authorization: Bearer KEY"
        raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[: host.find("]") + 1].lower()
    return host.rsplit(":", 1)[0].lower()
