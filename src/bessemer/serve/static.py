"""The chat page: whatever files lie in page/, and nothing else, under a policy that lets in only what is ours."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

from bessemer.serve.errors import ApiError

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".woff2": "font/woff2",
    ".json": "application/json", ".txt": "text/plain; charset=utf-8", ".webmanifest": "application/manifest+json",
}  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def add(app: FastAPI) -> None:
    """GET / and GET /static/NAME."""

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _file("index.html", request)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        return _file(name, request)


def _file(name: str, request: Request) -> Response:
    known = {path.name: path for path in FOLDER.iterdir() if path.suffix in TYPES} if FOLDER.is_dir() else {}
    if name not in known:
        raise ApiError(404, f"there is no file {name!r} here", code="not_found")
    data = known[name].read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:24]}"'
    headers = {
        "Cache-Control": "no-cache", "ETag": tag, "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    }  # fmt: skip
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers | {"Content-Type": TYPES[known[name].suffix]})
