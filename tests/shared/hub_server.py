"""A model and data set hub on this machine: one repository whose branch can be moved to another commit.

Writing follows the hub's protocol: large files first (LFS), then one commit as lines of JSON."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class HubServer(ThreadingHTTPServer):
    """`commits` maps each commit to its files; `head` is the commit that the branch `main` points to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.head = ""
        self.exists = True
        self.token: str | None = None
        """The token that writing requires; None: nobody may write."""
        self.large: dict[str, bytes] = {}
        """LFS objects by SHA-256."""
        self.failures: dict[str, int] = {}
        """{a part of a path: status} for the requests that fail."""
        self.requests: list[str] = []

    def commit(self, files: dict[str, bytes]) -> str:
        """Moves the branch to a new commit that holds these files."""
        self.head = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        status = next((status for part, status in self.server.failures.items() if part in self.path), None)
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            status = 401
        if status is not None:
            self.answer_json({"error": "no"}, status)
        elif self.path.endswith("/api/repos/create"):
            self.server.exists = True
            self.answer_json({"url": f"http://{self.headers['Host']}/own/name", "id": "own/name"})
        elif self.path.endswith("/api/validate-yaml"):
            self.answer_json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            self.answer_json(
                {"files": [{"path": f["path"], "uploadMode": modes[f["path"].endswith("safetensors")],
                            "shouldIgnore": False} for f in files]}
            )  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = []
            for entry in json.loads(body)["objects"]:
                href = f"http://{self.headers['Host']}/large/{entry['oid']}"
                actions = {} if entry["oid"] in self.server.large else {"actions": {"upload": {"href": href}}}
                objects.append({**entry, "authenticated": True, **actions})
            self.answer_json({"transfer": "basic", "objects": objects})
        elif self.command == "PUT":
            self.server.large[self.path.rsplit("/", 1)[1]] = body
            self.answer_json({})
        elif "/commit/" in self.path:
            files = dict(self.server.commits.get(self.server.head, {}))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            commit = self.server.commit(files)
            self.answer_json(
                {"commitOid": commit, "commitUrl": f"http://{self.headers['Host']}/own/name/commit/{commit}"}
            )
        else:
            self.answer_json({"error": self.path}, 404)

    do_PUT = do_POST

    def answer_json(self, facts: object, status: int = 200) -> None:
        self.answer(status, json.dumps(facts).encode(), {"Content-Type": "application/json"})

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
            headers = {"X-Error-Code": "RevisionNotFound"} if files is None else {}
            facts = {"error": "no such revision"} if files is None else facts
            self.answer(404 if files is None else 200, json.dumps(facts).encode(), headers)
            return
        _, _, _, revision, name = parts  # own/name/resolve/COMMIT/FILE
        commit = self.server.head if revision == "main" else revision
        data = self.server.commits.get(commit, {}).get(name)
        headers = {"ETag": f'"{hashlib.sha1(data or b"").hexdigest()}"', "X-Repo-Commit": commit}
        if data is None:
            headers["X-Error-Code"] = "EntryNotFound"
        self.answer(404 if data is None else 200, data or b"", headers)

    do_HEAD = do_GET

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Runs the server and points the client's settings at it."""
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
