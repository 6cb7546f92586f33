"""Connections that take up room without asking anything, or that do not read their answer, are closed.

uvicorn bounds how long a connection may idle between two requests, but not how long a request may take to arrive, nor
how long a client may leave its answer unread. Both are bounded here, and so is the number of connections: beyond it the
one that has waited longest without a complete request makes room, so that a thousand half-open connections keep nobody
else out.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bessemer.serve.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Bounds on connections."""

    request_seconds: float = 20.0
    """From the first byte of a request (or the connection) to its last."""
    unread_seconds: float = 60.0
    """An answer that a client has stopped reading is given up after so long."""
    connections: int = 4096


def protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these limits."""
    arriving: dict[Connection, None] = {}
    """Connections whose request is not complete, the oldest first."""

    class Connection(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                next(iter(arriving), self).give_up()
            self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._request_complete()
            self._cancel_unread()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._await_request()

        def on_message_complete(self) -> None:
            self._request_complete()
            super().on_message_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(limits.unread_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._cancel_unread()
            super().resume_writing()

        def shutdown(self) -> None:
            if self in arriving:
                self.transport.close()
            else:
                super().shutdown()

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, "this is not an HTTP request", code="invalid_http"))

        def give_up(self) -> None:
            """The request has not come in time."""
            late = f"no complete request within {limits.request_seconds:g} s"
            self._refuse(ApiError(408, late, code="request_timeout"))

        def _refuse(self, error: ApiError) -> None:
            """Answers, unless an answer is under way, and closes."""
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                body = json.dumps(error.body).encode()
                head = (
                    f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
                )
                self.transport.write(head.encode() + body)
            self.transport.close()

        def _await_request(self) -> None:
            if self._deadline is None:
                arriving[self] = None
                self._deadline = self.loop.call_later(limits.request_seconds, self.give_up)

        def _request_complete(self) -> None:
            arriving.pop(self, None)
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _cancel_unread(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

    return Connection
