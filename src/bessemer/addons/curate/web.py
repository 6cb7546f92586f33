"""Web pages and archives: the main text of HTML files and WARC records (trafilatura, warcio).

Records are read up to a bound. A truncated WARC file, or WET file with plain text, yields the records before the cut.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from bessemer.addons.curate.decode import (
    BROKEN_FILE,
    EMPTY,
    ENCODING,
    NO_TEXT,
    REASONS,
    TOO_LONG,
    RawText,
    ReadError,
    ReadResult,
    decode,
)
from bessemer.addons.families.data_sets import compression, opened
from bessemer.errors import UserError

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

MOST_EXPANDED = 1 << 26
"""Bytes that one block of a compressed body may become."""
_HTML = re.compile(r"text/html|application/xhtml", re.IGNORECASE)
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([A-Za-z0-9_.:-]+)", re.IGNORECASE)


def page(path: Path, longest: int) -> Iterator[ReadResult]:
    """The text of an HTML file."""
    with opened(path) as file:
        yield _page(file.read(longest + 1), str(path), longest)


def archive(path: Path, longest: int) -> Iterator[ReadResult]:
    """The pages of a WARC file, compressed record by record or whole, and the plain texts of a WET file."""
    _require_libraries()
    from warcio.archiveiterator import ArchiveIterator
    from warcio.bufferedreaders import BufferedReader
    from warcio.exceptions import ArchiveLoadFailed

    BufferedReader.DECOMPRESSORS["br"] = _Brotli  # warcio's own sets an attribute that brotli 1.2 forbids
    # warcio handles gzip itself and must see it record by record; other compressions are undone here
    with path.open("rb") if compression(path) in ("", ".gz") else opened(path) as file:
        records: Iterator[ArcWarcRecord] = iter(ArchiveIterator(file))
        number = 0
        while True:
            where = f"{path}: record {number + 1}"
            try:
                record = next(records, None)
                if record is None:
                    break
                number += 1
                if not _is_page(record):
                    continue
                raw = record.raw_stream
                body = record.content_stream().read(longest + 1)
                remaining = getattr(raw, "limit", None)  # None if the header gives no length, as in a truncated record
                if remaining is None or (len(body) <= longest and remaining > 0 and not raw.read(1)):
                    raise EOFError(
                        f"the record is truncated{f', {remaining:,} bytes are missing' if remaining else ''}"
                    )
            # AttributeError: a header cut before its URI
            except (ArchiveLoadFailed, EOFError, ValueError, AttributeError, io.UnsupportedOperation) as error:
                yield ReadError(BROKEN_FILE, where, str(error))
                return
            address = record.rec_headers.get_header("WARC-Target-URI")
            if record.rec_type == "conversion" and len(body) > longest:
                yield _too_long(where, longest, len(body))
            elif record.rec_type == "conversion":
                text = body.decode("utf-8", "replace")
                yield RawText(text, where, len(body), address=address) if text.strip() else _empty(where)
            else:
                declared = _CHARSET.search(record.http_headers.get_header("Content-Type", ""))
                yield _page(body, where, longest, declared[1] if declared else None, address)
        if not number:
            yield ReadError(BROKEN_FILE, str(path), "holds no WARC record")


class _Brotli:
    """The body of a page in brotli, for warcio, which leaves a body as it is if this fails at its beginning."""

    unused_data = b""

    def __init__(self) -> None:
        self._body = import_module("brotli").Decompressor()

    def decompress(self, data: bytes) -> bytes:
        text: bytes = self._body.process(data, output_buffer_limit=MOST_EXPANDED)
        if not self._body.can_accept_more_data():
            raise ValueError("a few kilobytes expand to a bomb")
        return text


def _is_page(record: ArcWarcRecord) -> bool:
    if record.rec_type == "conversion":
        return True
    headers = record.http_headers
    if record.rec_type != "response" or headers is None or headers.get_statuscode() != "200":
        return False
    return bool(_HTML.search(headers.get_header("Content-Type", "")))


def _page(body: bytes, where: str, longest: int, charset: str | None = None, address: str | None = None) -> ReadResult:
    if len(body) > longest:
        return _too_long(where, longest, len(body))
    if not body.strip():
        return ReadError(EMPTY, where, REASONS[EMPTY])
    decoded = _declared(body, charset) or decode(body, declared=True)
    if decoded is None:
        return ReadError(ENCODING, where, REASONS[ENCODING], len(body))
    text = _main_text(decoded[0])
    if not text or not text.strip():
        return ReadError(NO_TEXT, where, REASONS[NO_TEXT], len(body))
    return RawText(text, where, len(body), decoded[1], address)


def _declared(body: bytes, charset: str | None) -> tuple[str, str] | None:
    """Decode as the server declares, after trying UTF-8: servers are often wrong, and other encodings are rarely valid
    UTF-8."""
    if charset is None:
        return None
    try:
        return body.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        return body.decode(charset), charset.lower()
    except (UnicodeError, LookupError):
        return None


def _main_text(html: str) -> str | None:
    _require_libraries()
    import trafilatura

    # favor_precision as in RefinedWeb and FineWeb; deduplicate=False, or the result would depend on the order of pages
    return trafilatura.extract(
        html, favor_precision=True, include_comments=False, include_tables=True, deduplicate=False
    )


def _too_long(where: str, longest: int, size: int) -> ReadResult:
    return ReadError(TOO_LONG, where, f"more than {longest:,} bytes in one page", size)


def _empty(where: str) -> ReadResult:
    return ReadError(EMPTY, where, REASONS[EMPTY])


@cache
def _require_libraries() -> None:
    """Raise a UserError if the libraries for web pages are not installed."""
    try:
        import trafilatura  # noqa: F401
        import warcio  # noqa: F401
    except ImportError as error:
        raise UserError(f"web pages need {error.name}: pip install 'bessemer[data]'") from None
