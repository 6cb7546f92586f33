"""Whether an answer depends on the batch, and what `batch_invariant` costs: the same requests alone and together.

    python bench/batch_invariance.py MODEL [--requests 150] [--tokens 32] [--rounds 5] [--forms FORM ...] [--out FILE]
    BESSEMER_KERNELS=off python bench/batch_invariance.py MODEL   # torch alone; avx2: with ONEDNN_MAX_CPU_ISA=AVX2

MODEL is a model directory, or a preset, which then has random weights. Every request has its own prompt and seed. It
runs alone (its batch is one row), then among 8, 64 and all others, as the server would batch it. An answer counts as
different if any of its tokens or log-probabilities differs: `tokens` and `bits`. The cost is processor time on one
core, prefill included, with the option and without in alternated runs; --rounds 0 leaves it out. FILE keeps a section
for each model and setting of the kernels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from machine import processor, spread

from bessemer.addons.families.named_models import model_dir
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import Token
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.data.chat import question_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.random_streams import stream_key
from bessemer.engine.sequence import SamplingParams
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load
from bessemer.model.config import preset
from bessemer.model.ops import backend
from bessemer.model.transformer import Transformer

FORMS = {
    "float32": ("float32", False),
    "bfloat16": ("bfloat16", False),
    "bfloat16, batch_invariant": ("bfloat16", True),
}


def answers(engine: Engine, requests: list[Request], rows: int) -> list[list[tuple[int, float]]]:
    """The tokens of every request and their log-probabilities, at most `rows` decoding together."""
    scheduler = Scheduler(engine, rows=rows, batch_invariant=engine.batch_invariant)
    tickets = [scheduler.add(request) for request in requests]
    tokens_of: dict[int, list[tuple[int, float]]] = {ticket: [] for ticket in tickets}
    while not scheduler.is_idle:
        for event in scheduler.step():
            if isinstance(event, Token):
                tokens_of[event.ticket].append((event.token, event.logprob))
    return list(tokens_of.values())


def engine_of(name: str, dtype: str, batch_invariant: bool) -> Engine:
    if Path(name).is_dir():
        folder = model_dir(name)
        return Engine(load(folder, dtype=dtype, mtp=False), load_tokenizer(folder), batch_invariant=batch_invariant)
    model = Transformer(preset(name, n_mtp=0)).initialise(0).eval().to_compute(getattr(torch, dtype))
    return Engine(model, Tokenizer.train(["What are 1 and 2?"] * 8, 270), batch_invariant=batch_invariant)


def differing(engine: Engine, requests: list[Request]) -> dict[str, dict[int, int]]:
    alone = answers(engine, requests, 1)
    counts: dict[str, dict[int, int]] = {"tokens": {}, "bits": {}}
    for rows in (8, 64, len(requests)):
        together = answers(engine, requests, rows)
        pairs = list(zip(alone, together, strict=True))
        counts["bits"][rows] = sum(a != b for a, b in pairs)
        counts["tokens"][rows] = sum([t for t, _ in a] != [t for t, _ in b] for a, b in pairs)
    return counts


def cost(engines: tuple[Engine, Engine], requests: list[Request], rounds: int) -> dict[str, Any]:
    """Tokens per second with the option as a share of those without, by batch."""
    figures: dict[str, Any] = {}
    for rows in (1, 8, 64, len(requests)):
        own, seconds = requests[: max(rows, 4)], {0: [], 1: []}
        for n in range(rounds + 1):
            for i, engine in enumerate(engines):
                began = time.process_time()
                written = sum(map(len, answers(engine, own, rows)))
                if n:  # the first warms up
                    seconds[i].append((time.process_time() - began) / written)
        figures[str(rows)] = {
            "tokens_per_second": spread([1 / s for s in seconds[0]]),
            "ratio": spread([a / b for a, b in zip(seconds[0], seconds[1], strict=True)]),
        }
        print(f"batch {rows}: {figures[str(rows)]}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="*", choices=list(FORMS), default=list(FORMS), help="whose answers to compare")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "batch_invariance.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    engines = {form: engine_of(args.model, *how) for form, how in FORMS.items()}
    tokenizer = engines["float32"].tokenizer
    sections = json.loads(args.out.read_text()) if args.out.exists() else {}
    result = sections.setdefault(f"{Path(args.model).name}, {backend(torch.device('cpu'))}", {"differing_by_rows": {}})
    result |= {"requests": args.requests, "temperature": 0.8, "processor": processor(), "torch": torch.__version__}
    requests = [
        Request(
            tuple(question_ids(tokenizer, f"What are {n} and {7 * n % 41}?")), stream_key(n), args.tokens,
            SamplingParams(0.8),
        )
        for n in range(args.requests)
    ]  # fmt: skip
    for form in args.forms:
        result["differing_by_rows"][form] = {"answer_tokens": args.tokens, **differing(engines[form], requests)}
        print(form, result["differing_by_rows"][form], flush=True)
    if args.rounds:
        pair = engines["bfloat16"], engines["bfloat16, batch_invariant"]
        result["cost_by_rows"] = {"answer_tokens": args.tokens, **cost(pair, requests, args.rounds)}
    args.out.write_text(json.dumps(sections, indent=1) + "\n")


if __name__ == "__main__":
    main()
