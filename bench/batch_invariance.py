"""Whether an answer depends on the batch: the same requests alone and together, in float32 and bfloat16.

    python bench/batch_invariance.py MODEL [--requests 150] [--tokens 32] [--out FILE]

Every request has its own prompt and seed. It runs alone (its batch is one row), then among 8, 64 and all others, as the
server would batch it. An answer counts as different if any of its tokens differs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from machine import processor

from bessemer.addons.families.named_models import model_dir
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import Token
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.data.chat import question_ids
from bessemer.engine.engine import Engine
from bessemer.engine.random_streams import stream_key
from bessemer.engine.sequence import SamplingParams
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load


def answers(engine: Engine, requests: list[Request], rows: int) -> list[list[int]]:
    """The tokens of every request, at most `rows` decoding together."""
    scheduler = Scheduler(engine, rows=rows)
    tickets = [scheduler.add(request) for request in requests]
    tokens_of: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    while not scheduler.is_idle:
        for event in scheduler.step():
            if isinstance(event, Token):
                tokens_of[event.ticket].append(event.token)
    return list(tokens_of.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "batch_invariance.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder, counts = model_dir(args.model), {}
    for dtype in ("float32", "bfloat16"):
        engine = Engine(load(folder, dtype=dtype, mtp=False), load_tokenizer(folder))
        requests = [
            Request(
                tuple(question_ids(engine.tokenizer, f"What are {n} and {7 * n % 41}?")), stream_key(n), args.tokens,
                SamplingParams(0.8),
            )
            for n in range(args.requests)
        ]  # fmt: skip
        alone = answers(engine, requests, 1)
        counts[dtype] = {
            rows: sum(a != b for a, b in zip(alone, answers(engine, requests, rows), strict=True))
            for rows in (8, 64, args.requests)
        }
        print(dtype, counts[dtype], flush=True)
    result = {
        "requests": args.requests, "tokens": args.tokens, "differing_by_rows": counts, "temperature": 0.8,
        "model": Path(args.model).name, "processor": processor(), "torch": torch.__version__,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
