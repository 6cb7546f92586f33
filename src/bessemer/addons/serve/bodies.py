"""JSON bodies: read, bounded and validated without stalling the event loop.

A body of 4 MB can hold more than a million values, each of which costs tens of bytes and its share of Python time. So
the values of a body are counted before it is parsed, the schema bounds every list, and large bodies are parsed in a
thread, one after another.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from bessemer.addons.serve.metrics import CLIENT_GONE
from bessemer.addons.serve.protocol import HARMLESS, SAME, ApiError, Body, generation_fields, invalid

LARGE = 32_768
"""A body of at least this many bytes is parsed in a thread."""
MOST_VALUES = 250_000
"""Most numbers in one body, some 10 MB in memory. A string, list or object costs and counts as WEIGHT numbers."""
WEIGHT = 4
IGNORED = "X-Bessemer-Ignored"
"""Header of an answer that names the fields of the request that had no effect."""
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)
"""Whole strings, the openings of lists and objects, and the commas between values."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyRoute(APIRoute):
    """An endpoint whose body is a JSON object."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        kind: type[Body] = self.body_field.field_info.annotation  # type: ignore[assignment]  # of every endpoint

        async def read_and_handle(request: Request) -> Response:
            _check_type(request.headers.get("content-type", ""))
            try:
                value, unknown = await read(request, kind)
                response = await handle(_ReadRequest(request, value))
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)  # nobody receives it
            if unknown:
                response.headers[IGNORED] = ", ".join(quote(name[:64], safe="") or '""' for name in unknown[:20])
            return response

        return read_and_handle


class _ReadRequest(Request):
    """A request whose body is already validated; FastAPI finds the object where it expects parsed JSON."""

    def __init__(self, request: Request, value: Body):
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> Body:
        return self._value


async def read(request: Request, kind: type[Body]) -> tuple[Body, list[str]]:
    """The body as a `kind`, and the names of its unknown fields. Raises ApiError or RequestValidationError if it is not
    one."""
    raw = b"".join([part async for part in request.stream()])  # request.body() would keep it during the answer
    try:
        if len(raw) < LARGE:
            return parse(raw, kind)
        async with request.app.state.large_bodies:
            return await asyncio.to_thread(parse, raw, kind)
    finally:
        request.state.connection.request_read()


def parse(raw: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """`read` for the bytes of a body."""
    if not raw:
        raise invalid("the body is empty; send a JSON object")
    if not has_few_values(raw):
        what = (
            f"the body has more than {MOST_VALUES:,} numbers, of which a string, list or object counts as {WEIGHT}; "
            "split it into several requests"
        )
        raise ApiError(413, what, code="body_too_large")
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_float=_number, parse_constant=_number)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a character, which no answer could repeat
    except json.JSONDecodeError as error:
        raise invalid(f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except (ValueError, RecursionError):  # bytes, numbers and nesting that Python or JSON refuses
        what = "the body cannot be read: it must be JSON in UTF-8, with whole characters, moderate nesting and numbers"
        raise invalid(what, code="invalid_body") from None
    unknown = unknown_fields(value, kind)
    try:
        return kind.model_validate(value), unknown
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([problem | {"loc": ("body", *problem["loc"])} for problem in problems]) from None


def has_few_values(raw: bytes) -> bool:
    """Whether the body has at most MOST_VALUES values. Counts exactly only if a quick upper bound exceeds that."""
    if raw.count(b",") + WEIGHT * (raw.count(b"[") + raw.count(b"{") + raw.count(b'"') // 2) < MOST_VALUES:
        return True
    count = 0
    for token in _TOKENS.finditer(raw):
        count += 1 if token.group() == b"," else WEIGHT
        if count > MOST_VALUES:
            return False
    return True


def _number(text: str) -> int | float:
    """Parses 1.0 as an integer, as JSON Schema requires. ValueError for NaN and infinities, which are not JSON."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return int(value) if value.is_integer() and abs(value) <= 2**53 else value


def _check_type(content_type: str) -> None:
    kind = content_type.split(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        what = "the body must be JSON: send Content-Type: application/json"
        raise ApiError(415, what, code="unsupported_media_type")


def unknown_fields(value: object, body: type[Body]) -> list[str]:
    """Names in a JSON object that are not fields of `body` and have no effect. Raises ApiError for one that means
    something here, unless it asks for nothing: clients of vLLM send `"echo": false` to chats."""
    if not isinstance(value, dict):
        return []
    own = {info.alias or name for name, info in body.model_fields.items()}
    unknown = [name for name, content in value.items() if name not in own and content is not None]
    for name in unknown:
        if value[name] is False or value[name] in ("", [], {}):
            continue
        near = difflib.get_close_matches(name[:64], own, n=1, cutoff=0.85)
        if not near and (name in HARMLESS or not body.generates or name not in generation_fields()):
            continue
        alike = next((names for names in SAME if name in names), ())
        better = next((field for field in (*alike, *near) if field in own), None)
        hint = f"did you mean {better!r}?" if better else "leave it out"
        raise ApiError(400, f"this endpoint has no field {name[:64]!r}; {hint}", param=name, code="unknown_parameter")
    return unknown
