"""Mixture: several parts read as one endless list of rows, where row n is found by arithmetic.

The cursor of a run is one integer, the number of rows consumed. It means the same on any number of workers and at any
batch size, so resuming, or going on with another world size, reads exactly the rows that were not read yet.

Row n lies in slot n mod S of a pattern of S slots (S = 1000). The pattern is fixed by weights and seed, and holds
each part's slots in exact number (largest remainder). The k-th row a part gives is number `k mod n_rows` of a
permutation that belongs to epoch `k // n_rows` of that part: no row comes twice before all have come once.

The permutations are Feistel networks: no state, no table, and the same on every version of every library.
"""

import difflib
import hashlib
import warnings
from collections.abc import Mapping

import numpy as np

from bessemer.data.batch import Batch
from bessemer.data.rows import Rows, to_batch
from bessemer.errors import UserError

SLOTS = 1000
ROUNDS = 6


class Mixture:
    """`parts` by name, mixed by `weights` (shares of rows, hence of tokens up to the parts' different waste)."""

    def __init__(self, parts: Mapping[str, Rows], weights: Mapping[str, float], seed: int = 0):
        self.parts = dict(sorted(parts.items()))
        self.names = list(self.parts)
        self.seed = seed
        self.weights = _normalised(self.names, weights)
        _check_alike(self.parts)
        counts = _largest_remainder([self.weights[name] for name in self.names], SLOTS)
        for name, count in zip(self.names, counts, strict=True):
            if count == 0:
                raise UserError(
                    f"the weight of {name} is below 1/{SLOTS} of the whole, so no row would come from it; raise it"
                )
        self._counts = np.array(counts)
        ordered = np.repeat(np.arange(len(counts)), counts)
        self._pattern = ordered[permute(np.arange(SLOTS), SLOTS, permutation_key(seed, "pattern", 0))]
        self._rank = np.zeros(SLOTS, dtype=np.int64)  # how many slots of the same part lie before this one
        for part in range(len(counts)):
            mine = self._pattern == part
            self._rank[mine] = np.arange(mine.sum())

    @property
    def row_length(self) -> int:
        return next(iter(self.parts.values())).row_length

    def locate(self, n: int) -> tuple[str, int]:
        """Part and row number within it of row `n`."""
        names, rows = self._locate(np.array([n]))
        return self.names[names[0]], int(rows[0])

    def batch(self, first_row: int, n_rows: int) -> Batch:
        """Rows `first_row` to `first_row + n_rows`, not included."""
        which, rows = self._locate(np.arange(first_row, first_row + n_rows))
        tokens_BT = np.empty((n_rows, self.row_length), dtype=np.int64)
        for number, part in enumerate(self.parts.values()):
            mine = which == number
            tokens_BT[mine] = part.take(rows[mine])
        return to_batch(tokens_BT, next(iter(self.parts.values())).pad_id)

    def realised(self, first_row: int, n_rows: int) -> dict[str, float]:
        """The share of each part in these rows."""
        which = self._pattern[np.arange(first_row, first_row + n_rows) % SLOTS]
        shares = np.bincount(which, minlength=len(self.names)) / max(1, n_rows)
        return dict(zip(self.names, shares.tolist(), strict=True))

    def epochs(self, n_rows: int) -> dict[str, float]:
        """How often each part has been read through after `n_rows` rows."""
        periods, rest = divmod(n_rows, SLOTS)
        taken = periods * self._counts + np.bincount(self._pattern[:rest], minlength=len(self.names))
        return {name: float(taken[i] / part.n_rows) for i, (name, part) in enumerate(self.parts.items())}

    def _locate(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        period, slot = np.divmod(n, SLOTS)
        which = self._pattern[slot]
        kth = period * self._counts[which] + self._rank[slot]
        rows = np.empty(len(n), dtype=np.int64)
        for number, (name, part) in enumerate(self.parts.items()):
            mine = which == number
            epochs, places = np.divmod(kth[mine], part.n_rows)
            found = np.empty(len(places), dtype=np.int64)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                found[now] = permute(places[now], part.n_rows, permutation_key(self.seed, name, int(epoch)))
            rows[mine] = found
        return which, rows


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """The images of `index` under a permutation of 0..n-1 that `key` chooses.

    A Feistel network permutes the smallest 4^h >= n; an image outside 0..n-1 is sent through again until it falls
    inside (cycle walking), which leaves a permutation of 0..n-1. On average fewer than four walks are needed.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(int.from_bytes(hashlib.sha256(f"{key} {r}".encode()).digest()[:8], "big")) for r in range(ROUNDS)]
    image = np.asarray(index).astype(np.uint64)
    outside = np.arange(len(image))
    while len(outside):
        x = image[outside]
        left, right = x >> half, x & low
        for round_key in keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & low)
        image[outside] = (left << half) | right
        outside = outside[image[outside] >= n]
    return image.astype(np.int64)


def _scramble(x: np.ndarray) -> np.ndarray:
    """A 64-bit mixing function (splitmix64's finaliser); multiplication wraps, as it must."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation_key(seed: int, name: str, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{epoch}\n{name}".encode()).digest()[:8], "big")


def _largest_remainder(shares: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to `shares` that sum to `total`."""
    exact = [share * total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _normalised(names: list[str], weights: Mapping[str, float]) -> dict[str, float]:
    if not names:
        raise UserError("a mixture needs at least one part")
    for name, weight in weights.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            raise UserError(
                f"weight for {name!r}, but there is no such part; {f'did you mean {near[0]!r}?' if near else names}"
            )
        if not 0 < weight < float("inf"):
            raise UserError(
                f"the weight of {name} is {weight}; it must be positive (leave the part out to use none of it)"
            )
    if missing := [name for name in names if name not in weights]:
        raise UserError(f"no weight for {', '.join(missing)}; give one, or leave the part out")
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        shares = ", ".join(f"{name} {weights[name] / total:.4f}" for name in names)
        warnings.warn(f"the mixture weights sum to {total:g}, not 1; used as shares: {shares}", stacklevel=3)
    return {name: weights[name] / total for name in names}


def _check_alike(parts: dict[str, Rows]) -> None:
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        if part.n_rows == 0:
            raise UserError(f"the part {name} has no rows ({part.path})")
        if part.row_length != first.row_length:
            raise UserError(
                f"rows of {name} have length {part.row_length}, of {first_name} {first.row_length}; build them alike"
            )
        if part.tokenizer != first.tokenizer:
            raise UserError(f"{name} and {first_name} were made with different tokenizers; build them with one")
