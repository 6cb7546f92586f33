"""Which documents are copies of which: documents that meet under a key, compared, and joined into clusters.

Every unit has left, of its N documents (files of `Signed`):

    signatures.npy   uint16 [N, P]    the low halves of the signature, for comparing
    keys.npy         uint64 [B, M]    the keys of the M documents that have words, each band sorted
    order.npy        uint32 [B, M]    whose key it is
    exact.npy        uint64 [N, 2]    hash of the normalised text
    clean.npy        bool [N]         whether it takes part: nothing is a copy of a contaminated text

A bin is a band and a range of keys (or a range of exact hashes); bins are matched side by side, each holding the keys
of its range only. Memory of a bin: BYTES_PER_KEY for every document in its range, so `ranges` cuts as many as the limit
asks for; the outcome does not depend on the cut, for equal keys are never parted. Documents under one key are compared
with the first of them, those that differ from it with the first among themselves, up to ROUNDS times.

Numbers of documents are global: the order of the recipe's sources, then of units, then of documents. The first of a
cluster is kept, so a source that stands earlier in the recipe wins.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

BYTES_PER_KEY = 64
"""Key, number, sort order and what numpy holds besides, of one document in a bin."""
ROUNDS = 16
COMPARED = 1 << 17
"""Documents compared at once: two signatures each are in memory."""
EXACT = -1
"""The band of exact hashes."""


class Signed(NamedTuple):
    """A unit that has been signed."""

    folder: Path
    first: int
    """Global number of its first document."""
    documents: int


class Bin(NamedTuple):
    """A band, and which of so many equal ranges of keys."""

    band: int
    number: int
    of: int

    @property
    def low(self) -> int:
        return (self.number << 64) // self.of

    @property
    def high(self) -> int:
        """The last key of the range."""
        return ((self.number + 1) << 64) // self.of - 1


def bins(documents: int, bands: Sequence[int], memory: int) -> list[Bin]:
    """All bins, such that one takes about `memory` bytes."""
    ranges = max(1, -(-documents * BYTES_PER_KEY // memory))
    return [Bin(band, number, ranges) for band in bands for number in range(ranges)]


def match(units: Sequence[Signed], which: Bin, threshold: float) -> np.ndarray:
    """uint64 [pairs, 2]: (earlier, later) documents of this bin that are copies."""
    keys, documents = _load(units, which)
    if not len(keys):
        return np.zeros((0, 2), np.uint64)
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    if which.band == EXACT:
        return _exact_pairs(units, keys, documents)
    return _near_pairs(units, keys, documents, threshold)


def _load(units: Sequence[Signed], which: Bin) -> tuple[np.ndarray, np.ndarray]:
    keys, documents = [], []
    for unit in units:
        if not unit.documents:
            continue
        if which.band == EXACT:
            found = np.load(unit.folder / "exact.npy", mmap_mode="r")[:, 0]
            within = (found >= np.uint64(which.low)) & (found <= np.uint64(which.high))
            at = np.flatnonzero(within & np.load(unit.folder / "clean.npy", mmap_mode="r"))
            keys.append(found[at])
            documents.append(at.astype(np.uint64) + np.uint64(unit.first))
            continue
        found = np.load(unit.folder / "keys.npy", mmap_mode="r")[which.band]
        low = np.searchsorted(found, np.uint64(which.low), "left")
        high = np.searchsorted(found, np.uint64(which.high), "right")
        keys.append(np.array(found[low:high]))
        order = np.load(unit.folder / "order.npy", mmap_mode="r")[which.band, low:high]
        documents.append(order.astype(np.uint64) + np.uint64(unit.first))
    if not keys:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    return np.concatenate(keys), np.concatenate(documents)


def _groups(keys: np.ndarray) -> np.ndarray:
    """int [N]: the index of the first of those with the same key; `keys` is sorted."""
    new = np.concatenate(([True], keys[1:] != keys[:-1]))
    return np.flatnonzero(new)[np.cumsum(new) - 1]


def _exact_pairs(units: Sequence[Signed], keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    first = _groups(keys)
    later = np.flatnonzero(first != np.arange(len(keys)))
    involved = np.union1d(first[later], later)
    second = np.zeros(len(keys), np.uint64)
    second[involved] = _gather(units, documents[involved], "exact.npy")[:, 1]
    # equal in 64 bits and different in the other 64: as good as never, and then both are kept
    later = later[second[later] == second[first[later]]]
    return np.stack([documents[first[later]], documents[later]], 1)


def _near_pairs(units: Sequence[Signed], keys: np.ndarray, documents: np.ndarray, threshold: float) -> np.ndarray:
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
        found = np.flatnonzero(alike)
        pairs.append(np.stack([documents[first[found]], documents[found]], 1))
        left = later[~alike[later]]
        keys, documents = keys[left], documents[left]
        if not len(left):
            break
    return np.concatenate(pairs)


def _alike(units: Sequence[Signed], some: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    wanted, where = np.unique(np.concatenate([some, others]), return_inverse=True)
    signatures = _gather(units, wanted, "signatures.npy")
    left, right = where[: len(some)], where[len(some) :]
    alike = np.empty(len(some), bool)
    for start in range(0, len(some), 1 << 14):
        part = slice(start, start + (1 << 14))
        alike[part] = (signatures[left[part]] == signatures[right[part]]).mean(1) >= threshold
    return alike


def _gather(units: Sequence[Signed], documents: np.ndarray, file: str) -> np.ndarray:
    """The rows of a file of all units for these documents, whose numbers ascend within a unit."""
    firsts = np.array([unit.first for unit in units] + [units[-1].first + units[-1].documents], np.uint64)
    rows = None
    unit_of = np.searchsorted(firsts, documents, "right") - 1
    for number in np.unique(unit_of):
        at = np.flatnonzero(unit_of == number)
        found = np.load(units[number].folder / file, mmap_mode="r")
        if rows is None:
            rows = np.empty((len(documents), found.shape[1]), found.dtype)
        rows[at] = found[(documents[at] - firsts[number]).astype(np.int64)]
    return rows if rows is not None else np.zeros((0, 2), np.uint64)


def clusters(pairs: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(documents that occur in a pair, ascending; the first document of the cluster of each), uint64.

    Holds every different pair once, and works on arrays: the label of a document is the least it can reach, halved in
    distance at every turn.
    """
    distinct = np.zeros((0, 2), np.uint64)
    for some in pairs:
        if len(some):
            distinct = np.unique(np.concatenate([distinct, some]), axis=0)
    documents, places = np.unique(distinct, return_inverse=True)
    left, right = places.reshape(distinct.shape).T
    labels = np.arange(len(documents))
    while True:
        before = labels.copy()
        least = np.minimum(labels[left], labels[right])
        np.minimum.at(labels, labels[left], least)
        np.minimum.at(labels, labels[right], least)
        labels = labels[labels]
        if np.array_equal(before, labels):
            break
    return documents, documents[labels]
