"""Pages and web archives: the main text of HTML, by trafilatura, out of files and WARC records, by warcio.

A record is read up to a bound. A WARC (or WET, which holds plain text) that is cut short gives what came before.
"""

import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bessemer.curate.decode import decode
from bessemer.curate.records import BROKEN_FILE, EMPTY, ENCODING, NO_TEXT, REASONS, TOO_LONG, Fault, Found, Text
from bessemer.data.local import COMPRESSED, opened
from bessemer.errors import UserError

_HTML = re.compile(r"text/html|application/xhtml", re.IGNORECASE)
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([A-Za-z0-9_.:-]+)", re.IGNORECASE)


def page(path: Path, longest: int) -> Iterator[Found]:
    """The text of an HTML file."""
    with opened(path) as file:
        yield _page(file.read(longest + 1), str(path), longest)


def archive(path: Path, longest: int) -> Iterator[Found]:
    """The pages of a WARC file, compressed record by record or whole, and the plain texts of a WET file."""
    _needed()
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    # warcio knows gzip, and record by record it must see it; the other compressions are undone before
    with path.open("rb") if path.suffix not in COMPRESSED[1:] else opened(path) as file:
        found: Iterator[Any] = iter(ArchiveIterator(file))
        number = 0
        while True:
            where = f"{path}: record {number + 1}"
            try:
                record = next(found, None)
                if record is None:
                    break
                number += 1
                if not _wanted(record):
                    continue
                raw = record.raw_stream
                body = record.content_stream().read(longest + 1)
                left = getattr(raw, "limit", None)  # None where the header says no length, as when it is cut short
                if left is None or (len(body) <= longest and left > 0 and not raw.read(1)):
                    raise EOFError(f"the record is cut short{f', {left:,} bytes are missing' if left else ''}")
            except (ArchiveLoadFailed, EOFError, ValueError, io.UnsupportedOperation) as error:
                yield Fault(BROKEN_FILE, where, str(error))
                return
            address = record.rec_headers.get_header("WARC-Target-URI")
            if record.rec_type == "conversion":
                text = body.decode("utf-8", "replace")
                yield Text(text, where, len(body), address=address) if text.strip() else _empty(where)
            else:
                declared = _CHARSET.search(record.http_headers.get_header("Content-Type", ""))
                yield _page(body, where, longest, declared[1] if declared else None, address)
        if not number:
            yield Fault(BROKEN_FILE, str(path), "holds no WARC record")


def _wanted(record: Any) -> bool:
    if record.rec_type == "conversion":
        return True
    headers = record.http_headers
    if record.rec_type != "response" or headers is None or headers.get_statuscode() != "200":
        return False
    return bool(_HTML.search(headers.get_header("Content-Type", "")))


def _page(body: bytes, where: str, longest: int, charset: str | None = None, address: str | None = None) -> Found:
    if len(body) > longest:
        return Fault(TOO_LONG, where, f"more than {longest:,} bytes in one page", len(body))
    if not body.strip():
        return Fault(EMPTY, where, REASONS[EMPTY])
    decoded = _as_said(body, charset) or decode(body, declared=True)
    if decoded is None:
        return Fault(ENCODING, where, REASONS[ENCODING], len(body))
    text = _main_text(decoded[0])
    if not text or not text.strip():
        return Fault(NO_TEXT, where, REASONS[NO_TEXT], len(body))
    return Text(text, where, len(body), decoded[1], address)


def _as_said(body: bytes, charset: str | None) -> tuple[str, str] | None:
    """What the server says it is; utf-8 is tried first in any case, since servers are often wrong and it never is."""
    if charset is None:
        return None
    try:
        return body.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        return body.decode(charset), charset.lower()
    except (UnicodeDecodeError, LookupError):
        return None


def _main_text(html: str) -> str | None:
    _needed()
    import trafilatura

    # favor_precision as RefinedWeb and FineWeb have it; no memory of other pages, or the order of pages would matter
    return trafilatura.extract(
        html, favor_precision=True, include_comments=False, include_tables=True, deduplicate=False
    )


def _empty(where: str) -> Found:
    return Fault(EMPTY, where, REASONS[EMPTY])


@cache
def _needed() -> None:
    """UserError where the libraries for pages are not installed."""
    try:
        import trafilatura  # noqa: F401
        import warcio  # noqa: F401
    except ImportError as error:
        raise UserError(f"web pages need {error.name}: pip install 'bessemer[data]'") from None
