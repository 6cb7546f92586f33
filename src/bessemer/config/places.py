"""Where the names in a recipe lead: to files from the recipe's folder, and to one revision of each data set of the hub.

A run enters `of_recipe` once. What reads a path asks `located`, so that a task keeps the name it has in the recipe
(problems are shuffled by it) wherever its file lies. Processes forked inside inherit the places.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bessemer.errors import UserError

HUB = "hf://"
REVISIONS = "revisions.json"
"""File of a run, or of a data build, with the commits of what it reads on the hub."""


def read_text(path: Path, what: str, instead: str = "") -> str:
    """The text of a file that a user wrote. `what` it should be, and where there is one `instead`, for the errors."""
    try:
        return path.read_text("utf-8-sig")  # some editors put a byte order mark in front
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}" + (f"; {instead}" if instead else "")) from None
    except IsADirectoryError:
        inside = f": {path / 'recipe.toml'}" if (path / "recipe.toml").is_file() else ""
        raise UserError(f"{path} is a directory; name the {what} itself{inside}") from None
    except UnicodeDecodeError as error:
        where = f"{path}, line {error.object[: error.start].count(10) + 1}"
        byte = error.object[error.start]
        raise UserError(
            f"{where} is not UTF-8 text (byte {byte:#04x}); save it as UTF-8, in an editor or with iconv"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name another {what}, or change its mode") from None


@dataclass(frozen=True)
class _Places:
    folder: Path | None = None
    """Where relative paths start; None: in the working directory alone."""
    revisions: Path | None = None
    """File {address on the hub: commit}; None: nothing is pinned."""


_current = _Places()


@contextmanager
def of_recipe(folder: str | Path | None, revisions: Path | None = None) -> Iterator[None]:
    """Inside, names are those of a recipe in `folder`, whose run pins addresses on the hub in the file `revisions`."""
    global _current
    previous, _current = _current, _Places(None if folder is None else Path(folder), revisions)
    try:
        yield
    finally:
        _current = previous


def located(name: str | Path) -> Path:
    """The path of a name: from the recipe's folder or, if there is nothing, from the working directory."""
    path = Path(name)
    if path.is_absolute() or _current.folder is None:
        return path
    beside = _current.folder / path
    if not os.path.lexists(beside):
        return path
    return _short(beside)


def matching(pattern: str) -> list[Path]:
    """The files of a pattern such as data/**/*.txt, looked for like a name."""
    folders = [Path()] if _current.folder is None else [_current.folder, Path()]
    every = (sorted(map(Path, glob.glob(str(folder / pattern), recursive=True))) for folder in folders)
    return next(filter(None, ([_short(path) for path in paths if path.is_file()] for paths in every)), [])


def _short(path: Path) -> Path:
    """From the working directory, if it lies there: shorter in messages."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def looked_in(name: str | Path) -> str:
    """For the error about a name that leads nowhere: " (looked in A, the recipe's folder, and in B)"."""
    if Path(name).is_absolute() or _current.folder is None or _current.folder == Path.cwd():
        return ""
    return f" (looked in {_current.folder}, the recipe's folder, and in {Path.cwd()}, the working directory)"


def revisions_file() -> Path | None:
    """The file in which the run pins addresses on the hub; None outside a run."""
    return _current.revisions


def known_revision(address: str) -> str | None:
    """The commit that the run has pinned for an address such as hf://owner/name; None if it has not."""
    if _current.revisions is None or not _current.revisions.is_file():
        return None
    try:
        pinned = json.loads(_current.revisions.read_bytes())
        return None if pinned.get(address) is None else str(pinned[address])
    except (ValueError, AttributeError):
        raise UserError(
            f"{_current.revisions} is broken; write the commit of each address into it, or delete it to take the newest"
        ) from None
