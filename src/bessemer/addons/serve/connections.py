"""Limits in front of the HTTP parser: on the number of a server's connections, their time and their bytes.

uvicorn bounds the time between two requests, but not how long a request may take to arrive or how long a client may
leave its answer unread; and ASGI sees a connection only once the head of a request is complete. So our own `Connection`
stands in front of uvicorn's protocol and forwards asyncio's callbacks to it. It bounds

- both times,
- the number of connections: above the limit, the one that has waited longest without a complete request is closed, so
  that a thousand half-open connections keep nobody out,
- the work per turn of the event loop: bytes reach the parser in slices, one per turn and connection, and a slice has
  few lines, because the parser's time grows with the lines (of a head, or of tiny chunks),
- the bytes of all requests that have arrived but have not been read.

The parser is h11, which holds at most HEAD_BYTES of an incomplete head and parses a pipelined request only after
answering the one before it. (httptools bounds neither.) `RequestCounter` reports when a request is complete and when it
is answered, and `bodies.read` when it is read.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bessemer.addons.serve.protocol import ApiError

HEAD_BYTES = 16_384
"""Largest incomplete head of a request; h11 refuses a longer one."""
SLICE_BYTES = HEAD_BYTES
"""Bytes that reach the parser at once; a complete head therefore has at most HEAD_BYTES + SLICE_BYTES."""
SLICE_LINES = 128
"""Most lines in a slice: 2 ms of parsing."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on connections."""

    request_seconds: float = 20.0
    """Time from the first byte of a request (or from the start of the connection) to the request's last byte."""
    unread_seconds: float = 60.0
    """A client that stops reading its answer, or does not read the end of it, is disconnected after this time."""
    connections: int = 4096
    unread_bytes: int = 12_000_000
    """Bytes of all unread requests together; above this, large requests are refused with 503."""
    small_bytes: int = 65_536
    """A request up to this size is accepted even then."""


class ConnectionLimiter:
    """The connections of one server. Pass its method `connect` to uvicorn as the option `http`."""

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self.open = 0
        self.unread_bytes = 0
        self.incomplete: dict[Connection, None] = {}
        """Connections whose request is not complete, oldest first."""

    def connect(self, **options: Any) -> Connection:
        return Connection(self, options)

    def close_incomplete(self) -> None:
        for connection in list(self.incomplete):
            connection.close()


