"""What stands between the socket and the endpoints, as plain ASGI so that streams pass through untouched.

In order: every request is counted; a foreign Host is refused; the key is checked; a body must be JSON and small. The
size is counted as the body comes in, so chunked ones are bounded too, and nothing is kept of what is too large.
"""

from __future__ import annotations

import hmac
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bessemer.serve.errors import ApiError
from bessemer.serve.metrics import GONE, Metrics
from bessemer.serve.settings import Settings

OPEN = ("/", "/health", "/openapi.json")
"""Paths that need no key; /static/ neither."""


async def refuse(error: ApiError, send: Send) -> None:
    """Answers with an error."""
    body = json.dumps(error.body, ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(error.headers or {})}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class Counted:
    """Counts requests by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = gone = 0

        async def watched_receive() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (GONE if message["type"] == "http.disconnect" else 0)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, str(gone or status or 500)).inc()


class Guard:
    """Refuses what must not reach an endpoint."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check(scope, headers)
        except ApiError as error:
            await refuse(error, send)
            return
        await self.app(scope, _Bounded(receive, self.settings.body_bytes), send)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        settings, path = self.settings, scope["path"]
        host = headers.get(b"host", b"").decode("latin-1")
        if settings.hosts is not None and _name(host) not in settings.hosts:
            known = " or ".join(settings.hosts)
            why = f"this server does not go by the name {host!r}; call it {known}, or allow the name when starting it"
            raise ApiError(403, why, code="unknown_host")
        preflight = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        if settings.api_key and not preflight and path not in OPEN and not path.startswith("/static/"):
            _check_key(headers.get(b"authorization", b""), settings.api_key)
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if not (kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))):
                what = "the body must be JSON: send Content-Type: application/json"
                raise ApiError(415, what, code="unsupported_media_type")
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length[:20]) > settings.body_bytes:
                raise _too_large(settings.body_bytes)


class _Bounded:
    """A body that raises once it is too large."""

    def __init__(self, receive: Receive, most: int):
        self.receive, self.most, self.seen = receive, most, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        self.seen += len(message.get("body", b""))
        if self.seen > self.most:
            raise _too_large(self.most)
        return message


def _too_large(most: int) -> ApiError:
    message = f"the body is larger than {most} bytes; send less, or start the server with a higher limit"
    return ApiError(413, message, code="body_too_large")


def _check_key(given: bytes, key: str) -> None:
    scheme, _, token = given.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
        what = "the API key is wrong" if given else "an API key is needed"
        raise ApiError(401, f"{what}: send Authorization: Bearer KEY", code="invalid_api_key",
                       headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[: host.find("]") + 1].lower()
    return host.rsplit(":", 1)[0].lower()
