"""The folder of built libraries: ownership, one builder at a time, integrity and cleaning.

A library appears under its name complete or not at all; its SHA-256, stored next to it, is checked before it is loaded.
Only this user and root may have write access.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from bessemer.system import fcntl, user_cache

VARIABLE = "BESSEMER_KERNEL_CACHE"
"""Environment variable: the folder to use instead of `kernels` in the user's cache."""
WAIT_SECONDS = 130
"""How long a process waits for another that builds."""
LEFT_SECONDS = 1200
"""Leftovers of a build that are older than this belong to a killed process."""
UNUSED_SECONDS = 90 * 86400
"""Libraries that nobody has loaded for this long are deleted."""


class BuildError(Exception):
    """Why there is no library, in one line. `final`: other instruction sets would fail the same way."""

    def __init__(self, why: str, *, final: bool = False):
        super().__init__(why)
        self.final = final


def folder() -> Path:
    """The cache folder, created if missing; it may be read-only. Raises BuildError if it cannot be used safely."""
    named, cache = os.environ.get(VARIABLE), user_cache()
    if named:
        path = Path(named).absolute()
    elif cache is not None:
        path = cache / "kernels"
    else:
        raise BuildError(f"no home directory for the kernels; set {VARIABLE} to a folder of yours", final=True)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        safe = _safe(path)
    except OSError as error:
        why = error.strerror or error
        raise BuildError(f"{path} cannot be used ({why}); set {VARIABLE} to a folder of yours", final=True) from None
    if not safe:
        why = "belongs to someone else, or others can write to it"
        raise BuildError(f"{path} {why}; set {VARIABLE} to a folder of yours alone", final=True)
    return path


def intact(path: Path) -> bool:
    """Whether the library exists with the content that was built, and only this user or root can have written it."""
    try:
        if not _safe(path):
            return False
        if path.with_suffix(".sha256").read_text() != hashlib.sha256(path.read_bytes()).hexdigest():
            return False
    except (OSError, ValueError):
        return False
    with contextlib.suppress(OSError):
        os.utime(path)  # for `sweep`
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the build lock. If files cannot be locked, two processes may build the same library, which does no harm."""
    if fcntl is None:
        yield
        return
    until = time.monotonic() + WAIT_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise BuildError(f"another process holds {path} and does not finish", final=True) from None
                time.sleep(0.05)
                continue
            except OSError:  # some network file systems
                pass
            break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile also has the file open


def sweep(folder: Path) -> None:
    """Deletes leftovers of killed builds and libraries no longer in use."""
    now = time.time()
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            age = now - path.stat().st_mtime
            if path.name.startswith("build-") and age > LEFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".so" and age > UNUSED_SECONDS:
                for suffix in (".so", ".sha256", ".lock", ".failed"):
                    path.with_suffix(suffix).unlink(missing_ok=True)


def _safe(path: Path) -> bool:
    """Whether only this user and root can have written this file or folder."""
    info = path.stat()
    return info.st_uid in (0, os.getuid()) and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
