"""Duplicates: MinHash signatures, LSH keys, comparison of candidates, clusters (Broder 1997; LSH as in FineWeb, 2024).

A text is the set of its n-grams of words (in Chinese, characters; see `words`). The share of equal entries in two
signatures estimates the Jaccard similarity J of the sets, with standard deviation sqrt(J (1 - J) / permutations): 0.04
at J = 0.75 and 120 permutations. An LSH key hashes `permutations / bands` entries. Two texts that share a key are
candidates and are compared by their whole signatures. They become candidates with probability 1 - (1 - J^rows)^bands:
with 20 bands of 6 rows, 0.98 at J = 0.75 and 1.00 at 0.85. FineWeb's 14 bands of 8 give 0.77 and 0.99, and FineWeb does
not compare candidates.

The sign step writes, for the N documents of a unit:

    signatures.npy   uint16 [N, P]    low halves of the signatures, for comparison
    keys.npy         uint64 [B, M]    keys of the M documents that have words, sorted within each band
    order.npy        uint32 [B, M]    the document of each key
    exact.npy        uint64 [N, 2]    hash of the normalised text
    clean.npy        bool [N]         whether the document takes part; nothing is a duplicate of a contaminated text

A bin is a band and a range of keys, or a range of exact hashes. Bins are matched in parallel, each holding only the
keys of its range: BYTES_PER_KEY for every document. `bins` makes as many ranges as the memory limit requires. The
result does not depend on their number, because equal keys are never separated. Documents that share a key are compared
with the first of them; those that differ from it are compared with the first among themselves, up to ROUNDS times.

Document numbers are global: the order of the recipe's sources, then of units, then of documents. The first document of
a cluster is kept, so an earlier source in the recipe wins.

Legend: N texts, S shingles, P permutations, B bands.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bessemer.addons.curate.words import WordBlock
from bessemer.addons.tasks.ngrams import run_hashes

TILE = 1 << 15
"""Shingles permuted together; they fit in a core's cache."""


class SignatureShape(NamedTuple):
    """The parameters of a signature."""

    ngram: int = 5
    """Words in a shingle."""
    permutations: int = 120
    """Entries in a signature."""
    bands: int = 20
    """Keys per text; divides `permutations`."""


def signed(block: WordBlock, n_texts: int, shape: SignatureShape) -> tuple[np.ndarray, np.ndarray]:
    """(signatures uint32 [N, P], bool [N]: which texts have words; the signatures of the others are undefined)."""
    shingles_S, texts_S = _shingles(block, n_texts, shape.ngram)
    signed_NP = np.zeros((n_texts, shape.permutations), np.uint32)
    counts_N = np.bincount(texts_S, minlength=n_texts)
    have = np.flatnonzero(counts_N)
    starts = np.concatenate(([0], np.cumsum(counts_N[have])))
    masks_P, factors_P = _permutations(shape.permutations)
    at = 0
    while at < len(have):
        # as many whole texts as fit in a tile, at least one
        end = max(at + 1, int(np.searchsorted(starts, starts[at] + TILE, "right")) - 1)
        tile = shingles_S[starts[at] : starts[end]]
        edges = starts[at:end] - starts[at]
        moved = np.empty_like(tile)
        for permutation in range(shape.permutations):
            # x -> (x xor mask) * odd is a permutation of 32-bit numbers
            np.bitwise_xor(tile, masks_P[permutation], out=moved)
            np.multiply(moved, factors_P[permutation], out=moved)
            signed_NP[have[at:end], permutation] = np.minimum.reduceat(moved, edges)
        at = end
    return signed_NP, counts_N > 0


def keys(signed_NP: np.ndarray, shape: SignatureShape) -> np.ndarray:
    """uint64 [B, N]: the keys of each text."""
    rows = shape.permutations // shape.bands
    bands_NBR = signed_NP.reshape(len(signed_NP), shape.bands, rows).astype(np.uint64)
    keys_NB = np.zeros(bands_NBR.shape[:2], np.uint64)
    for row in range(rows):
        keys_NB = (keys_NB ^ bands_NBR[..., row]) * np.uint64(0xBF58476D1CE4E5B9)
        keys_NB ^= keys_NB >> np.uint64(29)
    return np.ascontiguousarray(keys_NB.T)


