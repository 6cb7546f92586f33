"""When a row is finished: stop ids, and stop strings found without decoding every row at every step.

A stop string can only be completed by a token that holds its last byte. A table over the vocabulary says which tokens
do, so the check of a step is one gather; the few rows it marks are looked at as bytes.

Shapes: B rows, V vocabulary, W tokens of a row's tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError


class StopStrings:
    """Watches the tails of a batch for any of some strings."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str], rows: int, device: torch.device):
        self.tokenizer = tokenizer
        self.needles = [string.encode() for string in strings]
        last = {needle[-1] for needle in self.needles}
        pieces = [self._piece(i) for i in range(tokenizer.vocab_size)]
        self.ends_V = torch.tensor([not last.isdisjoint(piece) for piece in pieces], device=device)
        # Every token of an answer is at least one byte, so a needle lies within as many tokens as it has bytes.
        self.tail_BW = torch.full((rows, max(map(len, self.needles))), -1, device=device)

    def hit(self, token_B: Tensor) -> Tensor:
        """Takes in one token per row; True where it completed a stop string."""
        self.tail_BW = torch.cat((self.tail_BW[:, 1:], token_B[:, None]), 1)
        hit_B = self.ends_V[token_B]
        rows = hit_B.nonzero().squeeze(-1)
        found = [self._found(tail) for tail in self.tail_BW[rows].tolist()]
        hit_B[rows] = torch.tensor(found, dtype=torch.bool, device=rows.device)
        return hit_B

    def keep(self, source_B: Tensor) -> None:
        self.tail_BW = self.tail_BW[source_B]

    def _found(self, tail: list[int]) -> bool:
        text = b"".join(self._piece(i) for i in tail if i >= 0)
        return any(needle in text for needle in self.needles)

    def _piece(self, token_id: int) -> bytes:
        return b"" if self.tokenizer.is_special(token_id) else self.tokenizer.token_bytes(token_id)


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
