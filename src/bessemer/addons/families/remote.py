"""Models on the Hugging Face hub: one commit up, one snapshot down.

A push is one commit, so readers of the repository see either the old model or the whole new one. Large files are
uploaded first and stay on the hub, so repeating an interrupted push sends only what is missing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bessemer.data.model_files import CONSOLIDATED
from bessemer.errors import UserError
from bessemer.hf.replace import ADAPTER_CONFIG, holds_weights, replacing

HUB = "hf://"
MARK = "<!-- written by bessemer push -->"
"""Marks our model cards; any other card in the repository belongs to its owner and is kept."""
FILES = ["*.json", "*.safetensors", "*.jinja"]
"""Files to download: weights, configuration, tokenizer; no code and no pickles."""


def address(spec: str) -> tuple[str, str | None]:
    """(owner/name, revision) of `hf://owner/name@REVISION`, with or without hf://."""
    name, _, revision = spec.removeprefix(HUB).partition("@")
    if len(name.split("/")) != 2 or not all(name.split("/")):
        form = f"{HUB if spec.startswith(HUB) else ''}owner/name"
        raise UserError(f"{spec!r} must have the form {form}, optionally with @REVISION (a commit, to pin it)")
    return name, revision or None


def push(model: Path, card: str, spec: str, private: bool = False) -> str:
    """Uploads a model directory with its card and returns the address of the commit. Raises UserError without
    permission to write there, without a network, or if the hub fails."""
    name, branch = address(spec)
    with _explained(f"cannot push to {name}", "the same command sends what is missing"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        files = {path.relative_to(model): path for path in sorted(model.rglob("*")) if path.is_file()}
        visible = {name: path for name, path in files.items() if not any(part[0] == "." for part in name.parts)}
        sent = {file.as_posix(): path for file, path in visible.items() if file.as_posix() != "README.md"}
        changes: list[CommitOperationAdd | CommitOperationDelete]
        changes = [CommitOperationAdd(file, str(path)) for file, path in sent.items()]
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        # weights of an earlier push under names that this one lacks: a reader would take or mix them
        changes += [CommitOperationDelete(old) for old in _weights(api, name, branch) if old not in sent]
        if _may_write(api, name, branch):
            changes.append(CommitOperationAdd("README.md", f"{card.rstrip()}\n\n{MARK}\n".encode()))
        done = api.create_commit(name, changes, commit_message="A model, by bessemer push", revision=branch)
        return str(done.commit_url)


def _weights(api, name: str, branch: str | None) -> list[str]:
    """The files with weights at the top of a repository, and the config of an adapter, whose weights they may be."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        files = api.list_repo_files(name, revision=branch)
    except RevisionNotFoundError:  # nothing has been committed yet
        return []
    return [file for file in files if "/" not in file and (holds_weights(Path(file)) or file == ADAPTER_CONFIG)]


def _may_write(api, name: str, branch: str | None) -> bool:
    """Whether the repository has no card except ours. The hub itself creates an empty one for a new repository."""
    from huggingface_hub import hf_hub_download

    if not api.file_exists(name, "README.md", revision=branch):
        return True
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(hf_hub_download(name, "README.md", revision=branch, local_dir=scratch)).read_text("utf-8")
    body = text.split("---", 2)[-1] if text.startswith("---") else text
    return MARK in text or not body.strip()


def check_new(target: Path) -> None:
    """Raises UserError if something is at `target`."""
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; name a new directory")


def pull(spec: str, target: Path) -> str:
    """Downloads a model into a new directory and returns its commit. Repeating an interrupted download resumes it."""
    name, revision = address(spec)
    check_new(target)
    downloaded = snapshot(name, revision)
    if not (downloaded / "config.json").is_file():
        raise UserError(f"{name} has no config.json, so it is not a model in Hugging Face's format")
    with replacing(target) as fresh:
        shutil.copytree(downloaded, fresh, dirs_exist_ok=True)  # the cache has links, to files that it may share
    return downloaded.name


def snapshot(name: str, revision: str | None, cache: Path | None = None) -> Path:
    """The folder of a repository's files in the client's cache, or in `cache`; it is named after the commit."""
    with _explained(f"cannot download {HUB}{name}", "the same command downloads what is missing"):
        from huggingface_hub import snapshot_download

        left_out = f"{CONSOLIDATED}*.safetensors"
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns=left_out, cache_dir=cache)
        )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status from which the client's error arose, if any."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return int(response.status_code)
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _explained(what: str, again: str) -> Iterator[None]:
    """Turns the errors of the hub's client, httpx and the system into a UserError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise UserError(f"{what}: it needs the hub's client: pip install 'bessemer[hf]'") from None
    except Exception as error:
        status = _status(error)
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            fix = "log in (hf auth login), or set HF_TOKEN to a token with write access"
        elif status == 403:
            fix = "the token does not allow this; use one with write access, or another owner"
        elif status == 404:
            fix = "check the name and the revision; a private repository also needs a token (HF_TOKEN)"
        else:
            fix = f"check the network; {again}"
        raise UserError(f"{what} ({type(error).__name__}: {first[:200]}); {fix}") from error
