"""When a row is finished by what it wrote: stop strings, found without decoding every row at every step.

A stop string can only be completed by a token that holds its last byte. A set of such tokens, made once per request's
strings, answers for almost every token; the few that pass are looked at as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError


class StopStrings:
    """Some strings that end an answer."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self.tokenizer = tokenizer
        self.needles = [string.encode() for string in strings]
        last = {needle[-1] for needle in self.needles}
        self.ends = {i for byte in last for i in _holding(tokenizer, byte)}
        # Every token of an answer is at least one byte, so a needle lies within as many tokens as it has bytes.
        self.width = max(map(len, self.needles))

    def hit(self, tokens: Sequence[int]) -> bool:
        """Whether the last of an answer's tokens completed a stop string."""
        if tokens[-1] not in self.ends:
            return False
        text = b"".join(_piece(self.tokenizer, i) for i in tokens[-self.width :])
        return any(needle in text for needle in self.needles)


@lru_cache(maxsize=1024)
def _holding(tokenizer: Tokenizer, byte: int) -> tuple[int, ...]:
    """The tokens whose bytes hold `byte`."""
    return tuple(i for i in range(tokenizer.vocab_size) if byte in _piece(tokenizer, i))


def _piece(tokenizer: Tokenizer, token_id: int) -> bytes:
    return b"" if tokenizer.is_special(token_id) else tokenizer.token_bytes(token_id)


def cut(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first stop string in it."""
    return text[: min((text.find(s) for s in strings if s in text), default=len(text))]


def check_strings(strings: Sequence[str] | None) -> list[str]:
    """The stop strings as a list; UserError for what can never or would always match."""
    if isinstance(strings, str):
        raise UserError(f"stop_strings must be a list of strings; write [{strings!r}]")
    found = list(strings or ())
    if not all(isinstance(string, str) and string for string in found):
        raise UserError(f"stop_strings must be strings of at least one character, are {found!r}")
    return found
