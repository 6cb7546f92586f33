"""SHA-256 of files, each read once: `sha256` remembers it as long as the file's size, times and inode stay the same.

The table is `CACHE/hashes.sqlite` (see `fetch.cache_dir`). Without it, for instance on a read-only disk, every call
reads the file. The hash of a file written less than two seconds before it is read is not remembered, because a second
write within the clock's resolution would look like the first.

`check_finished` compares a run's model with the checksums that its stage recorded in done.json.
"""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

from bessemer.data.fetch import cache_dir, sha256_of
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
    """Raises UserError if a file of the model directory RUN/NN-STAGE/NAME is missing or is not what the stage wrote.
    Does nothing for directories that no stage made, or after --no-verify."""
    stage = directory.resolve().parent
    if os.environ.get(NO_VERIFY) or not (stage / "done.json").is_file():
        return
    outputs = dict(_outputs(stage, directory.resolve().name))
    for path, (size, _) in outputs.items():
        if not path.is_file():
            raise _unlike(path, "is missing")
        if path.stat().st_size != size:
            raise _unlike(path, f"has {path.stat().st_size:,} bytes, but its stage wrote {size:,}")
    for path, digest in zip(outputs, sha256_of_all(outputs), strict=True):
        if digest != outputs[path][1]:
            where = stage / "done.json"
            raise _unlike(path, f"is not what its stage wrote: its SHA-256 is not the one in {where}")


def _unlike(path: Path, why: str) -> UserError:
    run = shlex.quote(str(path.parents[2]))
    return UserError(
        f"{path} {why}; restore it from a copy, or run the recipe again (bessemer run {run}/recipe.toml --out {run}), "
        "which runs the stage again. --no-verify loads it as it is"
    )


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
