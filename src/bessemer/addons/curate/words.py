"""Words of many texts as 64-bit hashes, for the search for duplicates and contamination.

A word is defined as in `addons/tasks/readable.words`: a run of letters in lower case, a whole number, one Han or kana
character, or one operator. Alphabets that are not listed there are letters too, and scripts without spaces (Thai, Lao,
Khmer, Burmese) count by character. Nothing loops over words: code points are looked up in a table, and words are hashed
as ranges of an array, h(s, e) = sum over s <= i < e of x_i B^(i - s) modulo 2^64, from prefix sums. B is odd, so B^-s
exists.

Legend: C characters, W words.
"""

import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
SMALLEST_POWERS = 5 << 18
"""Powers are computed for at least this many positions at a time."""
_powers_cache: list[tuple[np.ndarray, np.ndarray]] = []
BETWEEN, LETTERS, DIGITS, SINGLE, OPERATOR = range(5)
"""Kinds of characters. A word is a run of LETTERS or of DIGITS, or one character of the last two."""
_LISTED = ((0x61, 0x7A), (0xDF, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF))
_ALONE = (
    (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x3FFFF),
    (0x0E01, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF),
)  # fmt: skip
_OPERATORS = "-+*/=<>^%×"


class WordBlock(NamedTuple):
    """The words of a block of texts, in order."""

    hashes_W: np.ndarray
    """uint64; equal words have equal hashes."""
    texts_W: np.ndarray
    """int32; index of the text that contains the word."""
    kinds_W: np.ndarray
    """uint8; LETTERS, DIGITS, SINGLE or OPERATOR."""
    lengths_W: np.ndarray
    """int32; characters."""


def words(texts: Sequence[str]) -> WordBlock:
    """The words of a block of texts; `texts_W` counts from 0."""
    lowered = [text.lower() for text in texts]
    points_C = np.frombuffer("\n".join(lowered).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds_C = _table()[points_C]
    changes_C = np.empty(len(points_C) + 1, bool)
    changes_C[0] = changes_C[-1] = True
    changes_C[1:-1] = (kinds_C[1:] != kinds_C[:-1]) | (kinds_C[1:] >= SINGLE)
    edges = np.flatnonzero(changes_C)
    starts, ends = edges[:-1], edges[1:]
    real = kinds_C[starts] != BETWEEN if len(starts) else np.zeros(0, bool)
    starts_W, ends_W = starts[real], ends[real]
    hashes_W = hash_pieces(points_C, starts_W, ends_W)
    firsts = np.cumsum([0] + [len(text) + 1 for text in lowered])
    texts_W = (np.searchsorted(firsts, starts_W, "right") - 1).astype(np.int32)
    return WordBlock(hashes_W, texts_W, kinds_C[starts_W], (ends_W - starts_W).astype(np.int32))


@cache
def _table() -> np.ndarray:
    """uint8 [code points]: the kind of each code point."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    for point in chain(range(0x80, 0x40000), range(0xE0000, 0xE0200)):  # the other planes are unassigned
        if unicodedata.category(chr(point))[0] in "LNM":
            kinds[point] = LETTERS
    for low, high in _LISTED:
        kinds[low : high + 1] = LETTERS
    for low, high in _ALONE:
        kinds[low : high + 1] = SINGLE
    kinds[ord("0") : ord("9") + 1] = DIGITS
    for operator in _OPERATORS:
        kinds[ord(operator)] = OPERATOR
    return kinds


def hash_pieces(points_C: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 hash of every points_C[start:end]; equal pieces have equal hashes wherever they occur."""
    powers_C, inverses_C = _powers(len(points_C) + 1)
    sums_C = np.zeros(len(points_C) + 1, np.uint64)
    # squared, so that sums of nearby code points do not coincide
    mixed_C = points_C.astype(np.uint64) + np.uint64(1)
    mixed_C *= mixed_C + np.uint64(0xD1B54A32D192ED03)
    np.cumsum(mixed_C * powers_C[:-1], out=sums_C[1:])
    return (sums_C[ends] - sums_C[starts]) * inverses_C[starts]


def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """B^i and B^-i for i < n."""
    if not _powers_cache or len(_powers_cache[0][0]) < n:
        size = max(n, SMALLEST_POWERS)
        _powers_cache[:] = [(_cumulated(_BASE, size), _cumulated(_INVERSE, size))]
    powers, inverses = _powers_cache[0]
    return powers[:n], inverses[:n]


def _cumulated(factor: int, n: int) -> np.ndarray:
    powers = np.full(n, factor, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, out=powers)  # wraps around, as intended
