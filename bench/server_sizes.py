"""What one large request costs the others of a server, with V3's vocabulary on a network of almost no width.

    python bench/server_sizes.py [--rows 16] [--steps 200] [--out FILE]

One plain sample decodes in a scheduler while requests arrive as in a server's worker: pickled, in one message, all
samples started between two steps. For every case: how long it takes to start them, during which nothing decodes, and
the longest time between two tokens of the plain sample. The cases: n = 128 samples without anything, with 64 stop
strings, with 300 biases, and of a prompt of 32K tokens (whose prefill, not its samples, then takes the time). What a
case costs the others is its time beyond that of the first.

Then the memory of 320 samples with 64 stop strings, and the step of 16 rows, one of which has a penalty and a prompt of
4,000 tokens, against 16 plain ones; both in turn, medians of processor time.
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import statistics
import string
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from machine import processor

from bessemer.addons.serve.fair_queue import FairQueue
from bessemer.addons.serve.penalties import PenaltyParams
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import Token
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.token_controls import TokenRules
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.sequence import SamplingParams
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

VOCABULARY, CONTEXT, SAMPLES = 129_280, 32_768, 128
STOPS = tuple((string.ascii_letters + "äöüßéèêçñø盛钢")[:64])


def engine() -> Engine:
    """A tokenizer of V3's size, most of whose tokens no text contains, and a network of its vocabulary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 8, 300)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small.save(folder)
        spec = json.loads((folder / "tokenizer.json").read_text())
        spec["model"]["vocab"] |= {f"Ġ{n:x}zq": n for n in range(small.vocab_size, VOCABULARY)}
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        tokenizer = Tokenizer.load(folder)
    cfg = preset("tiny", vocab_size=VOCABULARY, n_mtp=0, max_seq_len=CONTEXT)
    return Engine(Transformer(cfg).initialise(0).eval(), tokenizer)


def beside(engine: Engine, requests: list[Request], steps: int) -> dict[str, float]:
    """The times between two tokens of a plain sample while the requests arrive and run."""
    scheduler = Scheduler(engine, rows=len(requests) + 1, prefill_tokens=2048, queue=FairQueue())
    plain = scheduler.add(Request((5, 6, 7), 0, steps + 64, stop_ids=()))
    for _ in range(16):
        scheduler.step()
    message = pickle.dumps(requests, pickle.HIGHEST_PROTOCOL)
    gaps, last = [], time.perf_counter()
    for request in pickle.loads(message):
        scheduler.start(request)
    start = 1e3 * (time.perf_counter() - last)
    for _ in range(steps):
        if any(type(event) is Token and event.ticket == plain for event in scheduler.step()):
            now = time.perf_counter()
            gaps.append(1e3 * (now - last))
            last = now
    return {"start_ms": start, "longest_ms": max(gaps)}


def memory(engine: Engine, count: int, **options: object) -> float:
    """MB of `count` started samples, by Python's own count."""
    scheduler = Scheduler(engine, rows=count, queue=FairQueue())
    gc.collect()
    tracemalloc.start()
    sequences = [scheduler.start(Request((5, 6), n, 4, **options)) for n in range(count)]  # type: ignore[arg-type]
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(sequences) == count
    return held_bytes / 1e6


def step_ms(engine: Engine, rows: int, first: TokenRules | None, steps: int) -> Callable[[], float]:
    """A function that runs some steps and returns the processor time of one, in ms."""
    scheduler = Scheduler(engine, rows=rows, queue=FairQueue())
    for n in range(rows):
        prompt = tuple(2 + k % 280 for k in range(4000 if n == 0 else 32))
        scheduler.add(Request(prompt, n, 20 * steps, stop_ids=(), control=first if n == 0 else None))
    while scheduler.stats()["running"] < rows:
        scheduler.step()

    def measure() -> float:
        start = time.process_time()
        for _ in range(steps):
            scheduler.step()
        return 1e3 * (time.process_time() - start) / steps

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    small_engine = engine()
    bias = SamplingParams(bias=tuple((token, 1.0) for token in range(300)))
    long = tuple(2 + n % 280 for n in range(CONTEXT - 200))
    cases = {
        "plain": [Request((5, 6), n, 24, stop_ids=()) for n in range(SAMPLES)],
        "64 stop strings": [Request((5, 6), n, 24, stop_ids=(), stop_strings=STOPS) for n in range(SAMPLES)],
        "300 biases": [Request((5, 6), n, 24, bias, stop_ids=()) for n in range(SAMPLES)],
        "32K prompt": [Request(long, n, 24, stop_ids=()) for n in range(SAMPLES)],
    }
    beside(small_engine, cases["plain"], 20)  # initialises whatever is created on first use
    report: dict[str, object] = {"processor": processor(), "vocabulary": VOCABULARY, "samples": SAMPLES}
    for name, requests in cases.items():
        times = report[name] = beside(small_engine, requests, options.steps)
        print(f"{name}: {times['start_ms']:.1f} ms to start, {times['longest_ms']:.1f} ms between two tokens at most")
    report["MB of 320 samples with 64 stop strings"] = memory(small_engine, 320, stop_strings=STOPS)
    print(f"320 samples with 64 stop strings: {report['MB of 320 samples with 64 stop strings']:.2f} MB")
    plain = step_ms(small_engine, options.rows, None, 30)
    penalised = step_ms(small_engine, options.rows, TokenRules(PenaltyParams(repetition_penalty=1.1)), 30)
    pairs = [(plain(), penalised()) for _ in range(9)]
    report["step_ms"] = {
        "plain": statistics.median(without for without, _ in pairs),
        "penalised": statistics.median(with_penalty for _, with_penalty in pairs),
        "ratio": statistics.median(with_penalty / without for without, with_penalty in pairs),
    }  # fmt: skip
    print(f"{options.rows} rows, one penalised: {report['step_ms']['ratio']:.3f} of a plain step")  # type: ignore[index]
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
