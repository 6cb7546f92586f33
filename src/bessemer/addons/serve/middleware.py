"""Middleware between the connections and the endpoints: counts and checks every request.

The middlewares are plain ASGI, so that streams pass through untouched. In order, they count the request; refuse a head
that is malformed or names a foreign host; check the key; and refuse a large body. The size is counted as the body
arrives, so chunked bodies are bounded too, and nothing of a body that is too large is stored.
"""

from __future__ import annotations

import hmac
import re

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bessemer.addons.serve import ServeConfig
from bessemer.addons.serve.connections import Connection
from bessemer.addons.serve.metrics import CLIENT_GONE, ServerMetrics
from bessemer.addons.serve.protocol import ApiError

NO_KEY = ("/", "/health", "/openapi.json")
"""Paths that need no key; /static/ needs none either."""
MOST_HEADERS = 100
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
"""A Host header: a name or an address, and a port."""


class RequestCounter:
    """Counts requests by endpoint and status, and reports their progress to their connection."""

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
            self._check(scope)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        else:
            await self.app(scope, bounded_receive, send)

    def _check(self, scope: Scope) -> None:
        config, path, headers = self.config, scope["path"], dict(scope["headers"])
        if len(scope["headers"]) > MOST_HEADERS:
            what = f"the request has {len(scope['headers'])} headers; send at most {MOST_HEADERS}"
            raise ApiError(431, what, code="head_too_large")
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            what = "the request needs exactly one Host header, a name or an address with or without a port"
            raise ApiError(400, what, code="invalid_host")
        host = hosts[0].decode("ascii")
        if config.hosts is not None and _host_name(host) not in config.hosts:
            why = f"this server is not known as {host!r}; use {' or '.join(config.hosts)}"
            raise ApiError(403, why, code="unknown_host")
        preflight = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if config.api_key and not preflight and path not in NO_KEY and not path.startswith("/static/"):
            _check_key(headers.get(b"authorization", b""), config.api_key)
        length = headers.get(b"content-length", b"0")
        self._check_size(int(length[:20]) if length.isdigit() else 0)

    def _check_size(self, size: int) -> None:
        limit = self.config.body_bytes
        if size > limit:
            message = f"the body is larger than {limit} bytes; send less, or start the server with a higher limit"
            raise ApiError(413, message, code="body_too_large")


def _check_key(sent: bytes, key: str) -> None:
    scheme, _, token = sent.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
        what = f"the API key is {'wrong' if sent else 'missing'}: send Authorization: Bearer KEY"
        raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[: host.find("]") + 1].lower()
    return host.rsplit(":", 1)[0].lower()
