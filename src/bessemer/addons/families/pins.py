"""The commit of every model and data set of the hub that a run reads, fixed when it is read first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import filelock

from bessemer.config.places import known_revision, revisions_file


def pin(address: str, newest: Callable[[], str]) -> str | None:
    """The commit of an address in this run: the pinned one, else `newest()`, which is pinned. None outside a run."""
    path = revisions_file()
    if path is None or (revision := known_revision(address)) is not None:
        return None if path is None else revision
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        if (revision := known_revision(address)) is None:  # another process may have been first
            revision = newest()
            pinned = json.loads(path.read_bytes()) if path.is_file() else {}
            temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            temporary.write_text(json.dumps(pinned | {address: revision}, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
    return revision
