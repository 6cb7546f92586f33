"""What V3 does to a training document before packing: fill-in-the-middle and split boundaries.

V3 4.1 and 4.2, reference C.3 and C.4. What happens to a document depends on its text and the seed alone.

FIM: prefix-suffix-middle at document level, `<fim_begin> prefix <fim_hole> suffix <fim_end> middle`, cut at two
uniform points (the paper does not say where; this is the usual choice). Every token is trained on.

Split boundaries: V3's pre-split makes tokens such as ".\\n". A prompt that ends without its line break would then end
in a way the model never saw, so a share of these tokens is replaced by the ids of its two parts.
"""

import hashlib
import random
import re
from collections.abc import Sequence

import numpy as np

from bessemer.data.special import FIM_BEGIN, FIM_END, FIM_HOLE
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

_BOUNDARY = re.compile(r"(.*[^\s\w])([\r\n]+)", re.DOTALL)


class Augment:
    """`augment(text, ids)` gives the ids to train on, without BOS and EOS."""

    def __init__(self, tokenizer: Tokenizer, fim_rate: float, boundary_split_rate: float, seed: int = 0):
        for name, rate in (("fim_rate", fim_rate), ("boundary_split_rate", boundary_split_rate)):
            if not 0 <= rate <= 1:
                raise UserError(f"{name} {rate} must lie between 0 and 1")
        self.settings = {"fim_rate": fim_rate, "boundary_split_rate": boundary_split_rate, "seed": seed}
        self._tokenizer = tokenizer
        self._fim_rate, self._split_rate, self._seed = fim_rate, boundary_split_rate, seed
        self._halves = boundary_tokens(tokenizer) if boundary_split_rate else {}
        self._is_boundary = np.zeros(tokenizer.vocab_size, bool)
        self._is_boundary[list(self._halves)] = True
        self._fim_ids = [tokenizer.special_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)] if fim_rate else []

    def __call__(self, text: str, ids: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
        if not (self._fim_rate or self._split_rate):
            return ids
        digest = hashlib.sha256(f"{self._seed}\n{text}".encode()).digest()
        draw = random.Random(int.from_bytes(digest, "big"))
        if draw.random() < self._fim_rate:
            ids = self._fim(text, draw)
        return self._split(ids, draw) if self._halves else ids

    def _fim(self, text: str, draw: random.Random) -> list[int]:
        first, second = sorted(draw.randint(0, len(text)) for _ in range(2))
        prefix, middle, suffix = self._tokenizer.encode_batch([text[:first], text[first:second], text[second:]])
        begin, hole, end = self._fim_ids
        return [begin, *prefix, hole, *suffix, end, *middle]

    def _split(self, ids: Sequence[int] | np.ndarray, draw: random.Random) -> np.ndarray:
        ids = np.asarray(ids, np.int32)
        at = np.flatnonzero(self._is_boundary[ids])
        at = [place for place in at.tolist() if draw.random() < self._split_rate]
        halves = [self._halves[int(ids[place])] for place in at]
        pieces = np.split(ids, [edge for place in at for edge in (place, place + 1)])
        pieces[1::2] = [np.array(half, np.int32) for half in halves]
        return np.concatenate(pieces)


def boundary_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """For each token that is punctuation and then line breaks: the ids of the two parts, one after the other."""
    found = {}
    for token_id in range(tokenizer.vocab_size):
        match = _BOUNDARY.fullmatch(tokenizer.token_bytes(token_id).decode("utf-8", "replace"))
        if match and "\ufffd" not in match[0]:
            mark, breaks = tokenizer.encode_batch([match[1], match[2]])
            found[token_id] = mark + breaks
    return found
