"""What reading a source gives: texts, and faults with one of a few reasons."""

from typing import NamedTuple

from bessemer.curate.decode import UTF8

EMPTY, TOO_LONG, BROKEN_RECORD, BROKEN_FILE = "empty", "too-long", "broken-record", "broken-file"
ENCODING, NO_TEXT, GONE = "encoding", "no-text", "gone"
REASONS = {
    EMPTY: "no text but white space",
    TOO_LONG: "more bytes than the source's longest",
    BROKEN_RECORD: "not JSON, or not a record with a text",
    BROKEN_FILE: "an archive or file that is cut short or altered",
    ENCODING: "no encoding makes text of the bytes",
    NO_TEXT: "a page without a main text",
    GONE: "a file or source that was there and cannot be read, or was written to meanwhile",
}


class Text(NamedTuple):
    """A document as it was found."""

    text: str
    where: str
    bytes: int
    encoding: str = UTF8
    address: str | None = None
    """Where a page was on the web."""


class Fault(NamedTuple):
    """Something that is not a document."""

    reason: str
    where: str
    detail: str
    bytes: int = 0


Found = Text | Fault
