"""The random numbers of sampling: one stream per sequence, from splitmix64 as a counter-based hash.

Number i of a stream depends only on its key and i, so no state is kept between tokens and the batch does not matter.
"""

from __future__ import annotations

from torch import Tensor

from bessemer.probe import double

GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def _mix_int(x: int) -> int:
    """One splitmix64 output, for a state x given as unsigned 64 bits."""
    x = (x + GOLDEN) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def stream_key(*parts: int) -> int:
    """The key of a sequence, int64, from what identifies the sample (seed, prompt, sample number, ...)."""
    key = 0
    for part in parts:
        key = _mix_int(key ^ _mix_int(part & _MASK64))
    return key - (1 << 64) if key >> 63 else key


DRAFT, ACCEPT = (stream_key(number) for number in (1, 2))
"""XORed into a sequence's key, they give two more streams, for drafts and for their acceptance."""


def uniform(key_B: Tensor, position_B: Tensor) -> Tensor:
    """Number `position` of each key's splitmix64 stream, as float64 in [0, 1) with 53 random bits, in its home."""
    x = key_B + (position_B + 1) * _signed(GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return double(_shift(x ^ _shift(x, 31), 11)) * 2.0**-53


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
