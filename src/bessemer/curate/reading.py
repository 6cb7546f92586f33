"""Pieces to texts. What cannot be read becomes a `Fault` with a reason, and reading goes on behind it.

Memory is bounded: a line, a record of an archive or a page is read up to the source's `longest` bytes and then left;
a row group of a parquet file is what pyarrow holds of 1,024 rows.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from bessemer.curate import web
from bessemer.curate.decode import UTF8, Lines, decode
from bessemer.curate.origins import HTML, HUB, REGISTERED, Piece
from bessemer.curate.records import BROKEN_FILE, BROKEN_RECORD, EMPTY, ENCODING, REASONS, TOO_LONG, Fault, Found, Text
from bessemer.curate.settings import Source
from bessemer.data import local, sources
from bessemer.errors import UserError


class Gone(Exception):
    """A source that was there when the build began and is not now: worth another try."""


def texts(piece: Piece, source: Source, cache: str | None) -> Iterator[Found]:
    """The documents of a piece, in order; `Gone` where it disappears or changes under the reader."""
    if piece.kind == REGISTERED:
        for number, document in enumerate(sources.documents(piece.path, cache), 1):
            yield Text(document.text, f"{piece.path}: {number}", len(document.text.encode()))
        return
    if piece.kind == HUB:
        try:
            for where, record in local.hub_records(piece.path, piece.start, piece.end):
                yield _record(record, where, source)
        except UserError as error:
            raise Gone(str(error)) from error
        return
    try:
        yield from _file(piece, source)
        facts = os.stat(piece.path)
    except OSError as error:  # what is wrong with its bytes, the readers have said: this is the system
        raise Gone(f"{piece.path} cannot be read any more ({error.strerror or error})") from error
    if (facts.st_size, facts.st_mtime_ns) != (piece.size, piece.changed):
        raise Gone(f"{piece.path} was written to while it was read")


def _file(piece: Piece, source: Source) -> Iterator[Found]:
    path = Path(piece.path)
    os.stat(path)
    try:
        if piece.kind == ".parquet":
            for where, record in local.parquet_records(path, range(piece.start, piece.end), source.text_key):
                yield _record(record, where, source)
        elif piece.kind in HTML:
            yield from web.page(path, source.longest)
        elif piece.kind == ".jsonl":
            yield from _jsonl(piece, source)
        elif piece.kind == ".txt":
            yield from _txt(piece, source)
        else:
            yield from web.archive(path, source.longest)
    except (OSError, EOFError, zlib.error, UserError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the system, not of what is in the file
        yield Fault(BROKEN_FILE, piece.path, str(error))


def _jsonl(piece: Piece, source: Source) -> Iterator[Found]:
    lines = Lines(Path(piece.path), piece.start, source.longest)
    try:
        for offset, line in lines:
            if not piece.whole and offset >= piece.end:
                return
            where = f"{piece.path} at byte {offset}"
            if line is None:
                yield _too_long(where, source)
                continue
            yield _json(line, where, lines.encoding, source)
    finally:
        lines.close()


def _json(line: bytes, where: str, encoding: str, source: Source) -> Found:
    if not line.strip():
        return Fault(EMPTY, where, "an empty line", len(line))
    decoded = decode(line)
    if decoded is None:
        return Fault(ENCODING, where, REASONS[ENCODING], len(line))
    try:
        record = json.loads(decoded[0])
    except (ValueError, RecursionError) as error:
        return Fault(BROKEN_RECORD, where, f"not JSON ({error})", len(line))
    return _record(record, where, source, encoding if encoding != UTF8 else decoded[1])


def _record(record: object, where: str, source: Source, encoding: str = UTF8) -> Found:
    if isinstance(record, dict) and record.get(source.text_key) is None and source.text_key in record:
        return Fault(EMPTY, where, f"{source.text_key} is null")
    if isinstance(record, dict) and isinstance(text := record.get(source.text_key), str) and not text.strip():
        return Fault(EMPTY, where, f"{source.text_key} is empty", len(text))
    try:
        document = local.document(record, source.domain, where, source.text_key)
    except UserError as error:
        return Fault(BROKEN_RECORD, where, str(error).removeprefix(f"{where}: "))
    return _text(document.text, where, encoding, source)


def _text(text: str, where: str, encoding: str, source: Source) -> Found:
    size = len(text.encode(UTF8))
    return _too_long(where, source, size) if size > source.longest else Text(text, where, size, encoding)


def _too_long(where: str, source: Source, size: int = 0) -> Fault:
    return Fault(TOO_LONG, where, f"more than {source.longest:,} bytes in one document", size)


def _txt(piece: Piece, source: Source) -> Iterator[Found]:
    """Documents are parted by blank lines. A document belongs to the piece in which the blank line before it begins."""
    lines = Lines(Path(piece.path), piece.start, source.longest)
    ours, start, size = piece.start == 0, 0, 0
    held: list[bytes] | None = []
    try:
        for offset, line in lines:
            if line is not None and not line.strip():
                if size:
                    yield _paragraph(held, size, f"{piece.path} at byte {start}", lines.encoding, source)
                    held, size = [], 0
                ours = piece.whole or offset < piece.end
                if not ours:
                    return
            elif ours:
                if not size:
                    start = offset
                size += len(line) if line is not None else source.longest + 1
                if size > source.longest:
                    held = None
                elif held is not None:
                    held.append(line)
        if size:
            yield _paragraph(held, size, f"{piece.path} at byte {start}", lines.encoding, source)
    finally:
        lines.close()


def _paragraph(held: list[bytes] | None, size: int, where: str, encoding: str, source: Source) -> Found:
    if held is None:
        return _too_long(where, source, size)
    decoded = decode(b"".join(held))
    if decoded is None:
        return Fault(ENCODING, where, REASONS[ENCODING], size)
    return _text(decoded[0].rstrip("\r\n"), where, encoding if encoding != UTF8 else decoded[1], source)
