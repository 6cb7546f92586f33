"""Permutations that need no table: place n of an order is found by arithmetic.

They are Feistel networks: no state, and the same on every version of every library.
"""

import hashlib

import numpy as np

ROUNDS = 6


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
