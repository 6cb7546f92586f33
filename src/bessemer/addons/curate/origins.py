"""The files of a source, divided into units of about equal work.

A unit is a list of pieces: several small files, a byte range of a large .jsonl or .txt, row groups of a large .parquet,
some files of a data set on the Hub, or a whole registered source. Compressed files, archives and UTF-16 files cannot be
cut; each is one piece. Units depend only on the source, never on the number of workers.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.addons.curate.settings import Source
from bessemer.addons.families import data_sets
from bessemer.config import places
from bessemer.config.places import located, matching
from bessemer.data import documents, sources
from bessemer.errors import UserError

HTML = (".html", ".htm")
WARC = (".warc", ".wet")
KINDS = (".jsonl", ".txt", ".parquet", *HTML, *WARC)
"""Readable suffixes; all except .parquet may also be compressed as .gz or .zst."""
SMALLEST_FILE = 64 << 10
"""Least weight of a file in cutting units, because opening a file has a cost."""
REGISTERED, HUB = "registered", "hub"


class SourcePiece(NamedTuple):
    """A part of a source. Equal pieces hold equal texts: a modified file makes a different piece."""

    path: str
    """A file, or the spec of a source that is not a file."""
    kind: str
    """A suffix of KINDS, REGISTERED or HUB."""
    start: int = 0
    """First byte, row group, or Hub file."""
    end: int = 0
    """One past the last; for HUB, the number of files."""
    size: int = 0
    """Bytes of the whole file."""
    changed: int = 0
    """Modification time of the file, ns."""

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.end >= self.size


@dataclass(frozen=True)
class Unit:
    """What one job reads."""

    source: Source
    number: int
    pieces: tuple[SourcePiece, ...]
    bytes: int
    """Approximate size; 0 if unknown."""

    @property
    def name(self) -> str:
        return f"{self.source.name}/{self.number:05d}"

    def facts(self) -> list[Any]:
        return [list(piece) for piece in self.pieces]


def units(source: Source, unit_bytes: int, cache: str | None) -> tuple[list[Unit], int]:
    """(the units of a source, the number of ignored files in its folder)."""
    if source.spec.startswith(places.HUB):
        parts = data_sets.hub_files(source.spec)
        spec = data_sets.at_commit(source.spec)
        return [_unit(source, i, [SourcePiece(spec, HUB, i, parts)], 0) for i in range(parts)], 0
    if source.spec in sources.registered():
        if package := sources.registered()[source.spec].package:
            from bessemer.data.fetch import fetch

            fetch(package, cache)  # once, instead of in every worker
        return [_unit(source, 0, [SourcePiece(source.spec, REGISTERED)], 0)], 0
    files, ignored = _files(source)
    listed: list[Unit] = []
    some: list[SourcePiece] = []
    size = 0
    for file in files:
        for piece, weight in _pieces(file, source, unit_bytes):
            if some and size + weight > unit_bytes:
                listed.append(_unit(source, len(listed), some, size))
                some, size = [], 0
            some.append(piece)
            size += weight
    if some:
        listed.append(_unit(source, len(listed), some, size))
    return listed, ignored


def _unit(source: Source, number: int, pieces: list[SourcePiece], size: int) -> Unit:
    return Unit(source, number, tuple(pieces), size)


def _files(source: Source) -> tuple[list[Path], int]:
    path = located(source.spec)
    if path.is_dir():
        every = documents.files_under(path, lambda _: True)
    elif path.exists():
        every = [path]
    elif any(mark in source.spec for mark in "*?["):
        every = matching(source.spec)
    else:
        sources.documents(source.spec)  # raises the UserError that explains what is wrong
        raise AssertionError(source.spec)
    files = [file for file in every if _is_readable(file)]
    if not files:
        raise UserError(
            f'source "{source.name}": {source.spec} contains no file ending in {", ".join(KINDS)} '
            f"(.gz and .zst too); check from"
        )
    return files, len(every) - len(files)


def _is_readable(file: Path) -> bool:
    return data_sets.kind(file) in KINDS and not (data_sets.kind(file) == ".parquet" and data_sets.compression(file))


def _pieces(file: Path, source: Source, unit_bytes: int) -> Iterator[tuple[SourcePiece, int]]:
    """The pieces of a file with their weights in bytes, in order."""
    facts, kind = file.stat(), data_sets.kind(file)
    size, changed = facts.st_size, facts.st_mtime_ns
    if kind == ".parquet":
        yield from _row_groups(file, source, size, changed, unit_bytes)
    elif kind in (".jsonl", ".txt") and not data_sets.compression(file) and size > unit_bytes and not _is_utf16(file):
        count = -(-size // unit_bytes)
        edges = [size * i // count for i in range(count + 1)]
        for start, end in pairwise(edges):
            yield SourcePiece(str(file), kind, start, end, size, changed), end - start
    else:
        yield SourcePiece(str(file), kind, 0, size, size, changed), max(size, SMALLEST_FILE)


def _row_groups(
    file: Path, source: Source, size: int, changed: int, unit_bytes: int
) -> Iterator[tuple[SourcePiece, int]]:
    import pyarrow.parquet as pq  # slow to import, and needed here only

    try:
        facts = pq.ParquetFile(file).metadata
        weights = [facts.row_group(group).total_byte_size for group in range(facts.num_row_groups)]
    except (
        OSError,
        ValueError,
        NotImplementedError,
    ):  # corrupt: reading reports it, according to the source's `bad` key
        yield SourcePiece(str(file), ".parquet", 0, 0, size, changed), max(size, SMALLEST_FILE)
        return
    start = weight = 0
    for group, bytes_ in enumerate(weights):
        if group > start and weight + bytes_ > unit_bytes:
            yield SourcePiece(str(file), ".parquet", start, group, size, changed), weight
            start, weight = group, 0
        weight += bytes_
    yield SourcePiece(str(file), ".parquet", start, len(weights), size, changed), max(weight, SMALLEST_FILE)


def _is_utf16(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
