"""From bytes to text, and what reading a source yields: texts, and read errors with one of a few reasons.

Decoding tries a byte-order mark, UTF-8, the encoding that a page declares, and then a guess, but none for UTF-8 with
broken bytes, which would be valid in others.
"""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bessemer.addons.families.data_sets import opened
from bessemer.data.documents import ByteFile
from bessemer.errors import UserError

UTF8 = "utf-8"
GUESSED = 1 << 16
"""Bytes examined for a guess."""
GUESSES = (
    "gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252", "cp1250", "cp1253", "cp1254", "cp1255",
    "cp1256", "cp1257", "cp1258", "cp874",
)  # fmt: skip
"""Candidate encodings. A short text would be valid in too many of all the encodings that Python knows."""
_DECLARED = re.compile(rb"""charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,30})""")
_NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def decode(data: bytes, declared: bool = False) -> tuple[str, str] | None:
    """(text, encoding), or None if the bytes are not text. With `declared`, a charset declared in the page counts."""
    for mark, name in ((codecs.BOM_UTF8, UTF8), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if data.startswith(mark):
            return _checked(data, "utf-8-sig" if name == UTF8 else name)
    if text := _checked(data, UTF8):
        return text
    if declared and (match := _DECLARED.search(data[:4096])) and (text := _checked(data, match[1].decode())):
        return text
    if _broken_utf8(data[:GUESSED]):
        return None
    try:
        from charset_normalizer import from_bytes  # slow to import, and rarely needed
    except ImportError:
        raise UserError("text that is not UTF-8 needs charset-normalizer: pip install 'bessemer[data]'") from None
    best = from_bytes(data[:GUESSED], cp_isolation=list(GUESSES)).best()
    return _checked(data, best.encoding) if best else None


def _broken_utf8(data: bytes) -> bool:
    """Whether most of what is not ASCII is valid UTF-8, as text in other encodings hardly ever is."""
    text = data.decode(UTF8, "replace")
    broken = text.count("\ufffd")
    return sum(not char.isascii() for char in text) > 5 * broken


def _checked(data: bytes, encoding: str) -> tuple[str, str] | None:
    try:
        text = data.decode(encoding)
    except (UnicodeError, LookupError):  # some codecs, such as "undefined", raise the parent class
        return None
    if encoding not in (UTF8, "utf-8-sig") and _NOT_TEXT.search(text):
        return None  # for example an image: some 8-bit encoding always fits
    return text, UTF8 if encoding == "utf-8-sig" else codecs.lookup(encoding).name


class Lines:
    """The lines of a file from byte `start` on. No line of more than `longest` bytes is ever in memory.

    Iterating gives (offset, line with its break, or None if it is longer than `longest` bytes). Lines of UTF-16 files
    come as UTF-8, and `encoding` says what they were; their offsets are offsets in the UTF-8.
    """

    def __init__(self, path: Path, start: int, longest: int) -> None:
        self._longest = longest
        file = opened(path)
        self._file: ByteFile | _Recoded = file
        self.encoding = UTF8
        head = file.peek(3)[:3] if hasattr(file, "peek") else b""
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            self.encoding = "utf-16"
            assert not start, "files in UTF-16 are not split"
            self._file = _Recoded(file)
        self.offset = 0
        if start:
            file.seek(start - 1)
            self.offset = start - 1
            self._line()  # the rest of the previous line, or the line break just before `start`
        elif head == codecs.BOM_UTF8:
            self.offset = len(file.read(3))

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        while True:
            at = self.offset
            line = self._line()
            if line == b"":
                return
            yield at, line

    def _line(self) -> bytes | None:
        line = self._file.readline(self._longest + 1)
        self.offset += len(line)
        if len(line) <= self._longest or line.endswith(b"\n"):
            return line
        while True:
            skipped = self._file.readline(1 << 20)
            self.offset += len(skipped)
            if not skipped or skipped.endswith(b"\n"):
                return None

    def close(self) -> None:
        self._file.close()


class _Recoded:
    """A UTF-16 file, read as UTF-8."""

    def __init__(self, file: ByteFile) -> None:
        self._text = io.TextIOWrapper(file, "utf-16", newline="\n")

    def readline(self, most: int) -> bytes:
        return self._text.readline(most).encode(UTF8)

    def close(self) -> None:
        self._text.close()


EMPTY, TOO_LONG, BROKEN_RECORD, BROKEN_FILE = "empty", "too-long", "broken-record", "broken-file"
ENCODING, NO_TEXT, GONE = "encoding", "no-text", "gone"
REASONS = {
    EMPTY: "only white space",
    TOO_LONG: "more bytes than the source's longest",
    BROKEN_RECORD: "not JSON, or not a record with a text",
    BROKEN_FILE: "a truncated or corrupted archive or file",
    ENCODING: "bytes that are not text in any known encoding",
    NO_TEXT: "a page without a main text",
    GONE: "a file or source that disappeared or changed during the build",
}


class RawText(NamedTuple):
    """A document as it was read."""

    text: str
    where: str
    bytes: int
    encoding: str = UTF8
    address: str | None = None
    """URL of a page."""


class ReadError(NamedTuple):
    """A record that could not be read as a document."""

    reason: str
    where: str
    detail: str
    bytes: int = 0


ReadResult = RawText | ReadError
