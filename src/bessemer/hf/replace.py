"""Puts a model directory in place atomically, without overwriting anything else.

- The target is the old or the new one, complete and flushed to disk; never a mixture. The new one is built next to it
  and renamed. Files of an old directory that are not replaced (a model card, a tokenizer) are carried over; its weights
  are not.
- Errors of the system (disk full, no permission) become UserErrors, and nothing half-written remains.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from bessemer.data.model_files import INDEX, PICKLES, SUMS
from bessemer.errors import UserError
from bessemer.system import claim, sync_folder

ADAPTER_CONFIG = "adapter_config.json"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h


@contextmanager
def replacing(target: Path, drop: Collection[str] = ()) -> Iterator[Path]:
    """Yields a new folder next to `target` that takes its place when the block succeeds. `drop` names files of the old
    one that are not carried over."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a directory")
    is_model = any((target / name).exists() for name in ("config.json", ADAPTER_CONFIG))
    if target.is_dir() and any(target.iterdir()) and not is_model:
        raise UserError(f"{target} has files but is not a model directory; name an empty or a new directory")
    with alone(target.resolve()) as (fresh, old, target):
        # A killed process may have left a partial new directory, which is removed, or the old one, which is restored.
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        try:
            shutil.rmtree(old, ignore_errors=True)
            fresh.mkdir()
            yield fresh
            if target.is_dir():
                _carry_over(target, fresh, drop)
            sync_folder(fresh)
            _swap(fresh, target, old)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone(target: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Holds the lock of a target; yields two names next to it, for the new and the old one, and the target. What the
    system refuses becomes a UserError."""
    fresh, old, path = (target.with_name(f".{target.name}.bessemer-{kind}") for kind in ("new", "old", "lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+") as lock:
            lock.seek(0)
            # a holder deletes its lock at the end: one that was opened before that locks nothing
            if not claim(lock, lock.read()) or not path.exists() or not os.path.samefile(path, lock.fileno()):
                raise UserError(f"another process is writing {target}; wait for it, or name another target")
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            try:
                yield fresh, old, target
            finally:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or target}: {error.strerror or error}; {target} is unchanged. "
            f"{_remedy(error, target)}"
        ) from error


def _swap(fresh: Path, target: Path, old: Path) -> None:
    """Puts the new directory at `target`. The old one, if there was one, is then at `fresh` or `old`."""
    if not target.exists():
        os.rename(fresh, target)
        return
    if exchange(fresh, target):
        return
    # POSIX cannot rename over a directory with files in it, so the old one is renamed first; `replacing` restores it if
    # the process dies in between.
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(old, target)
        raise


def exchange(first: Path, second: Path) -> bool:
    """Swaps two paths atomically; returns False if the system cannot do this (Linux can)."""
    try:
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
    except (OSError, TypeError):
        return False
    return rename is not None and not rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE)


def _carry_over(target: Path, fresh: Path, drop: Collection[str]) -> None:
    for path in target.iterdir():
        if path.name in (ADAPTER_CONFIG, *drop) or holds_weights(path) or (fresh / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def holds_weights(path: Path) -> bool:
    """Whether a file of a model directory holds weights, or says where or what they are: safetensors, a DCP checkpoint,
    or pickled ones under their usual names, which are read nowhere."""
    indices = path.name in (INDEX, SUMS, ".metadata") or path.name.endswith(".bin.index.json")
    pickled = path.suffix in PICKLES and re.match(r"(?:pytorch_model|model|adapter_model|consolidated)\b", path.name)
    return indices or path.suffix in (".safetensors", ".distcp") or bool(pickled)


def _remedy(error: OSError, target: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"Free some {lacking(target.parent)} or choose another place"
    return "Choose another place"


def lacking(folder: Path) -> str:
    """What a file system that refuses to write has run out of."""
    try:
        facts = os.statvfs(folder)
    except OSError:
        return "space"
    if facts.f_files and not facts.f_favail:
        return f"inodes (each file takes one; all {facts.f_files:,} are taken, see df -i)"
    return "space"