def _shingles(block: WordBlock, n_texts: int, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [S] shingles, int [S] their texts), sorted by text. A text shorter than a shingle is one shingle."""
    runs = run_hashes(block.hashes_W, ngram)
    inside = block.texts_W[: len(runs)] == block.texts_W[ngram - 1 :][: len(runs)]
    shingles, texts = runs[inside], block.texts_W[: len(runs)][inside]
    lengths = np.bincount(block.texts_W, minlength=n_texts)
    short = np.flatnonzero((lengths > 0) & (lengths < ngram))
    if len(short):
        firsts = np.searchsorted(block.texts_W, short)
        alone = [
            run_hashes(block.hashes_W[first : first + length], int(length))[0]
            for first, length in zip(firsts, lengths[short], strict=True)
        ]
        shingles, texts = np.concatenate([shingles, alone]), np.concatenate([texts, short])
        order = np.argsort(texts, kind="stable")
        shingles, texts = shingles[order], texts[order]
    return (shingles >> np.uint64(32)).astype(np.uint32), texts


def _permutations(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks and odd factors; constant, so that signatures are comparable between builds."""
    drawn = np.random.Generator(np.random.PCG64(0xB355)).integers(0, 1 << 32, (2, n), np.uint32)
    return drawn[0], drawn[1] | np.uint32(1)


BYTES_PER_KEY = 64
"""Memory per document in a bin: key, number, sort order, and numpy's temporaries."""
ROUNDS = 16
COMPARED = 1 << 17
"""Pairs compared together, with both signatures in memory."""
EXACT = -1
"""The band of exact hashes."""


class SignedUnit(NamedTuple):
    """A signed unit."""

    folder: Path
    first: int
    """Global number of its first document."""
    documents: int


class Bin(NamedTuple):
    """A band, and range `number` of `of` equal ranges of keys."""

    band: int
    number: int
    of: int

    @property
    def low(self) -> int:
        return (self.number << 64) // self.of

    @property
    def high(self) -> int:
        """The last key of the range, inclusive."""
        return ((self.number + 1) << 64) // self.of - 1


