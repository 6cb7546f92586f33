"""Text of a model, a file or the network on a terminal: a terminal obeys control characters, so none reaches it."""

_OBEYED = (
    *range(0x20), *range(0x7F, 0xA0),  # C0 and C1; the latter hold a CSI of one character
    *range(0x2028, 0x202F), *range(0x2066, 0x206A),  # line separators; marks that turn the direction of the text
    *range(0xD800, 0xE000),  # halves of surrogate pairs, which no output can encode
)  # fmt: skip
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _OBEYED if chr(code) not in "\n\t"}
_IN_JSON = {code: f"\\u{code:04x}" for code in _OBEYED if code >= 0x7F}


def escaped(text: str) -> str:
    """Newline and tab as they are, every other character that a terminal obeys as Python writes it (`\\x1b`)."""
    return text.translate(_ESCAPES)


def escaped_json(document: str) -> str:
    """The same value in JSON, whose writer has escaped C0 already."""
    return document.translate(_IN_JSON)
