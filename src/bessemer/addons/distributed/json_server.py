"""Requests to a server that speaks JSON over HTTP, such as `vllm serve` or any with an OpenAI-compatible API.

Nothing that it replies is trusted: a reply has a size, its text is shown without control characters, and a redirect,
which would carry the key elsewhere, is refused.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from bessemer.errors import UserError

TIMEOUT = 3600.0
"""Seconds for a reply; a long answer behind a full queue takes minutes."""
RETRIES, BUSY_RETRIES, PAUSE = 3, 6, 1.0
"""Further attempts after a lost connection, and after a status that passes; seconds before the first. Each pause is
twice the last."""
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses of a server that is busy or fails for the moment."""
LONGEST_ASKED = 300.0
"""The longest Retry-After that is obeyed, in seconds."""
LARGEST_REPLY = 1 << 28


class LostServer(UserError):
    """The server does not answer."""


class Refused(UserError):
    """The server answers with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class JSONServer:
    """The server at `url`, called `name` in errors. `key_in`: the environment variable whose value is sent as its key,
    if it is set. `resumes`: what a user who has started the server again can do."""

    def __init__(self, url: str, name: str, key_in: str, resumes: str) -> None:
        self.url, self.name, self.key_in, self.resumes = url, f"{name} at {url}", key_in, resumes

    @property
    def key(self) -> str:
        return os.environ.get(self.key_in, "") if self.key_in else ""

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of a reply; None if it is empty. A request whose connection is lost, or that a busy server refuses,
        is sent again, so it must have the same answer. UserError for everything else."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in count():
            pause = PAUSE * 2**attempt
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with _OPENER.open(request, timeout=TIMEOUT) as reply:
                    text = reply.read(LARGEST_REPLY + 1)
                if len(text) > LARGEST_REPLY:
                    raise UserError(
                        f"{self.name}: a reply has more than {LARGEST_REPLY >> 20} MiB; it is no such server"
                    )
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code not in PASSING or attempt >= BUSY_RETRIES:
                    raise Refused(self._refusal(path, error), error.code) from None
                asked = error.headers.get("Retry-After", "")
                pause = max(pause, min(float(asked), LONGEST_ASKED) if asked.isdecimal() else 0.0)
                error.close()
            except (OSError, http.client.HTTPException) as error:
                if attempt >= RETRIES:
                    reason = getattr(error, "reason", None) or error
                    raise LostServer(
                        f"{self.name} does not answer ({reason}); start it again, and {self.resumes}"
                    ) from None
            except (ValueError, RecursionError):
                raise UserError(f"{self.name} does not reply to {path} in JSON; it is no such server") from None
            time.sleep(pause * random.uniform(1.0, 1.5))  # so that threads do not all come back at once
        raise AssertionError

    def models(self) -> list[dict[str, Any]]:
        """What it lists as its models; UserError if nothing."""
        listed = self.call("/v1/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        entries = entries if isinstance(entries, list) else []
        known = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if not known:
            raise UserError(f"{self.name}: /v1/models lists no model; it is no such server")
        return known

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> str:
        try:
            message = " ".join(error.read(2000).decode("utf-8", "replace").split())
        except (OSError, http.client.HTTPException):
            message = ""
        if self.key:
            message = message.replace(self.key, "***")
        shown = "".join(char if char.isprintable() else " " for char in message)[:300] or str(error.reason)
        advice = f"; put its key into {self.key_in or 'an environment variable'}" if error.code in (401, 403) else ""
        return f"{self.name} refused {path.partition('?')[0]}: status {error.code}, {shown}{advice}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def checked_url(url: str, what: str) -> str:
    """The address without /v1 at its end; UserError if it is none. `what`: where the user gave it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"{what} is {url!r}; give the address of a server, such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")
