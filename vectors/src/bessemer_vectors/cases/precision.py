"""Cases of number formats."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Draw, Rival
from bessemer_vectors.reference import precision as reference

Array = Any
Outputs = dict[str, Any]


def rounding(mantissa: int, smallest: int, largest: float, how: str) -> Any:
    """Values rounded "away" from zero at ties, or "down" towards zero."""

    def one(x: float) -> float:
        if x == 0:
            return x
        exponent = max(math.frexp(x)[1] - 1, smallest)
        step = Fraction(2) ** (exponent - mantissa)
        steps = abs(Fraction(x)) / step
        whole = math.floor(steps + Fraction(1, 2)) if how == "away" else math.floor(steps)
        return math.copysign(min(float(whole * step), largest), x)

    return lambda x: {"values": np.array([one(value) for value in x.tolist()])}


def flushed(mantissa: int, smallest: int, largest: float) -> Any:
    def values(x: Array) -> Outputs:
        return {
            "values": np.array(
                [
                    0.0 if abs(value) < 2.0**smallest else reference.nearest(value, mantissa, smallest, largest)
                    for value in x.tolist()
                ]
            )
        }

    return values


def wide(x: Array) -> Outputs:
    """E4M3 as in IEEE formats: the highest exponent is reserved, 240 is the largest number."""
    return {"values": np.clip(reference.e4m3(x)["values"], -240.0, 240.0)}


def rivals_of(form: dict[str, Any]) -> tuple[Rival, ...]:
    return (
        Rival(
            "ties away from zero",
            "round half up in magnitude",
            "another convention",
            function=rounding(**form, how="away"),
        ),
        Rival("truncated", "towards zero", "a cast of bits", function=rounding(**form, how="down")),
        Rival(
            "subnormals flushed", "0 below the smallest normal number", "another convention", function=flushed(**form)
        ),
    )


def e4m3() -> list[Case]:
    ties = [1.0625, 1.1875, 17.0, 19.0, 248.0, 0.001953125 / 2, 0.001953125 * 1.5, 432.0]
    edges = [0.0, 448.0, 449.0, 463.9, 464.0, 1000.0, -448.0, -1e6, 0.015625, 0.0146484375, 0.001953125, 0.00097, 1e-9]
    every = [reference.nearest(code_value(code), **reference.E4M3) for code in range(127)]
    plain, down, flush = rivals_of(reference.E4M3)
    return [
        Case(
            "ties",
            "Halfway between two numbers: to the even one.",
            {"x": np.array(ties + [-tie for tie in ties])},
            (plain, down, flush),
        ),
        Case(
            "edges",
            "Zero, the largest number, overflow, subnormals, below them.",
            {"x": np.array(edges)},
            (flush, down, Rival("IEEE's E4M3", "largest number 240", "the format with infinities", function=wide)),
        ),
        Case("every number", "The 127 numbers from 0 to 448 are their own rounding.", {"x": np.array(every)}, (flush,)),
        Case(
            "in between",
            "Forty numbers over the whole range.",
            {
                "x": np.array(
                    [
                        math.copysign(2.0**e, s) * m
                        for e, s, m in zip(
                            Draw(40).numbers(-10, 9, 40, digits=0),
                            Draw(41).numbers(-1, 1, 40),
                            Draw(42).numbers(1, 1.99, 40),
                            strict=True,
                        )
                    ]
                )
            },
            (down,),
        ),
    ]


def code_value(code: int) -> float:
    """The number of a byte below 127."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e5m6() -> list[Case]:
    step = 2.0**-6
    ties = [1 + step / 2, 1 + step * 1.5, 1028.0, 1044.0, 3 * 2.0**-21, 2.0**-21, 5.0 * 2.0**-21]
    edges = [0.0, 65024.0, 65536.0, 1e6, -1e6, 2.0**-14, 2.0**-14 * 0.99, 2.0**-20, 2.0**-20 * 0.49, 1e-12]
    plain, down, flush = rivals_of(reference.E5M6)
    bf16 = Rival(
        "seven mantissa bits",
        "BF16's mantissa",
        "another format",
        function=lambda x: {"values": np.array([reference.nearest(value, 7, -14, 65280.0) for value in x.tolist()])},
    )
    return [
        Case(
            "ties",
            "Halfway between two numbers: to the even one.",
            {"x": np.array(ties + [-tie for tie in ties])},
            (plain, down),
        ),
        Case("edges", "Zero, overflow, the smallest normal number, subnormals.", {"x": np.array(edges)}, (flush,)),
        Case("activations", "Thirty numbers like attention's output.", {"x": Draw(43).bell(0.7, 30)}, (bf16, down)),
    ]


def outlier(matrix: Array, row: int, column: int, value: float) -> Array:
    out = matrix.copy()
    out[row, column] = value
    return out


def single(x: Array) -> Array:
    """As float32 holds it."""
    return x.astype(np.float32).astype(np.float64)


