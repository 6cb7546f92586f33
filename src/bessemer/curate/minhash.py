"""MinHash signatures of texts and the keys by which near-duplicates meet (Broder 1997; LSH as in FineWeb, 2024).

A text is the set of its runs of `ngram` words (in Chinese, characters; see `words`). The share of equal places in two
signatures estimates the Jaccard similarity of the sets, with a deviation of sqrt(J (1 - J) / permutations): 0.04 at
0.75 and 120. A key is a hash of `permutations / bands` places; two texts with one key in common are compared by their
whole signatures. The chance to meet is 1 - (1 - J^rows)^bands: with 20 bands of 6 rows 0.98 at J = 0.75, 1.00 at 0.85
(FineWeb's 14 of 8: 0.77 and 0.99, since nothing is compared there after the meeting).

Legend: N texts, S shingles, P permutations, B bands.
"""

from typing import NamedTuple

import numpy as np

from bessemer.curate.words import Words
from bessemer.tasks.reading.ngrams import run_hashes

TILE = 1 << 15
"""Shingles permuted at once: their numbers stay in the core's cache."""


class Shape(NamedTuple):
    """What a signature is made of."""

    ngram: int = 5
    """Words of a shingle."""
    permutations: int = 120
    """Places of a signature."""
    bands: int = 20
    """Keys; divides the permutations."""


def signed(found: Words, n_texts: int, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [N, P], bool [N]: which texts have any word; the others' signatures mean nothing), from their words."""
    shingles_S, texts_S = _shingles(found, n_texts, shape.ngram)
    signed_NP = np.zeros((n_texts, shape.permutations), np.uint32)
    counts_N = np.bincount(texts_S, minlength=n_texts)
    have = np.flatnonzero(counts_N)
    starts = np.concatenate(([0], np.cumsum(counts_N[have])))
    masks_P, factors_P = _permutations(shape.permutations)
    at = 0
    while at < len(have):
        # as many whole texts as a tile holds, one at least
        end = max(at + 1, int(np.searchsorted(starts, starts[at] + TILE, "right")) - 1)
        tile = shingles_S[starts[at] : starts[end]]
        edges = starts[at:end] - starts[at]
        moved = np.empty_like(tile)
        for place in range(shape.permutations):
            # x -> (x xor mask) * odd is a permutation of 32-bit numbers
            np.bitwise_xor(tile, masks_P[place], out=moved)
            np.multiply(moved, factors_P[place], out=moved)
            signed_NP[have[at:end], place] = np.minimum.reduceat(moved, edges)
        at = end
    return signed_NP, counts_N > 0


def keys(signed_NP: np.ndarray, shape: Shape) -> np.ndarray:
    """uint64 [B, N]: the keys of each text."""
    rows = shape.permutations // shape.bands
    bands_NBR = signed_NP.reshape(len(signed_NP), shape.bands, rows).astype(np.uint64)
    keys_NB = np.zeros(bands_NBR.shape[:2], np.uint64)
    for row in range(rows):
        keys_NB = (keys_NB ^ bands_NBR[..., row]) * np.uint64(0xBF58476D1CE4E5B9)
        keys_NB ^= keys_NB >> np.uint64(29)
    return np.ascontiguousarray(keys_NB.T)


def _shingles(found: Words, n_texts: int, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [S], int [S] text), sorted by text. A text of fewer words than a shingle is one shingle."""
    runs = run_hashes(found.hashes_W, ngram)
    inside = found.texts_W[: len(runs)] == found.texts_W[ngram - 1 :][: len(runs)]
    shingles, texts = runs[inside], found.texts_W[: len(runs)][inside]
    lengths = np.bincount(found.texts_W, minlength=n_texts)
    short = np.flatnonzero((lengths > 0) & (lengths < ngram))
    if len(short):
        firsts = np.searchsorted(found.texts_W, short)
        alone = [
            run_hashes(found.hashes_W[first : first + length], int(length))[0]
            for first, length in zip(firsts, lengths[short], strict=True)
        ]
        shingles, texts = np.concatenate([shingles, alone]), np.concatenate([texts, short])
        order = np.argsort(texts, kind="stable")
        shingles, texts = shingles[order], texts[order]
    return (shingles >> np.uint64(32)).astype(np.uint32), texts


def _permutations(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks and odd factors, the same everywhere and always."""
    drawn = np.random.Generator(np.random.PCG64(0xB355)).integers(0, 1 << 32, (2, n), np.uint32)
    return drawn[0], drawn[1] | np.uint32(1)