class Connection(asyncio.Protocol):
    """One connection: enforces the limits and forwards everything to uvicorn's protocol."""

    def __init__(self, limiter: ConnectionLimiter, options: dict[str, Any]):
        """`options`: those of uvicorn's protocol; the application sees their `app_state` as the scope's state."""
        self.limiter, self.limits = limiter, limiter.limits
        self._http = H11Protocol(**options | {"app_state": options["app_state"] | {"connection": self}})
        self._complete = False
        """A complete request is being answered."""
        self._answering = False
        """The answer has started."""
        self.parsing = False
        """uvicorn's protocol is reading bytes."""
        self.parser_paused = False
        """uvicorn's protocol wants no more bytes for now."""
        self._waiting = bytearray()
        """Bytes that have not reached the parser."""
        self._turn: asyncio.Handle | None = None
        """The next slice is due."""
        self._reading = True
        self._unread_bytes = 0
        """Bytes of the request, until it is read."""
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def request_started(self, complete: bool) -> None:
        """Called when the head of a request has arrived, and when all of it has (`complete`)."""
        if complete:
            self._complete = True
            self._stop_clock()
        else:
            self._start_clock()

    def request_read(self) -> None:
        """Called when the request is parsed and its bytes are no longer in memory."""
        self.limiter.unread_bytes -= self._unread_bytes
        self._unread_bytes = 0

    def answer_started(self) -> None:
        self._answering = True

    def answered(self) -> None:
        self._complete = self._answering = False
        self._stop_clock()
        self.request_read()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport = cast("asyncio.Transport", transport)  # always so for a socket
        self.limiter.open += 1
        self._http.connection_made(cast("asyncio.Transport", _Transport(self)))
        self._start_clock()
        if self.limiter.open > self.limits.connections:
            why = "too many connections are open; try again later"
            error = ApiError(503, why, code="too_many_connections", headers={"Retry-After": "5"})
            next(iter(self.limiter.incomplete)).refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.limiter.open -= 1
        self._stop_clock()
        self._cancel_unread()
        self.request_read()
        self._waiting.clear()
        self._http.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._complete:
            self._start_clock()
        self._unread_bytes += len(data)
        self.limiter.unread_bytes += len(data)
        limits = self.limits
        if self.limiter.unread_bytes > limits.unread_bytes and self._unread_bytes > limits.small_bytes:
            why = "too many large requests arrive at once; try again later"
            self.refuse(ApiError(503, why, code="server_busy", headers={"Retry-After": "5"}))
            return
        self._waiting += data
        if self._turn is None:
            self._parse()

    def eof_received(self) -> None:
        self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        self._cancel_unread()
        if self.transport.is_closing():
            self._await_reader()
        self._http.resume_writing()

    def close(self) -> None:
        """Closes once the client has read everything. asyncio would wait for that without limit."""
        self.transport.close()
        self._stop_clock()
        self._await_reader()

    def resume_parser(self) -> None:
        self.parser_paused = False
        if self._turn is None:
            self._turn = self.loop.call_soon(self._parse)

    def time_out(self) -> None:
        """Refuses a request that has not arrived in time."""
        late = f"no complete request within {self.limits.request_seconds:g} s"
        self.refuse(ApiError(408, late, code="request_timeout"))

    def refuse(self, error: ApiError) -> None:
        """Answers with an error, unless an answer has started, and closes."""
        if self.transport.is_closing():
            return
        if not self._answering:
            body = json.dumps(error.body).encode()
            more = "".join(f"{name.lower()}: {value}\r\n" for name, value in (error.headers or {}).items())
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n{more}connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self._waiting.clear()
        self.close()

    def refuse_bytes(self) -> None:
        """Refuses bytes that are not a request, or whose head is too large."""
        if not self._complete and self._unread_bytes > HEAD_BYTES:
            why = f"the head of the request is larger than {HEAD_BYTES} bytes, or this is not an HTTP request"
            self.refuse(ApiError(431, why, code="head_too_large"))
        else:
            self.refuse(ApiError(400, "this is not a valid HTTP/1.1 request", code="invalid_http"))

    def _parse(self) -> None:
        """Hands one slice to the parser; the next one follows in another turn of the event loop."""
        self._turn = None
        if self._waiting and not self.parser_paused and not self.transport.is_closing():
            size = _slice_size(self._waiting)
            data = bytes(self._waiting[:size])
            del self._waiting[:size]
            self.parsing = True
            try:
                self._http.data_received(data)
            except h11.LocalProtocolError:  # it cannot refuse bytes that come during an answer
                self.transport.abort()
            self.parsing = False
            if self._waiting and not self.parser_paused and self._turn is None:
                self._turn = self.loop.call_soon(self._parse)
        self.read_or_pause()

    def read_or_pause(self) -> None:
        """Reads the socket only while the parser wants bytes and none are waiting."""
        read = not self._waiting and not self.parser_paused
        if read != self._reading and not self.transport.is_closing():
            self._reading = read
            if read:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def _start_clock(self) -> None:
        if self._deadline is None:
            self.limiter.incomplete[self] = None
            self._deadline = self.loop.call_later(self.limits.request_seconds, self.time_out)

    def _stop_clock(self) -> None:
        self.limiter.incomplete.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _await_reader(self) -> None:
        self._cancel_unread()
        self._unread = self.loop.call_later(self.limits.unread_seconds, self.transport.abort)

    def _cancel_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Transport:
    """The transport that uvicorn's protocol gets. Applications run in tasks, so all that the protocol writes while it
    parses is its refusal of bytes that are not HTTP; the client gets that error in the form of all others."""

    def __init__(self, connection: Connection):
        self._connection, self._transport = connection, connection.transport

    def write(self, data: bytes) -> None:
        if self._connection.parsing:
            self._connection.refuse_bytes()
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._connection.close()

    def pause_reading(self) -> None:
        self._connection.parser_paused = True
        self._connection.read_or_pause()

    def resume_reading(self) -> None:
        self._connection.resume_parser()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _slice_size(data: bytearray) -> int:
    """Bytes of the next slice."""
    end = min(len(data), SLICE_BYTES)
    if data.count(b"\n", 0, end) <= SLICE_LINES:
        return end
    cut = -1
    for _ in range(SLICE_LINES):
        cut = data.find(b"\n", cut + 1)
    return cut + 1
