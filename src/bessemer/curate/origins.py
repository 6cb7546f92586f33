"""What a source consists of, cut into units of about equal work.

A unit is a list of pieces: small files together, a byte range of a big .jsonl or .txt, row groups of a big .parquet,
some files of a data set on the hub, or a whole registered source. What is compressed, an archive or UTF-16 cannot be
cut and is a piece of its own. Units follow from the source alone, never from the number of workers.
"""

import codecs
import glob
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.curate.settings import Source
from bessemer.data import local, sources
from bessemer.errors import UserError

HTML = (".html", ".htm")
WARC = (".warc", ".wet")
KINDS = (".jsonl", ".txt", ".parquet", *HTML, *WARC)
"""What is read, plain or, all but .parquet, as .gz or .zst."""
SMALLEST_FILE = 64 << 10
"""Opening a file costs something, so none counts for less when units are cut."""
REGISTERED, HUB = "registered", "hub"


class Piece(NamedTuple):
    """Part of a source. Equal pieces hold equal texts: a file that was written to is another piece."""

    path: str
    """A file, or the spec of a source that is none."""
    kind: str
    """A suffix of KINDS, REGISTERED or HUB."""
    start: int = 0
    """First byte, row group, or part of a data set."""
    end: int = 0
    """One past the last; of HUB, the number of parts."""
    size: int = 0
    """Of the whole file, bytes."""
    changed: int = 0
    """When the file was written to last, ns."""

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.end >= self.size


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time."""

    source: Source
    number: int
    pieces: tuple[Piece, ...]
    bytes: int
    """About; 0 where nobody knows."""

    @property
    def name(self) -> str:
        return f"{self.source.name}/{self.number:05d}"

    def facts(self) -> list[Any]:
        return [list(piece) for piece in self.pieces]


def units(source: Source, unit_bytes: int, cache: str | None) -> tuple[list[Unit], int]:
    """(the units of a source, number of files in its folder that nobody can read)."""
    if source.spec.startswith(local.HUB):
        parts = local.hub_files(source.spec)
        return [_unit(source, i, [Piece(source.spec, HUB, i, parts)], 0) for i in range(parts)], 0
    if source.spec in sources.SOURCES:
        if package := sources.SOURCES[source.spec].package:
            from bessemer.data.fetch import fetch

            fetch(package, cache)  # here, once, and not in every worker
        return [_unit(source, 0, [Piece(source.spec, REGISTERED)], 0)], 0
    files, others = _files(source)
    found: list[Unit] = []
    some: list[Piece] = []
    size = 0
    for file in files:
        for piece, weight in _pieces(file, source, unit_bytes):
            if some and size + weight > unit_bytes:
                found.append(_unit(source, len(found), some, size))
                some, size = [], 0
            some.append(piece)
            size += weight
    if some:
        found.append(_unit(source, len(found), some, size))
    return found, others


def _unit(source: Source, number: int, pieces: list[Piece], size: int) -> Unit:
    return Unit(source, number, tuple(pieces), size)


def _files(source: Source) -> tuple[list[Path], int]:
    path = Path(source.spec)
    if path.is_dir():
        every = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.exists():
        every = [path]
    elif any(mark in source.spec for mark in "*?["):
        every = sorted(Path(found) for found in glob.glob(source.spec, recursive=True) if Path(found).is_file())
    else:
        sources.documents(source.spec)  # says what is wrong with it
        raise AssertionError(source.spec)
    files = [file for file in every if _readable(file)]
    if not files:
        raise UserError(
            f'source "{source.name}": {source.spec} holds no file that ends in {", ".join(KINDS)} '
            f"(.gz and .zst too); check from"
        )
    return files, len(every) - len(files)


def _readable(file: Path) -> bool:
    return local.kind(file) in KINDS and not (local.kind(file) == ".parquet" and file.suffix in local.COMPRESSED)


def _pieces(file: Path, source: Source, unit_bytes: int) -> Iterator[tuple[Piece, int]]:
    """(piece, its weight in bytes) of a file, in order."""
    facts, kind = file.stat(), local.kind(file)
    size, changed = facts.st_size, facts.st_mtime_ns
    if kind == ".parquet":
        yield from _row_groups(file, source, size, changed, unit_bytes)
    elif kind in (".jsonl", ".txt") and file.suffix == kind and size > unit_bytes and not _utf16(file):
        count = -(-size // unit_bytes)
        edges = [size * i // count for i in range(count + 1)]
        for start, end in pairwise(edges):
            yield Piece(str(file), kind, start, end, size, changed), end - start
    else:
        yield Piece(str(file), kind, 0, size, size, changed), max(size, SMALLEST_FILE)


def _row_groups(file: Path, source: Source, size: int, changed: int, unit_bytes: int) -> Iterator[tuple[Piece, int]]:
    import pyarrow.parquet as pq  # slow to import, and needed here only

    try:
        facts = pq.ParquetFile(file).metadata
        weights = [facts.row_group(group).total_byte_size for group in range(facts.num_row_groups)]
    except (OSError, ValueError):  # broken: reading it says so, as the source's `bad` wants
        yield Piece(str(file), ".parquet", 0, 0, size, changed), max(size, SMALLEST_FILE)
        return
    start = weight = 0
    for group, bytes_ in enumerate(weights):
        if group > start and weight + bytes_ > unit_bytes:
            yield Piece(str(file), ".parquet", start, group, size, changed), weight
            start, weight = group, 0
        weight += bytes_
    yield Piece(str(file), ".parquet", start, len(weights), size, changed), max(weight, SMALLEST_FILE)


def _utf16(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
