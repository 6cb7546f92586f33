"""The ids of many texts, every piece of them encoded once: the ids of `Tokenizer.encode_batch`, many times as fast.

Texts are cut into the pieces that merges may not cross (`presplit`); a piece, mostly a word, is looked up by a 64-bit
hash of its characters, and only new ones are given to the tokenizer. Among 10^7 different pieces the chance that any
two share a hash is 3 in 10^6. A tokenizer with another pre-split or a normaliser is asked as it is, and so are single
texts with an added token or with characters that are newer than this Python's Unicode.
"""

from collections.abc import Sequence

import numpy as np

from bessemer.data import presplit
from bessemer.data.hashing import stretches
from bessemer.data.tokenizer import CJK, DIGITS, WORDS, Tokenizer

MOST_PIECES = 1 << 20
"""Pieces that are remembered, about 40 MB; then all are forgotten, for what comes now is something else."""


class Encoder:
    """`encode_batch` of one tokenizer, in this thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.opening = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
        """What a document begins with."""
        self.ending = np.array([tokenizer.eos_id], np.int32)
        """What it ends with."""
        self.cuts = cuts_as_v3(tokenizer)
        added = tokenizer.spec["added_tokens"] if self.cuts else ()
        self._added = [one["content"] for one in added if not one["special"]]
        self._forget()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        if not self.cuts:
            return [np.array(ids, np.int32) for ids in self._tokenizer.encode_batch(texts)]
        joined = "\n".join(texts)
        try:
            points_C = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        except UnicodeEncodeError:
            self._tokenizer.encode_batch(texts)  # says which text holds half a character
            raise
        lengths = np.array([len(text) for text in texts], np.int64)
        ends = np.cumsum(lengths + 1) - 1
        kinds_C = presplit.kinds()[points_C]
        kinds_C[ends[:-1]] = presplit.FENCE
        odd = self._odd(texts, kinds_C, ends)
        kinds_C[kinds_C == presplit.NEW] = presplit.OTHER
        found = self._encoded(points_C, kinds_C, ends, len(texts))
        for number in odd:
            found[number] = np.array(self._tokenizer.encode(texts[number]), np.int32)
        return found

    def _odd(self, texts: Sequence[str], kinds_C: np.ndarray, ends: np.ndarray) -> list[int]:
        """Texts that only the tokenizer itself can encode."""
        new = set(np.searchsorted(ends, np.flatnonzero(kinds_C == presplit.NEW)).tolist())
        return sorted(new | {i for i, text in enumerate(texts) if any(added in text for added in self._added)})

    def _encoded(self, points_C: np.ndarray, kinds_C: np.ndarray, ends: np.ndarray, n_texts: int) -> list[np.ndarray]:
        places = presplit.cuts(points_C, kinds_C) if len(points_C) else np.zeros(1, np.int64)
        first, last = places[:-1], places[1:]
        real = kinds_C[first] != presplit.FENCE
        first, last = first[real], last[real]
        hashes, example, which = _distinct(stretches(points_C, first, last))
        at = self._remember(hashes, first[example], last[example], points_C)
        lengths = self._lengths[at][which]
        starts = self._starts[at][which]
        stops = np.cumsum(lengths)
        ids = self._ids[np.repeat(starts - (stops - lengths), lengths) + np.arange(int(lengths.sum()))]
        # ids of a text: those of the pieces that end within it
        pieces = np.searchsorted(last, ends, "right")
        edges = np.concatenate(([0], np.append(0, stops)[pieces]))
        return [ids[edges[number] : edges[number + 1]] for number in range(n_texts)]

    def _remember(self, hashes: np.ndarray, first: np.ndarray, last: np.ndarray, points_C: np.ndarray) -> np.ndarray:
        """Where these pieces (hashes ascend) stand among what is known, once the new ones are."""
        if len(self._hashes) + len(hashes) > MOST_PIECES:
            self._forget()
        at = np.searchsorted(self._hashes, hashes)
        new = np.flatnonzero(self._hashes[np.minimum(at, len(self._hashes) - 1)] != hashes)
        if not len(new):
            return at
        ids, lengths = self._tokenizer.encode_stretches(points_C, first[new], last[new])
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        self._ids = np.concatenate([self._ids, ids])
        self._hashes = np.insert(self._hashes, at[new], hashes[new])
        self._lengths = np.insert(self._lengths, at[new], lengths)
        self._starts = np.insert(self._starts, at[new], starts)
        return np.searchsorted(self._hashes, hashes)

    def _forget(self) -> None:
        """One piece is always known, the empty one, so that there is something to look in."""
        self._hashes = np.zeros(1, np.uint64)
        self._lengths = np.zeros(1, np.int64)
        self._starts = np.zeros(1, np.int64)
        self._ids = np.zeros(0, np.int32)


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """np.unique with an index and the inverse, twice as fast since it may be the index of any of the equal ones."""
    order = np.argsort(values)
    ascending = values[order]
    new = np.concatenate(([True], ascending[1:] != ascending[:-1]))[: len(values)]
    which = np.empty(len(values), np.int64)
    which[order] = np.cumsum(new) - 1
    return ascending[new], order[new], which


def cuts_as_v3(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's pre-split is V3's and nothing else changes a text before."""
    if type(tokenizer) is not Tokenizer or tokenizer.spec.get("normalizer") is not None:
        return False
    spec = tokenizer.spec
    if any(one["lstrip"] or one["rstrip"] or one["single_word"] for one in spec["added_tokens"]):
        return False
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [])
    patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
    isolated = all(step.get("behavior") == "Isolated" and not step.get("invert") for step in steps[:-1])
    last = steps[-1] if steps else {}
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and not last.get("use_regex")
    return patterns == [DIGITS, CJK, WORDS] and isolated and plain
