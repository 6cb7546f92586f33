"""Runs of n words (`readable.words`), the unit of contamination: an English 10-gram is ten words, a Chinese one ten
characters.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

SHORTEST = 5
"""Phrases of fewer words occur in any text by chance, so they are not searched."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


def run_hashes(ids_N: np.ndarray, n: int) -> np.ndarray:
    """[N - n + 1] 64-bit hashes of every run of n ids (uint64), empty where there is none."""
    x = (ids_N + np.uint64(1)) * _BASE  # splitmix64's finaliser; multiplication wraps, as it must
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    length = max(0, len(ids_N) - n + 1)
    hashes = np.zeros(length, np.uint64)
    for offset in range(n):
        hashes = hashes * _BASE + x[offset : offset + length]
    return hashes


class NgramIndex:
    """Finds the n-grams of known phrases in texts; the caller decides what makes a hit.

    A phrase that must occur as a whole is found by its rarest n-gram, any other by each n-gram that no other owner's
    phrases have and that is `specific` to it. A phrase without such an n-gram must occur as a whole, and so must a
    shorter one.
    """

    def __init__(
        self,
        phrases: Sequence[np.ndarray],
        whole: Sequence[bool],
        n: int,
        specific: Callable[[int, int], bool] = lambda phrase, position: True,
        owners: Sequence[Hashable] = (),
    ) -> None:
        """`phrases`: uint64 ids of the words of each. `specific(phrase, position)`: whether that n-gram may count.
        `owners`: phrases with equal owners are texts of one problem; by default every phrase has its own."""
        self.whole = list(whole)
        """Which phrases must occur as a whole."""
        hashes = [run_hashes(ids, min(n, len(ids))).tolist() for ids in phrases]
        owned: dict[Hashable, set[int]] = defaultdict(set)
        for owner, of_phrase in zip(owners or range(len(phrases)), hashes, strict=True):
            owned[owner].update(of_phrase)
        common = Counter(run for of_owner in owned.values() for run in of_owner)
        self._places: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for phrase, (ids, of_phrase) in enumerate(zip(phrases, hashes, strict=True)):
            if len(ids) < SHORTEST:
                continue
            own = [at for at, run in enumerate(of_phrase) if common[run] == 1 and specific(phrase, at)]
            if self.whole[phrase] or not own:
                self.whole[phrase] = True
                own = [min(range(len(of_phrase)), key=lambda at: (common[of_phrase[at]], at))]
            for at in own:
                self._places[min(n, len(ids))][of_phrase[at]].append((phrase, at))
        self._keys = {length: np.array(sorted(table), np.uint64) for length, table in self._places.items()}

    def matches(self, ids_N: np.ndarray) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """(start, length, places) of every indexed run of words in a text; places are (phrase, position in it)."""
        for length, keys in self._keys.items():
            hashes = run_hashes(ids_N, length)
            nearest = keys[np.searchsorted(keys, hashes).clip(max=len(keys) - 1)]
            for start in np.flatnonzero(nearest == hashes).tolist():
                yield start, length, self._places[length][int(hashes[start])]
