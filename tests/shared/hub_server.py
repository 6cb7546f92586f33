"""A hub of models and data sets on this machine: one repository whose branch can be moved to another commit."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class HubServer(ThreadingHTTPServer):
    """`commits` maps each commit to its files; `head` is the one that the branch `main` names."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.head = ""

    def commit(self, files: dict[str, bytes]) -> str:
        """Moves the branch to a new commit with these files."""
        self.head = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":  # api/models/own/name/revision/REVISION, or tree for its files
            revision = parts[5] if len(parts) > 5 else "main"
            commit = self.server.head if revision == "main" else revision
            files = self.server.commits.get(commit)
            facts: object = {"id": "own/name", "sha": commit, "siblings": [{"rfilename": name} for name in files or ()]}
            if parts[4:5] == ["tree"]:
                sizes = {name: len(data) for name, data in (files or {}).items()}
                facts = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            self.answer(404 if files is None else 200, json.dumps(facts).encode(), {"Content-Type": "application/json"})
            return
        _, _, _, commit, name = parts  # own/name/resolve/COMMIT/FILE
        data = self.server.commits.get(commit, {}).get(name)
        digest = hashlib.sha1(data or b"").hexdigest()
        self.answer(404 if data is None else 200, data or b"", {"ETag": f'"{digest}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, as the hub of the client's settings."""
    from huggingface_hub import constants

    with HubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server
        server.shutdown()
