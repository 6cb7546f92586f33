"""SHA-256 of files, each read once: `sha256` remembers it as long as the file's size, times and inode stay the same.

The table is `CACHE/hashes.sqlite` (see `fetch.cache_dir`). Without it, for instance on a read-only disk, every call
reads the file. The hash of a file written less than two seconds before it is read is not remembered, because a second
write within the clock's resolution would look like the first.

`check_finished` compares a model with the checksums that its stage, or `bessemer pack`, recorded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

from bessemer.data.fetch import cache_dir, sha256_of
from bessemer.data.model_files import SUMS, read_text
from bessemer.errors import UserError
from bessemer.workers import cores

LARGE = 10 * 10**9
"""Bytes from which a file takes long enough to hash that a message says so."""
SETTLED_NS = 2 * 10**9
NO_VERIFY = "BESSEMER_NO_VERIFY"
"""Environment variable, set by --no-verify, so that processes started for a model skip the comparison too."""


def sha256(path: Path, fresh: bool = False) -> str:
    """Hex digest of a file, from the table if it is there. `fresh`: computed from the bytes, and the table updated."""
    name, key = str(path.resolve()), _key(path)
    with suppress(sqlite3.Error, OSError), closing(_table()) as table:
        row = None if fresh else table.execute("SELECT key, sha256 FROM hashes WHERE path = ?", (name,)).fetchone()
        if row is not None and row[0] == key:
            return str(row[1])
    if (size := path.stat().st_size) >= LARGE:
        print(f"reading {path} ({size / 1e9:.0f} GB) once, for its SHA-256", file=sys.stderr, flush=True)
    started = time.time_ns()
    digest = sha256_of(path)
    stat = path.stat()
    if key == _key(path) and started - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
        with suppress(sqlite3.Error, OSError), closing(_table()) as table, table:
            table.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", (name, key, digest))
    return digest


def sha256_of_all(paths: Iterable[Path]) -> list[str]:
    """Hex digests of many files, computed several at a time."""
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(sha256, paths))


def _key(path: Path) -> str:
    # the time of the last inode change reveals a file that was replaced and given its old date
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_dev} {stat.st_ino}"


def _table() -> sqlite3.Connection:
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    table = sqlite3.connect(folder / "hashes.sqlite", timeout=10)
    try:
        table.execute("PRAGMA synchronous = OFF")  # what a crash loses is hashed again
        table.execute("CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, key TEXT, sha256 TEXT)")
    except sqlite3.OperationalError:  # locked for long by another process, or on a read-only disk
        table.close()
        raise
    except sqlite3.DatabaseError:  # damaged: the next call makes a new one
        table.close()
        (folder / "hashes.sqlite").unlink()
        raise
    return table


def check_finished(directory: Path) -> None:
    """Raises UserError if a file of a model directory is missing or is not what done.json records of RUN/NN-STAGE/NAME,
    or SHA256SUMS of a packed model. Does nothing for other directories, or after --no-verify."""
    stage, sums = directory.resolve().parent, directory / SUMS
    packed = sums.is_file()
    record = sums if packed else stage / "done.json"
    if os.environ.get(NO_VERIFY) or not record.is_file():
        return
    run = shlex.quote(str(stage.parent))
    outputs: dict[Path, tuple[int | None, str]]
    if packed:
        writer, again = "bessemer pack", "unpack it again"
        outputs = {directory / name: (None, digest) for name, digest in listed(sums).items()}
    else:
        writer, again = "its stage", f"run the recipe again (bessemer run {run}/recipe.toml --out {run})"
        outputs = dict(_outputs(stage, directory.resolve().name))
    remedy = f"restore it from a copy, or {again}; --no-verify loads it as it is"
    for path, (size, _) in outputs.items():
        if not path.is_file():
            raise UserError(f"{path} is missing; {remedy}")
        if size not in (None, path.stat().st_size):
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, but {writer} wrote {size:,}; {remedy}")
    for path, digest in zip(outputs, sha256_of_all(outputs), strict=True):
        if digest != outputs[path][1]:
            raise UserError(f"{path} is not what {writer} wrote: its SHA-256 is not the one in {record}; {remedy}")


def listed(sums: Path) -> dict[str, str]:
    """The SHA-256 of each file that a SHA256SUMS lists, by name."""
    digests = {}
    for line in read_text(sums).splitlines():
        if not (match := re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\]+)", line)):
            raise UserError(f"{sums}: {line[:80]!r} is not a SHA-256 and the name of a file")
        digests[match[2]] = match[1]
    return digests


def _outputs(stage: Path, folder: str) -> Iterator[tuple[Path, tuple[int, str]]]:
    """The files of a folder with their size and SHA-256."""
    try:
        outputs = json.loads((stage / "done.json").read_bytes())["outputs"]
        inside = [(name, fact) for name, fact in outputs.items() if Path(name).parts[0] == folder]
        yield from ((stage / name, (int(fact["size"]), str(fact["sha256"]))) for name, fact in inside)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{stage / 'done.json'} is broken ({type(error).__name__}: {error}), so the model cannot be compared with "
            "what its stage wrote; --no-verify loads it as it is"
        ) from None