def bins(documents: int, bands: Sequence[int], memory: int) -> list[Bin]:
    """All bins, each of about `memory` bytes."""
    ranges = max(1, -(-documents * BYTES_PER_KEY // memory))
    return [Bin(band, number, ranges) for band in bands for number in range(ranges)]


def match(units: Sequence[SignedUnit], which: Bin, threshold: float) -> np.ndarray:
    """uint64 [pairs, 2]: (earlier, later) documents of this bin that are duplicates."""
    keys, documents = _load(units, which)
    if not len(keys):
        return np.zeros((0, 2), np.uint64)
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    if which.band == EXACT:
        return _exact_pairs(units, keys, documents)
    return _near_pairs(units, keys, documents, threshold)


def _load(units: Sequence[SignedUnit], which: Bin) -> tuple[np.ndarray, np.ndarray]:
    keys, documents = [], []
    for unit in units:
        if not unit.documents:
            continue
        if which.band == EXACT:
            exact = np.load(unit.folder / "exact.npy", mmap_mode="r")[:, 0]
            within = (exact >= np.uint64(which.low)) & (exact <= np.uint64(which.high))
            at = np.flatnonzero(within & np.load(unit.folder / "clean.npy", mmap_mode="r"))
            keys.append(exact[at])
            documents.append(at.astype(np.uint64) + np.uint64(unit.first))
            continue
        exact = np.load(unit.folder / "keys.npy", mmap_mode="r")[which.band]
        low = np.searchsorted(exact, np.uint64(which.low), "left")
        high = np.searchsorted(exact, np.uint64(which.high), "right")
        keys.append(np.array(exact[low:high]))
        order = np.load(unit.folder / "order.npy", mmap_mode="r")[which.band, low:high]
        documents.append(order.astype(np.uint64) + np.uint64(unit.first))
    if not keys:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    return np.concatenate(keys), np.concatenate(documents)


def _groups(keys: np.ndarray) -> np.ndarray:
    """int [N]: index of the first entry with the same key; `keys` is sorted."""
    new = np.concatenate(([True], keys[1:] != keys[:-1]))
    return np.flatnonzero(new)[np.cumsum(new) - 1]


def _exact_pairs(units: Sequence[SignedUnit], keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    first = _groups(keys)
    later = np.flatnonzero(first != np.arange(len(keys)))
    involved = np.union1d(first[later], later)
    checks = np.zeros(len(keys), np.uint64)
    checks[involved] = _gather(units, documents[involved], "exact.npy")[:, 1]
    # equal in the first 64 bits but not in the others: very rare, and then both documents are kept
    later = later[checks[later] == checks[first[later]]]
    return np.stack([documents[first[later]], documents[later]], 1)


def _near_pairs(units: Sequence[SignedUnit], keys: np.ndarray, documents: np.ndarray, threshold: float) -> np.ndarray:
    pairs = [np.zeros((0, 2), np.uint64)]
    for _ in range(ROUNDS):
        first = _groups(keys)
        later = np.flatnonzero(first != np.arange(len(keys)))
        if not len(later):
            break
        alike = np.zeros(len(keys), bool)
        for start in range(0, len(later), COMPARED):
            some = later[start : start + COMPARED]
            alike[some] = _alike(units, documents[first[some]], documents[some], threshold)
        matches = np.flatnonzero(alike)
        pairs.append(np.stack([documents[first[matches]], documents[matches]], 1))
        unmatched = later[~alike[later]]
        keys, documents = keys[unmatched], documents[unmatched]
        if not len(unmatched):
            break
    return np.concatenate(pairs)


def _alike(units: Sequence[SignedUnit], first: np.ndarray, second: np.ndarray, threshold: float) -> np.ndarray:
    members, where = np.unique(np.concatenate([first, second]), return_inverse=True)
    signatures = _gather(units, members, "signatures.npy")
    left, right = where[: len(first)], where[len(first) :]
    alike = np.empty(len(first), bool)
    for start in range(0, len(first), 1 << 14):
        part = slice(start, start + (1 << 14))
        alike[part] = (signatures[left[part]] == signatures[right[part]]).mean(1) >= threshold
    return alike


def _gather(units: Sequence[SignedUnit], documents: np.ndarray, file: str) -> np.ndarray:
    """Rows of `file` for these documents, over all units; numbers ascend within a unit."""
    firsts = np.array([unit.first for unit in units] + [units[-1].first + units[-1].documents], np.uint64)
    rows = None
    unit_of = np.searchsorted(firsts, documents, "right") - 1
    for number in np.unique(unit_of):
        at = np.flatnonzero(unit_of == number)
        stored = np.load(units[number].folder / file, mmap_mode="r")
        if rows is None:
            rows = np.empty((len(documents), stored.shape[1]), stored.dtype)
        rows[at] = stored[(documents[at] - firsts[number]).astype(np.int64)]
    return rows if rows is not None else np.zeros((0, 2), np.uint64)


def clusters(pairs: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(documents that occur in a pair, ascending; the first document of each one's cluster), uint64.

    Connected components on arrays, by contraction: a document's label is the smallest that its pairs reach; then every
    pair is that of its documents' labels, and pairs with equal labels are done."""
    distinct, waiting, n_waiting = np.zeros((0, 2), np.uint64), list[np.ndarray](), 0
    for some in pairs:
        waiting.append(some)
        n_waiting += len(some)
        if n_waiting > len(distinct):  # a merge sorts at most three entries for each that waited: linear in all pairs
            distinct, waiting, n_waiting = _distinct([distinct, *waiting]), [], 0
    distinct = _distinct([distinct, *waiting])
    documents, places = np.unique(distinct, return_inverse=True)
    left, right = places.reshape(distinct.shape).T
    labels = np.arange(len(documents))
    while len(left):
        least = np.minimum(left, right)
        np.minimum.at(labels, left, least)
        np.minimum.at(labels, right, least)
        while not np.array_equal(further := labels[labels], labels):
            labels = further
        left, right = labels[left], labels[right]
        apart = left != right
        left, right = left[apart], right[apart]
    return documents, documents[labels]


def _distinct(pairs: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 [pairs, 2]: the pairs without repetition, ascending."""
    every = np.concatenate(pairs)
    if not len(every) or int(every.max()) >> 32 == 0:
        packed = np.sort(every[:, 0] << np.uint64(32) | every[:, 1])  # many times faster than numpy's unique
        packed = packed[np.concatenate(([True], packed[1:] != packed[:-1]))[: len(packed)]]
        return np.stack([packed >> np.uint64(32), packed & np.uint64(0xFFFFFFFF)], 1)
    every = every[np.lexsort((every[:, 1], every[:, 0]))]
    return every[np.concatenate(([True], (every[1:] != every[:-1]).any(1)))]
