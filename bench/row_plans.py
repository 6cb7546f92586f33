"""Processor seconds of whole rows, per 10^9 tokens, for several row lengths.

    python bench/row_plans.py [--documents 200000] [--lengths 2048 4096 32768 131072]

The documents are as long as those of web text: log-normal, median 493 tokens, a shard in all. "best fit" decides which
pieces share a row; "checksums" reads the tokens and computes the CRC of every row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from bessemer.data import plans, shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 32_768, 131_072])
    args = parser.parse_args()
    lengths = np.maximum(8, np.random.default_rng(0).lognormal(6.2, 1, args.documents).astype(np.int64))
    ends, dtype = lengths.cumsum(), np.dtype("<u4")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.arange(ends[-1], dtype=dtype).tofile(shards.tokens_file(folder, "train-00000"))
        np.save(shards.ends_file(folder, "train-00000"), ends)
        for row_length in args.lengths:
            began = time.process_time()
            plans.best_fit(lengths, row_length)
            fit = time.process_time() - began
            plans.write_plan(folder, folder / f"rows-{row_length}", "train-00000", dtype, row_length)
            whole = time.process_time() - began - fit
            scale = 1e9 / ends[-1]
            print(
                f"rows of {row_length}: best fit {fit * scale:.2f} s, checksums and files {(whole - fit) * scale:.2f} s"
            )


if __name__ == "__main__":
    main()
