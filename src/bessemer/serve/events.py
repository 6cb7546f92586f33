"""Server-sent events: framing, and a response that ends when its client goes away.

An event is `data: JSON` and a blank line in one write, so no character and no event is ever cut by us. U+2028, U+2029
and U+0085 are escaped: clients that split lines by Unicode's rules would break an event there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bessemer.serve.inflight import Stream

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_ESCAPED = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(facts: dict[str, Any]) -> bytes:
    """One event."""
    text = _encode(facts)
    return f"data: {text if text.isascii() else text.translate(_ESCAPED)}\n\n".encode()


@asynccontextmanager
async def while_connected(receive: Receive, stream: Stream | None) -> AsyncIterator[None]:
    """Closes the stream when the block ends, and as soon as the client disconnects."""
    if stream is None:
        yield
        return

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        stream.close()


class EventStream(Response):
    """The events of a stream, [DONE] included."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream | None, events: AsyncIterator[bytes], failed: Callable[[Exception], bytes],
                 ended: Callable[[], None]):  # fmt: skip
        """`failed` makes the event that tells of an exception in `events`; `ended` is called once, however it ends."""
        self.status_code, self.background = 200, None
        self.stream, self.events, self.failed, self.ended = stream, events, failed, ended
        # nginx and its like would gather events before they pass them on
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with while_connected(receive, self.stream):
                try:
                    async for data in self.events:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                except Exception as error:
                    await send({"type": "http.response.body", "body": self.failed(error), "more_body": True})
                await send({"type": "http.response.body", "body": DONE})
        finally:
            self.ended()
