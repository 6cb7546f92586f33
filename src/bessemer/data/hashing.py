"""A 64-bit number for every stretch of an array of code points, without a loop over them.

h(s, e) = sum over s <= i < e of x_i B^(i - s) modulo 2^64, by prefix sums: B is odd, so B^-s exists.
"""

import numpy as np

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
SMALLEST = 5 << 18
"""Powers are made for at least so many places at once."""

_known: list[tuple[np.ndarray, np.ndarray]] = []


def stretches(points_C: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 hash of every points_C[start:end]; equal stretches have equal ones wherever they stand."""
    forth_C, back_C = _powers(len(points_C) + 1)
    sums_C = np.zeros(len(points_C) + 1, np.uint64)
    # the square keeps a sum of code points from being another sum of nearby ones
    mixed_C = points_C.astype(np.uint64) + np.uint64(1)
    mixed_C *= mixed_C + np.uint64(0xD1B54A32D192ED03)
    np.cumsum(mixed_C * forth_C[:-1], out=sums_C[1:])
    return (sums_C[ends] - sums_C[starts]) * back_C[starts]


def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """B^i and B^-i for i < n."""
    if not _known or len(_known[0][0]) < n:
        size = max(n, SMALLEST)
        _known[:] = [(_cumulated(_BASE, size), _cumulated(_INVERSE, size))]
    forth, back = _known[0]
    return forth[:n], back[:n]


def _cumulated(factor: int, n: int) -> np.ndarray:
    powers = np.full(n, factor, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, out=powers)  # wraps, as it must
