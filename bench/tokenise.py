"""Tokenising and packing against datasets.map: same texts, same tokenizer, same cores, rows of the same length.

    python bench/tokenise.py [--rounds 3] [--workers 2] [--row-length 256] [--json bench/results/tokenise.json]

Texts are real and occur once each, shuffled with a fixed seed: the registered sources in English and Chinese, and the
source code of the installed Python packages, one document per file, up to --code-megabytes. The tokenizer is trained on
them (--vocab-size).

    datasets   the usual script (transformers' run_clm): map(tokenizer, batched=True, num_proc=N), then map(group_texts,
               batched=True, num_proc=N), which concatenates and cuts every column and adds labels
    lean       the same with ids only, which is unusual: no attention masks, no labels
    ours       shards of documents with BOS and EOS, held-out documents separate, a plan of best-fit rows with checksums

Both sides start from files of their own format (Arrow, JSON lines) and end with files on disk; the time includes
starting the worker processes. Rounds alternate. Processor time is that of this process and its children; on a shared
machine it is more meaningful than the wall clock. Before the timing, the ids of both sides are compared on a sample.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from machine import processor, spread

from bessemer.addons.curate import origins
from bessemer.addons.curate.jobs import Job, ProcessPool
from bessemer.addons.curate.settings import Source, Tokens
from bessemer.data import sources
from bessemer.data.tokenizer import Tokenizer

GROUPS = {
    "english": ("fables-en", "wiki-en", "web-en", "shakespeare"),
    "chinese": ("fables-zh", "idioms-zh", "words-zh", "poems-zh"),
    "code": (),
}
FILES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--code-megabytes", type=int, default=30)
    parser.add_argument("--only", choices=GROUPS, help="use only this group of texts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # worker processes are compared; threads would oversubscribe cores
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    groups = [args.only] if args.only else list(GROUPS)
    texts = [text for group in groups for text in texts_of(group, args.code_megabytes)]
    random.Random(0).shuffle(texts)
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Tokenizer.train(texts, args.vocab_size).save(folder / "tokenizer")
        data, files = theirs_from(texts, folder), ours_from(texts, folder)
        same_ids(texts[:500], folder / "tokenizer")
        rows = {
            "datasets": lambda out: theirs(data, folder / "tokenizer", args.row_length, args.workers, out, False),
            "lean": lambda out: theirs(data, folder / "tokenizer", args.row_length, args.workers, out, True),
            "ours": lambda out: ours(files, folder / "tokenizer", args.row_length, args.workers, out),
        }
        timed: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
        for number in range(args.rounds):
            for name, run in rows.items():
                timed[name].append(clocked(run, folder / f"{name}-{number}"))
                print(name, timed[name][-1], flush=True)
    ratios = {
        name: {
            clock: spread([a[clock] / b[clock] for a, b in zip(timed[name], timed["ours"], strict=True)])
            for clock in ("seconds", "cpu_seconds")
        }
        for name in ("datasets", "lean")
    }
    facts = {
        "bytes": size,
        "documents": len(texts),
        "vocab_size": args.vocab_size,
        "groups": groups,
        "machine": {"processor": processor(), "workers": args.workers, "load": round(os.getloadavg()[0], 1)},
        "rounds": timed,
        "bytes_per_second": {
            name: spread([size / measurement["seconds"] for measurement in of]) for name, of in timed.items()
        },
        "bytes_per_cpu_second": {
            name: spread([size / measurement["cpu_seconds"] for measurement in of]) for name, of in timed.items()
        },
        "times_as_fast": ratios,
    }
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def texts_of(group: str, megabytes: int) -> list[str]:
    if group != "code":
        return [document.text for name in GROUPS[group] for document in sources.documents(name)]
    texts, remaining = [], megabytes * 1_000_000
    paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    random.Random(1).shuffle(paths)
    for path in paths:
        with suppress(UnicodeDecodeError):
            if text := path.read_text("utf-8"):
                texts.append(text)
                remaining -= len(text.encode())
        if remaining <= 0:
            break
    return texts


def clocked(run: Callable[[Path], int], out: Path) -> dict[str, float]:
    """Seconds, processor seconds and tokens of one run; its output is deleted."""
    out.mkdir()
    start, began = _cpu(), time.monotonic()
    tokens = run(out)
    facts = {"seconds": round(time.monotonic() - began, 2), "cpu_seconds": round(_cpu() - start, 2), "tokens": tokens}
    shutil.rmtree(out)
    return facts


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def same_ids(texts: list[str], tokenizer: Path) -> None:
    """Checks that both sides produce the same ids; the comparison is meaningless otherwise."""
    from transformers import AutoTokenizer

    from bessemer.data.encoder import Encoder

    reference = AutoTokenizer.from_pretrained(tokenizer)
    actual = [ids.tolist() for ids in Encoder(Tokenizer.load(tokenizer)).encode_batch(texts)]
    assert actual == reference(texts, add_special_tokens=False)["input_ids"]


def theirs_from(texts: list[str], folder: Path) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"text": texts}).save_to_disk(folder / "arrow")
    return folder / "arrow"


def theirs(data: Path, tokenizer: Path, row_length: int, workers: int, out: Path, lean: bool) -> int:
    """Runs the two usual maps."""
    from datasets import disable_progress_bars, load_from_disk
    from transformers import AutoTokenizer

    disable_progress_bars()
    encode = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return encode(batch["text"], add_special_tokens=False, return_attention_mask=not lean)

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = {key: list(chain(*batch[key])) for key in batch}
        total = len(joined["input_ids"]) // row_length * row_length
        rows = {key: [ids[at : at + row_length] for at in range(0, total, row_length)] for key, ids in joined.items()}
        return rows if lean else rows | {"labels": rows["input_ids"].copy()}

    texts = load_from_disk(data)
    more = {"batched": True, "num_proc": workers, "load_from_cache_file": False}
    ids = texts.map(tokenize, remove_columns=["text"], cache_file_name=str(out / "ids.arrow"), **more)
    packed = ids.map(group, cache_file_name=str(out / "rows.arrow"), **more)
    return len(packed) * row_length


def ours_from(texts: list[str], folder: Path) -> list[Path]:
    """Documents as the earlier build steps leave them: compressed, with nothing dropped."""
    from bessemer.addons.curate import steps
    from bessemer.addons.curate.settings import Dedup

    ids = []
    join = folder / "join"
    for number in range(FILES):
        raw = folder / f"{number}.jsonl"
        raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number::FILES]))
        unit = origins.units(Source(f"s{number}", str(raw), "real", "real"), 1 << 40, None)[0][0]
        at = folder / "units" / str(number)
        for step in ("read", "sign"):
            (at / step).mkdir(parents=True)
        (at / "read" / "facts.json").write_text(json.dumps(steps.read(at / "read", unit, None)))
        steps.sign(at / "sign", at / "read", Dedup(exact=False, near=False), None, 10)
        ids.append(at)
    join.mkdir()
    steps.join(join, [], [], [0] * FILES)
    return ids


def ours(units: list[Path], tokenizer: Path, row_length: int, workers: int, out: Path) -> int:
    """Runs the last step of `bessemer data build`."""
    tokens = Tokens(str(tokenizer), 0, 0, row_length, 0.01, 0.0, (), 0.0)
    jobs = [
        Job(
            "write", str(number), out / str(number), "",
            {"read": unit / "read", "sign": unit / "sign", "join": units[0].parent.parent / "join", "first": 0,
             "part": "real", "number": number, "tokens": tokens, "tokenizer": tokenizer, "seed": 0},
        )
        for number, unit in enumerate(units)
    ]  # fmt: skip
    engine = ProcessPool(workers)
    try:
        done = [facts for _, facts in engine.run(jobs)]
    finally:
        engine.close()
    return sum(side["tokens"] for facts in done for side in facts["shards"].values())


if __name__ == "__main__":
    main()
