"""Number formats: E4M3, its tiles and products, and the twelve bits of E5M6 (DeepSeek-V3 3.3)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

Array = Any
Outputs = dict[str, Any]

E4M3: dict[str, Any] = {"mantissa": 3, "smallest": -6, "largest": 448.0}
E5M6: dict[str, Any] = {"mantissa": 6, "smallest": -14, "largest": 65024.0}
BLOCK = 128


def nearest(x: float, mantissa: int, smallest: int, largest: float) -> float:
    """x rounded to `mantissa` bits after the leading one, ties to even; exponents below `smallest` are subnormal."""
    if x == 0:
        return x
    exponent = max(math.frexp(x)[1] - 1, smallest)
    step = Fraction(2) ** (exponent - mantissa)
    rounded = float(round(Fraction(x) / step) * step)  # round() of a Fraction goes to the even neighbour
    return math.copysign(min(abs(rounded), largest), x)


def code(value: float) -> int:
    """The byte of a number that E4M3 can hold."""
    sign = 128 if math.copysign(1.0, value) < 0 else 0
    size = abs(value)
    if size < 2.0**-6:
        return sign + int(size * 2**9)
    exponent = math.frexp(size)[1] - 1
    return sign + ((exponent + 7) << 3) + int((size / 2.0**exponent - 1) * 8)


def e4m3(x: Array) -> Outputs:
    values = [nearest(value, **E4M3) for value in x.tolist()]
    return {"values": np.array(values), "codes": np.array([code(value) for value in values])}


def e5m6(x: Array) -> Outputs:
    return {"values": np.array([nearest(value, **E5M6) for value in x.tolist()])}


def factor_of(tile: Array, scales: str) -> float:
    amax = float(np.abs(tile).max())
    if amax == 0:
        return 1.0
    exact = amax / 448.0
    if scales == "exact":
        return exact
    mantissa, exponent = math.frexp(exact)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def quantised(x: Array, rows: int, cols: int, scales: str) -> tuple[Array, Array]:
    """(numbers of E4M3, factors); float64 quotients."""
    codes = np.zeros(x.shape)
    factors = np.zeros((len(x) // rows, x.shape[1] // cols))
    for i, j in np.ndindex(factors.shape):
        part = np.s_[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        factors[i, j] = factor_of(x[part], scales)
        codes[part] = [[nearest(value / factors[i, j], **E4M3) for value in row] for row in x[part].tolist()]
    return codes, factors


def fp8_tiles(x: Array, tile_rows: int, tile_cols: int, scales: str) -> Outputs:
    codes, factors = quantised(x, tile_rows, tile_cols, scales)
    values = codes * np.repeat(np.repeat(factors, tile_rows, 0), tile_cols, 1)
    return {"values": values, "factors": factors}


def fp8_matmul(a: Array, b: Array) -> Outputs:
    a_codes, a_factors = quantised(a, 1, BLOCK, "exact")
    b_codes, b_factors = quantised(b, BLOCK, BLOCK, "exact")
    product = np.zeros((len(a), len(b)))
    for m, n in np.ndindex(product.shape):
        parts = []
        for j in range(a.shape[1] // BLOCK):
            columns = np.s_[j * BLOCK : (j + 1) * BLOCK]
            # numbers of E4M3 are multiples of 2^-9: their products add up without rounding
            inner = math.fsum((a_codes[m, columns] * b_codes[n, columns]).tolist())
            parts.append(inner * float(a_factors[m, j]) * float(b_factors[n // BLOCK, j]))
        product[m, n] = math.fsum(parts)
    return {"product": product}
