"""Near-duplicate removal on known duplicates: time, memory, recall and precision.

    python bench/dedup.py [--megabytes 1000] [--workers 2] [--dir DIR] [--json bench/results/dedup.json]

Documents are random words with Zipf-distributed frequencies, log-normal in length (median 300 words, about 2 kB),
written as JSON lines. One in five is a copy of an earlier one. One in ten copies is exact; in the others a share of the
words is replaced, as single words or as one passage, so that similarities range from 0.4 to 1. The ground truth is the
Jaccard similarity of the sets of 5-word n-grams, computed exactly for each pair. Then `bessemer data build` runs with
its defaults.

    recall       of the pairs at or above the threshold, the share whose later document was dropped; also by similarity
    precision    of the dropped documents, the share whose similarity to an earlier one is at or above the threshold,
                 and at or above threshold - 0.08 (two standard deviations of the estimate)
    seconds      wall and processor time of each step, including reading and writing the documents
    memory       peak resident set of a worker and of the main process
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor

from bessemer.addons.curate.data_recipe import build, load
from bessemer.addons.tasks.ngrams import run_hashes

NGRAM = 5
FILE_BYTES = 100_000_000
VOCABULARY = 50_000
RECIPE = """
name = "dedup"
seed = 1
[tokenizer]
vocab_size = 4096
sample = "2M"
[[source]]
name = "made"
from = {folder}
domain = "english"
[engine]
workers = {workers}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="folder for documents and build; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        truth = made(folder / "raw", args.megabytes * 1_000_000)
        recipe = folder / "dedup.toml"
        recipe.write_text(RECIPE.format(folder=json.dumps(str(folder / "raw")), workers=args.workers))
        curation = load(recipe)
        busy = os.getloadavg()[0]
        began = time.monotonic()
        report = build(curation, folder / "out")
        facts = {
            "megabytes": args.megabytes,
            "documents": report["total"]["found"]["documents"],
            "copies": len(truth["copy"]),
            "machine": {"processor": processor(), "workers": args.workers, "load_before": round(busy, 1)},
            "seconds": round(time.monotonic() - began, 1),
            "seconds_of_finding_copies": round(
                sum(report["steps"][s]["seconds"] for s in ("sign", "match", "join")), 1
            ),
            "cpu_seconds": {name: step["cpu_seconds"] for name, step in report["steps"].items()},
            "wall_seconds": {name: step["seconds"] for name, step in report["steps"].items()},
            "memory": {
                "worker": max(step["peak_memory"] for step in report["steps"].values()),
                "program": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            },
            **judged(folder / "out", truth, curation.dedup.threshold),
        }
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def made(folder: Path, size: int) -> dict[str, np.ndarray]:
    """Writes the documents. Returns {"copy": indices of the copies, "of": their originals, "jaccard": similarities}."""
    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.PCG64(7))
    letters = np.array(list("etaoinshrdlucmfwyp"))
    words = list({"".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(VOCABULARY)})
    words.sort()
    vocabulary = np.array(words, object)
    weights = 1 / (np.arange(len(vocabulary)) + 2.7)
    edges = np.cumsum(weights / weights.sum())
    written = number = 0
    recent: list[tuple[int, np.ndarray]] = []
    copies, originals, similar = [], [], []
    file, in_file = None, FILE_BYTES
    while written < size:
        if in_file >= FILE_BYTES:
            if file:
                file.close()
            file, in_file = (folder / f"{written // FILE_BYTES:05d}.jsonl").open("w"), 0
        if recent and rng.random() < 0.2:
            of, ids = recent.pop(rng.integers(len(recent)))
            changed = _changed(ids, rng, len(vocabulary))
            copies.append(number)
            originals.append(of)
            similar.append(_jaccard(ids, changed))
            ids = changed
        else:
            count = int(np.clip(rng.lognormal(np.log(300), 0.7), 30, 5000))
            ids = np.minimum(np.searchsorted(edges, rng.random(count)), len(vocabulary) - 1)
            recent.append((number, ids))
            if len(recent) > 20_000:
                recent.pop(rng.integers(len(recent)))
        line = '{"text": "' + " ".join(vocabulary[ids]) + '"}\n'
        file.write(line)
        written += len(line)
        in_file += len(line)
        number += 1
    file.close()
    return {"copy": np.array(copies), "of": np.array(originals), "jaccard": np.array(similar)}


def _changed(ids: np.ndarray, rng: np.random.Generator, n: int) -> np.ndarray:
    changed = ids.copy()
    kind = rng.random()
    if kind < 0.1:
        return changed
    if kind < 0.55:  # single words: each affects five n-grams
        at = rng.choice(len(ids), max(1, round(rng.uniform(0, 0.1) * len(ids))), replace=False)
        changed[at] = rng.integers(0, n, len(at))
        return changed
    length = round(rng.uniform(0, 0.4) * len(ids))
    start = rng.integers(0, len(ids) - length + 1)
    passage = rng.integers(0, n, rng.integers(0, length + 1))
    return np.concatenate([ids[:start], passage, ids[start + length :]])


def _jaccard(left: np.ndarray, right: np.ndarray) -> float:
    runs = [np.unique(run_hashes(ids.astype(np.uint64), NGRAM)) for ids in (left, right)]
    common = len(np.intersect1d(*runs, assume_unique=True))
    return common / max(1, len(runs[0]) + len(runs[1]) - common)


def judged(out: Path, truth: dict[str, np.ndarray], threshold: float) -> dict[str, Any]:
    """Recall and precision. A document's index is its position in the written order, as in the build."""
    dropped = np.load(out / "work" / "join" / "all" / "copies.npy").astype(np.int64)
    copies, similar = truth["copy"], truth["jaccard"]
    is_dropped = np.isin(copies, dropped)
    right = copies[similar >= threshold]
    nearly = copies[similar >= threshold - 0.08]
    steps = [0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
    bands = {}
    for low, high in pairwise(steps):
        inside = (similar >= low) & ((similar < high) | (high == 1.0))
        bands[f"{low}-{high}"] = {"pairs": int(inside.sum()), "dropped": round(float(is_dropped[inside].mean()), 4)}
    return {
        "threshold": threshold,
        "dropped": len(dropped),
        "recall": round(float(np.isin(right, dropped).mean()), 5),
        "precision": round(float(np.isin(dropped, right).mean()), 5),
        "precision_within_two_deviations": round(float(np.isin(dropped, nearly).mean()), 5),
        "unrelated_dropped": int((~np.isin(dropped, copies)).sum()),
        "dropped_by_similarity": bands,
    }


if __name__ == "__main__":
    main()
