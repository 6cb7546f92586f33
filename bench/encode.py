"""Encoding by the tokenizers library and by gigatoken, on one core.

    pip install 'bessemer[gigatoken]'
    python bench/encode.py [--megabytes 12] [--rounds 3] [--json bench/results/encode.json]

The texts are the source code of the installed Python packages, one text per file, in an order drawn once, and the
paragraphs of this repository's documents; the tokenizer is trained on some of them. A batch is 256 texts. Figures are
processor time, the least over the rounds, since other work on the machine only slows a round; the first round is also
given, because gigatoken's cache is empty then. All ids are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sysconfig
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from machine import processor

from bessemer.addons.accelerate import gigatoken_encoder
from bessemer.data.tokenizer import Tokenizer

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    code = source_code(args.megabytes)
    prose = [file.read_text("utf-8") for file in sorted(Path(__file__).parents[1].glob("docs/*.md"))]
    tokenizer = Tokenizer.train([*code[:200], *prose], 16_384)
    groups = {"code": code, "prose": [part for text in prose for part in text.split("\n\n") if part]}
    results = {"machine": processor(), "load": os.getloadavg()[0], "gigatoken": version("gigatoken"), "rows": []}
    for group, texts in groups.items():
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        quick = gigatoken_encoder.faster(tokenizer)
        assert quick is not None, "install the version that addons/accelerate/gigatoken_encoder.py names"
        encoders = {"library": tokenizer.encode_batch, "gigatoken": quick}
        expected = None
        for name, encode in encoders.items():
            times = []
            for _ in range(args.rounds):
                seconds, ids = timed(encode, texts)
                times.append(seconds)
                expected = expected or ids
                assert all(
                    np.array_equal(ids_of_text, reference) for ids_of_text, reference in zip(ids, expected, strict=True)
                ), name
            row = {"texts": group, "way": name, "megabytes": megabytes, "first": megabytes / times[0]}
            results["rows"].append(row | {"best": megabytes / min(times)})
            speeds = f"{row['first']:6.1f} MB/s at first, {megabytes / min(times):6.1f}"
            print(f"{group:6} {name:10} {megabytes:5.1f} MB  {speeds}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def timed(encode: Callable, texts: list[str]) -> tuple[float, list]:
    begin, ids = time.process_time(), []
    for start in range(0, len(texts), BATCH):
        ids += encode(texts[start : start + BATCH])
    return time.process_time() - begin, ids


def source_code(megabytes: float) -> list[str]:
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    random.Random(1).shuffle(files)
    texts: list[str] = []
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
        megabytes -= len(texts[-1].encode()) / 1e6
        if megabytes < 0:
            break
    return [text for text in texts if text]


if __name__ == "__main__":
    main()