def fp8_tiles() -> list[Case]:
    wide = single(outlier(Draw(44).bell(1.0, 2, 256), 0, 5, 40.0))
    block = single(outlier(Draw(45).bell(0.02, 4, 8, digits=4), 1, 1, 0.9))
    powers = outlier(outlier(Draw(48).bell(1.0, 2, 128), 0, 7, 112.0), 1, 9, -896.0)
    powers = np.round(powers * 64) / 64
    zeros = block.copy()
    zeros[:2, :4] = 0.0

    def case(name: str, why: str, x: Array, rows: int, cols: int, scales: str, *rivals: Rival, **more: Any) -> Case:
        inputs = {"x": x, "tile_rows": rows, "tile_cols": cols, "scales": scales}
        return Case(name, why, inputs, rivals, **more)

    def values_of(change: dict[str, Any]) -> Any:
        """The outputs with other tiles, whose factors have another shape."""
        return lambda **inputs: {"values": reference.fp8_tiles(**(inputs | change))["values"]}

    by_tensor = Rival(
        "one factor for all",
        "amax of the whole matrix",
        "per-tensor scaling",
        function=values_of({"tile_rows": 2, "tile_cols": 256}),
    )
    by_row = Rival("one factor per row", "amax of the row", "per-token scaling", function=values_of({"tile_cols": 256}))
    square = Rival(
        "tiles exchanged", "128 x 1", "columns for rows", function=values_of({"tile_rows": 2, "tile_cols": 1})
    )

    def other(scales: str) -> Rival:
        return Rival(f'scales "{scales}"', "the other rule for factors", "another convention", {"scales": scales})

    def next_power(**inputs: Any) -> Outputs:
        return scaled_by(2.0, inputs)

    def rounded_down(**inputs: Any) -> Outputs:
        """Power-of-two factors rounded down: the largest numbers saturate."""
        return scaled_by(0.5, inputs)

    def scaled_by(step: float, inputs: dict[str, Any]) -> Outputs:
        factors = reference.fp8_tiles(**inputs)["factors"] * step
        grown = np.repeat(np.repeat(factors, inputs["tile_rows"], 0), inputs["tile_cols"], 1)
        codes = np.vectorize(lambda value: reference.nearest(float(value), **reference.E4M3))(inputs["x"] / grown)
        return {"factors": factors, "values": codes * grown}

    return [
        case(
            "activations, 1 x 128",
            "An outlier of 40 costs precision in its own tile alone.",
            wide,
            1,
            128,
            "exact",
            by_tensor,
            by_row,
            square,
            other("power-of-two"),
        ),
        case(
            "activations, power-of-two",
            "Factors are powers of two, rounded up.",
            wide,
            1,
            128,
            "power-of-two",
            other("exact"),
            Rival("rounded down", "the power of two below", "saturates", function=rounded_down),
        ),
        case(
            "amax a power of two, times 448",
            "The factor is that power itself: 1/4 and 2, not the next one.",
            powers,
            1,
            128,
            "power-of-two",
            Rival("always the next power", "2^(floor(log2(amax / 448)) + 1)", "a slip", function=next_power),
            Rival("rounded down", "the power of two below", "saturates", function=rounded_down),
        ),
        case(
            "weights, small blocks",
            "Blocks of 2 x 4 stand for 128 x 128.",
            block,
            2,
            4,
            "exact",
            Rival(
                "one factor for all",
                "amax of the whole matrix",
                "per-tensor scaling",
                function=values_of({"tile_rows": 4, "tile_cols": 8}),
            ),
        ),
        case("a tile of zeros", "Zero stays zero, whatever its factor.", zeros, 2, 4, "exact", leave_out=("factors",)),
    ]


def fp8_matmul() -> list[Case]:
    """The promoted product, small enough to store: K = 256 needs two blocks."""
    a, b = (np.round(matrix * 32) / 32 for matrix in (Draw(46).bell(1.0, 2, 256), Draw(47).bell(0.5, 128, 256)))
    a = outlier(a, 0, 3, 30.0)

    def unquantised(a: Array, b: Array) -> Outputs:
        return {"product": np.array([[math.fsum((x * y).tolist()) for y in b] for x in a])}

    def one_factor(a: Array, b: Array) -> Outputs:
        """Factors per row and per matrix, since a sum that is never promoted can take only those."""
        a_codes, a_factors = reference.quantised(a, 1, 256, "exact")
        b_codes, b_factors = reference.quantised(b, 128, 256, "exact")
        product = [
            [math.fsum((x * y).tolist()) * float(a_factors[m, 0]) * float(b_factors[0, 0]) for y in b_codes]
            for m, x in enumerate(a_codes)
        ]
        return {"product": np.array(product)}

    def short_sums(a: Array, b: Array) -> Outputs:
        """Fourteen bits of accumulator and no promotion: truncated after every 32 columns."""
        a_codes, a_factors = reference.quantised(a, 1, 256, "exact")
        b_codes, b_factors = reference.quantised(b, 128, 256, "exact")
        product = np.zeros((len(a), len(b)))
        for m, n in np.ndindex(product.shape):
            held = 0.0
            for start in range(0, 256, 32):
                columns = np.s_[start : start + 32]
                held += math.fsum((a_codes[m, columns] * b_codes[n, columns]).tolist())
                fraction, exponent = math.frexp(held)
                held = math.ldexp(math.trunc(fraction * 2**14), exponent - 14)
            product[m, n] = held * float(a_factors[m, 0]) * float(b_factors[0, 0])
        return {"product": product}

    return [
        Case(
            "two blocks",
            "Each block of 128 columns has its own factors.",
            {"a": a, "b": b},
            (
                Rival("not quantised", "a b^T", "float arithmetic", function=unquantised),
                Rival("no promotion", "one factor per row, one sum over K", "a plain FP8 GEMM", function=one_factor),
                Rival(
                    "fourteen bits, no promotion",
                    "the sum truncated after every 32 columns",
                    "DeepSeek-V3 3.3.2 (Hopper)",
                    function=short_sums,
                ),
            ),
        ),
    ]
