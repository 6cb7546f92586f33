"""Document: one text with a beginning and an end, and where it belongs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    text: str
    domain: str
    """english, chinese, code, mathematics, or what the user called a source of their own."""
    messages: tuple[dict[str, str], ...] | None = None
    """The conversation, where the record was one; `text` is then its plain transcript."""
