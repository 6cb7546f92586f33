"""Writing that survives a kill at any moment, and the operating system's complaints in words a user can act on.

Invariant: a file written by `write_atomic` is either its old self or its new self, never something between.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bessemer.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def write_atomic(path: Path, data: str | bytes) -> None:
    """Temporary file beside it, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8", "replace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Some file systems refuse to sync a folder; then the rename is all we have."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(error: BaseException, path: Path) -> UserError | None:
    """The UserError that `error` amounts to, or None when it is a bug. `path` is named when the error names none."""
    # libraries that write from Rust or C++ (safetensors, torch) raise their own types; the words are the system's
    number = error.errno if isinstance(error, OSError) else None
    where = error.filename if isinstance(error, OSError) and error.filename else path
    if number in _FULL or "No space left on device" in str(error):
        return UserError(
            f"disk full: cannot write {where}; free some space and run the same command again, what was saved is kept"
        )
    if number in _FORBIDDEN:
        why = error.strerror if isinstance(error, OSError) else error
        return UserError(
            f"no permission for {where} ({why}); change its owner or mode, or choose another folder (--out)"
        )
    return None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's refusals inside the block into UserErrors that name the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (told := explain(error, path)) is not None:
            raise told from error
        raise
