"""Escapes text from a model, a file or the network: a terminal obeys control characters, so none may reach it."""

_OBEYED = (
    *range(0x20), *range(0x7F, 0xA0),  # C0 and C1; C1 contains a one-character CSI
    *range(0x2028, 0x202F), *range(0x2066, 0x206A),  # line separators; marks that change the text's direction
    *range(0xD800, 0xE000),  # halves of surrogate pairs, which no output can encode
)  # fmt: skip
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _OBEYED if chr(code) not in "\n\t"}
_IN_JSON = {code: f"\\u{code:04x}" for code in _OBEYED if code >= 0x7F}


def shortened(text: str, most: int) -> str:
    """The first `most` characters of a text, and how many are missing."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most} more characters)"


def escaped(text: str) -> str:
    """Keeps newline and tab, and writes every other character that a terminal obeys as Python does (`\\x1b`)."""
    return text.translate(_ESCAPES)


def escaped_json(document: str) -> str:
    """Escapes a JSON document without changing its value. The JSON writer has already escaped C0."""
    return document.translate(_IN_JSON)
