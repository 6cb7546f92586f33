"""Between text and tokens at the edge of the API: a raw prompt's ids, and what one token is called in `logprobs`."""

from __future__ import annotations

import re
from functools import lru_cache

from bessemer.data.tokenizer import Tokenizer


class Vocabulary:
    """A tokenizer's facts that requests ask for, made once per model."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        specials = [i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]
        self._control = {tokenizer.token_bytes(i).decode("utf-8", "replace"): i for i in specials}
        names = sorted(filter(None, self._control), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        """Bytes of the longest token: a text has at least its bytes / longest tokens."""
        self.name = lru_cache(maxsize=1 << 16)(self._name)
        """A token as `logprobs` shows it; "bytes:\\xe4\\xbd" for what is no text on its own."""

    def prompt_ids(self, text: str, begin: bool = True) -> list[int]:
        """A raw prompt. Whoever sends one writes his own turns, so names of control tokens count as these tokens; BOS
        stands in front with `begin`, once, where the model's documents had it."""
        ids: list[int] = []
        place = 0
        for found in self._names.finditer(text):
            ids += self._plain(text[place : found.start()])
            ids.append(self._control[found.group()])
            place = found.end()
        ids += self._plain(text[place:])
        bos = self.tokenizer.bos_id
        return [bos, *ids] if begin and bos is not None and ids[:1] != [bos] else ids

    def text(self, token_id: int) -> bytes:
        """What a token shows as: nothing for a control token."""
        return b"" if self.tokenizer.is_special(token_id) else self.tokenizer.token_bytes(token_id)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []

    def _name(self, token_id: int) -> str:
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
