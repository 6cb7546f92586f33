"""Processor time of joining the pairs of duplicates that bins found, for several numbers of bins.

    python bench/dedup_join.py [--pairs 20000] [--bins 11 21 42]

Every bin holds as many random pairs, over 50 times as many documents, and no two bins share one: the most that a join
can have to keep.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from bessemer.addons.curate.duplicates import clusters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs in a bin")
    parser.add_argument("--bins", type=int, nargs="+", default=[11, 21, 42])
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    first = 0.0
    for n_bins in args.bins:
        matches = [
            np.sort(draw.integers(0, 50 * args.pairs, (args.pairs, 2)).astype(np.uint64), 1) for _ in range(n_bins)
        ]
        began = time.process_time()
        clusters(iter(matches))
        seconds = time.process_time() - began
        first = first or seconds
        print(f"{n_bins} bins, {n_bins * args.pairs:,} pairs: {seconds:.2f} s, {seconds / first:.1f} times the first")


if __name__ == "__main__":
    main()
