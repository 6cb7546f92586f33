"""The tokens that truncation (top-p, top-k, min-p) kept when each token of a sample was drawn: DeepSeek-V3.2's sampling
mask (3.1), as lists of ids.

Few tokens are kept where the policy is sure, most of the vocabulary where it is not, so the lists are ragged: 4 bytes
for each kept id and 4 for each token of a sample. On the way from a device, a step's mask is one bit per token of the
vocabulary, 16 KB per row for V3's, and travels with the sampled tokens.

Shapes: B rows, V vocabulary, T tokens of a sample, M ids kept at all of them.
"""

from __future__ import annotations

from array import array
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WORD = 64
"""Bits of a word."""


class KeptTokens(NamedTuple):
    """The kept tokens of one sample."""

    id_M: Tensor
    """int32: the ids kept at the first token, in ascending order, then those at the second, and so on."""
    count_T: Tensor
    """int32: how many ids each token was drawn from."""

    @classmethod
    def of(cls, ids: array[int], counts: array[int]) -> KeptTokens:
        return cls(*(torch.from_numpy(np.array(numbers, dtype=np.int32)) for numbers in (ids, counts)))


def words(vocab: int) -> int:
    """Words that hold a mask of `vocab` bits."""
    return -(-vocab // WORD)


def pack_bits(kept_BV: Tensor) -> Tensor:
    """A mask as int64 words, [B, words(V)], little-endian: token v is bit v % 8 of byte v // 8."""
    B, V = kept_BV.shape
    bits = torch.nn.functional.pad(kept_BV, (0, -V % WORD)).view(B, -1, 8).byte()
    value_8 = torch.ones(8, dtype=torch.uint8, device=kept_BV.device) << torch.arange(8, device=kept_BV.device).byte()
    return (bits * value_8).sum(-1, dtype=torch.uint8).view(torch.int64)


def ids_of_mask(kept_BV: Tensor) -> list[list[int]]:
    """The ids of every row of a mask on the CPU."""
    return _by_row(np.flatnonzero(kept_BV.numpy()), *kept_BV.shape)


def ids_of_words(word_BW: Tensor) -> list[list[int]]:
    """The same from packed bits; only nonzero words are unpacked."""
    flat = np.ascontiguousarray(word_BW.numpy()).reshape(-1)
    places = np.flatnonzero(flat)
    bits = np.unpackbits(flat[places].astype("<i8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    word, bit = np.nonzero(bits)
    return _by_row(places[word] * WORD + bit, len(word_BW), word_BW.shape[1] * WORD)


def _by_row(place_N: np.ndarray, rows: int, width: int) -> list[list[int]]:
    """The columns of ascending flat indices into [rows, width], by row."""
    row_N, id_N = np.divmod(place_N, width)
    ids: list[int] = id_N.tolist()
    ends = accumulate(np.bincount(row_N, minlength=rows).tolist(), initial=0)
    return [ids[start:stop] for start, stop in pairwise(ends)]
