"""Reads pieces into texts. What cannot be read becomes a `ReadError` with a reason, and reading continues after it.

Memory is bounded: a line, an archive record or a page is read up to the source's `longest` bytes; pyarrow holds 1,024
rows of a parquet file."""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from bessemer.addons.curate import web
from bessemer.addons.curate.decode import (
    BROKEN_FILE,
    BROKEN_RECORD,
    EMPTY,
    ENCODING,
    REASONS,
    TOO_LONG,
    UTF8,
    Lines,
    RawText,
    ReadError,
    ReadResult,
    decode,
)
from bessemer.addons.curate.origins import HTML, HUB, REGISTERED, SourcePiece
from bessemer.addons.curate.settings import Source
from bessemer.addons.families import data_sets
from bessemer.data import documents, sources
from bessemer.errors import UserError


class SourceGone(Exception):
    """A source that existed when the build began has disappeared or changed; worth a retry."""


def texts(piece: SourcePiece, source: Source, cache: str | None) -> Iterator[ReadResult]:
    """The documents of a piece, in order. Raises SourceGone if the piece disappears or changes during reading."""
    if piece.kind == REGISTERED:
        for number, document in enumerate(sources.documents(piece.path, cache), 1):
            yield RawText(document.text, f"{piece.path}: {number}", len(document.text.encode()))
        return
    if piece.kind == HUB:
        try:
            for where, record in data_sets.hub_records(piece.path, piece.start, piece.end):
                yield _record(record, where, source)
        except UserError as error:
            raise SourceGone(str(error)) from error
        return
    try:
        yield from _file(piece, source)
        facts = os.stat(piece.path)
    except OSError as error:  # from the system; corrupt content is a ReadError
        raise SourceGone(f"{piece.path} can no longer be read ({error.strerror or error})") from error
    if (facts.st_size, facts.st_mtime_ns) != (piece.size, piece.changed):
        raise SourceGone(f"{piece.path} changed while it was read")


def _file(piece: SourcePiece, source: Source) -> Iterator[ReadResult]:
    path = Path(piece.path)
    os.stat(path)
    try:
        if piece.kind == ".parquet":
            for where, record in data_sets.parquet_records(path, range(piece.start, piece.end), source.text_key):
                yield _record(record, where, source)
        elif piece.kind in HTML:
            yield from web.page(path, source.longest)
        elif piece.kind == ".jsonl":
            yield from _jsonl(piece, source)
        elif piece.kind == ".txt":
            yield from _txt(piece, source)
        else:
            yield from web.archive(path, source.longest)
    except (OSError, EOFError, zlib.error, UnicodeError, UserError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # from the system, not from the content
        yield ReadError(BROKEN_FILE, piece.path, str(error))


def _jsonl(piece: SourcePiece, source: Source) -> Iterator[ReadResult]:
    lines = Lines(Path(piece.path), piece.start, source.longest)
    try:
        for offset, line in lines:
            if not piece.is_whole and offset >= piece.end:
                return
            where = f"{piece.path} at byte {offset}"
            if line is None:
                yield _too_long(where, source)
                continue
            yield _json(line, where, lines.encoding, source)
    finally:
        lines.close()


def _json(line: bytes, where: str, encoding: str, source: Source) -> ReadResult:
    if not line.strip():
        return ReadError(EMPTY, where, "an empty line", len(line))
    decoded = decode(line)
    if decoded is None:
        return ReadError(ENCODING, where, REASONS[ENCODING], len(line))
    try:
        record = json.loads(decoded[0])
    except (ValueError, RecursionError) as error:
        return ReadError(BROKEN_RECORD, where, f"not JSON ({error})", len(line))
    return _record(record, where, source, encoding if encoding != UTF8 else decoded[1])


def _record(record: object, where: str, source: Source, encoding: str = UTF8) -> ReadResult:
    if isinstance(record, dict) and record.get(source.text_key) is None and source.text_key in record:
        return ReadError(EMPTY, where, f"{source.text_key} is null")
    if isinstance(record, dict) and isinstance(text := record.get(source.text_key), str) and not text.strip():
        return ReadError(EMPTY, where, f"{source.text_key} is empty", len(text))
    try:
        document = documents.document(record, source.domain, where, source.text_key)
    except UserError as error:
        return ReadError(BROKEN_RECORD, where, str(error).removeprefix(f"{where}: "))
    return _text(document.text, where, encoding, source)


def _text(text: str, where: str, encoding: str, source: Source) -> ReadResult:
    size = len(text.encode(UTF8))
    return _too_long(where, source, size) if size > source.longest else RawText(text, where, size, encoding)


def _too_long(where: str, source: Source, size: int = 0) -> ReadError:
    return ReadError(TOO_LONG, where, f"more than {source.longest:,} bytes in one document", size)


def _txt(piece: SourcePiece, source: Source) -> Iterator[ReadResult]:
    """Blank lines separate documents. A document belongs to the piece where the blank line before it begins."""
    lines = Lines(Path(piece.path), piece.start, source.longest)
    inside, start, size = piece.start == 0, 0, 0
    lines_so_far: list[bytes] | None = []
    try:
        for offset, line in lines:
            if line is not None and not line.strip():
                if size:
                    yield _paragraph(lines_so_far, size, f"{piece.path} at byte {start}", lines.encoding, source)
                    lines_so_far, size = [], 0
                inside = piece.is_whole or offset < piece.end
                if not inside:
                    return
            elif inside:
                if not size:
                    start = offset
                size += len(line) if line is not None else source.longest + 1
                if size > source.longest:
                    lines_so_far = None
                elif lines_so_far is not None and line is not None:
                    lines_so_far.append(line)
        if size:
            yield _paragraph(lines_so_far, size, f"{piece.path} at byte {start}", lines.encoding, source)
    finally:
        lines.close()


def _paragraph(lines_so_far: list[bytes] | None, size: int, where: str, encoding: str, source: Source) -> ReadResult:
    if lines_so_far is None:
        return _too_long(where, source, size)
    decoded = decode(b"".join(lines_so_far))
    if decoded is None:
        return ReadError(ENCODING, where, REASONS[ENCODING], size)
    return _text(decoded[0].rstrip("\r\n"), where, encoding if encoding != UTF8 else decoded[1], source)
