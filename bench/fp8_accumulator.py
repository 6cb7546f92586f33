"""Error of an FP8 GEMM with a short accumulator, with and without promotion (V3 3.3.2, Fig. 7b).

    python bench/fp8_accumulator.py [--k 4096] [--rounds 5]

Random normal matrices of 256 x K are quantised as in the paper (per tensor where nothing is promoted, since only one
factor can be applied then) and multiplied by `precision.emulation.reference_gemm`. The reference is float64 on the same
E4M3 operands. Errors are divided by the root mean square of the result: the maximum over the matrix and the mean,
medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics

from bessemer_claims.numerics import errors

CASES = ((13, None), (14, None), (None, None), (13, 128), (14, 128), (14, 32), (None, 128))
"""(bits of the accumulator, number of columns after which its sum is promoted to float32)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"K = {args.k}; error divided by the result's root mean square: maximum, mean")
    for bits, promote in CASES:
        results = [errors(args.k, bits, promote, seed) for seed in range(args.rounds)]
        largest, mean = (statistics.median(values) for values in zip(*results, strict=True))
        accumulator = "float32" if bits is None else f"{bits} bits"
        when = "never promoted" if promote is None else f"promoted every {promote}"
        print(f"{accumulator:8} {when:19} {100 * largest:8.4f} % {100 * mean:9.5f} %")


if __name__ == "__main__":
    main()
