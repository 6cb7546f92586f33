"""Which files have been checked: reading 26,000 gold answers as algebra takes minutes, and every process of a run opens
the file.

An empty file in the cache says so, `CACHE/checked/HASH`, CACHE being $BESSEMER_CACHE, else the user's. The hash is of
the bytes of the file, of the family's code, and of the versions of what it calls: if any of these changes, the file is
checked again. Without a cache it is checked whenever it is opened.
"""

import hashlib
import inspect
import os
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from bessemer import system

LIBRARIES = ("math-verify", "latex2sympy2-extended", "sympy", "reasoning-gym")


class Record:
    """The record of one file, and of the class of its tasks."""

    def __init__(self, kind: type, path: Path) -> None:
        folder = os.environ.get("BESSEMER_CACHE") or system.user_cache()
        self.path: Path | None = None
        with suppress(OSError, TypeError):  # TypeError: a class without a file, typed in by hand
            digest = hashlib.sha256(f"{kind.__qualname__}\0{code_version()}\0".encode())
            digest.update(Path(inspect.getfile(kind)).read_bytes())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            self.path = Path(folder, "checked", digest.hexdigest()).absolute() if folder else None
        self.exists = self.path is not None and self.path.is_file()

    def write(self) -> None:
        """Called when every check has passed."""
        if self.path is not None and not self.exists:
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()


@cache
def code_version() -> str:
    """Of this package's tasks and the libraries that they call."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}\0".encode())
    return digest.hexdigest()
