"""Decoding against transformers' generate: same weights, same prompts, greedy, one run.

    python bench/decode.py MODEL [--rounds 5] [--tokens 96] [--threads 1] [--json bench/results/decode.json]

MODEL is a directory of our model family with its MTP layer, such as runs/zero/03-zero/model. Prompts are familiar to
the model: countdown problems, repeated where a longer context is needed. Float32, the model's own routing. Both sides
ignore stop tokens and decode the same number of tokens. Rounds alternate between the two sides; each figure is the
median over the rounds with the minimum and the maximum.

    plain       our decoder with default settings
    tokens/s    new tokens of all rows divided by the time of the whole call, prefill included; and "decoding alone",
                with the time of prefill and the first token subtracted on both sides
    guesses     our decoder at batch 1 with 0 to 3 draft tokens from the MTP module, in processor seconds of the same
                run; accepted: share of the draft tokens that the main model accepts
    cache       bytes allocated for the rows per token of capacity, against the formula, and against keys and values of
                all heads at the same shape
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor, spread

import bessemer
from bessemer import tasks
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import Token
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.data.chat import question_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.sequence import SamplingParams
from bessemer.engine.steps import PrefillChunk, backend_of
from bessemer.model.accounting import kv_cache_bytes
from bessemer.train.setup import keep_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = bessemer.load(args.model, dtype="float32"), Tokenizer.load(args.model)
    engines = {"plain": Engine(model, tokenizer)}
    peer = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    facts: dict[str, Any] = {
        "model": "/".join(args.model.resolve().parts[-3:]), "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor(), "threads": args.threads, "dtype": "float32", "routing": "real",
        "rounds": args.rounds, "new_tokens": args.tokens, "cases": [],
    }  # fmt: skip
    for rows, length in ((1, 32), (64, 32), (1, 320), (64, 320)):
        facts["cases"].append(case(engines, peer, prompts(engines["plain"], rows, length), args.tokens, args.rounds))
        print(_case_line(facts["cases"][-1]), flush=True)
    facts["guesses"] = {name: guesses(engine, args.rounds) for name, engine in engines.items()}
    for name, lines in facts["guesses"].items():
        for line in lines:
            print(f"{name}, {line['drafts']} draft tokens: {line['tokens_per_second']['median']:.0f} tokens/s, "
                  f"{line['ratio']:.2f}x, accepted {line['accepted']:.3f}")  # fmt: skip
    facts["cache"] = cache(engines["plain"])
    print(f"cache: {facts['cache']}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def prompts(engine: Engine, rows: int, length: int) -> list[list[int]]:
    """Countdown questions, repeated to exactly `length` tokens: left padding would slow transformers down."""
    task = tasks.get("countdown")
    texts = [question_ids(engine.tokenizer, task.problem("test", n).prompt) for n in range(rows)]
    return [(ids * (length // len(ids) + 1))[:length] for ids in texts]


def case(engines: dict[str, Engine], peer: Any, prompts: list[list[int]], tokens: int, rounds: int) -> dict[str, Any]:
    """Times all decoders on the same prompts, alternating between them."""
    ids = torch.tensor(prompts)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=2, attention_mask=torch.ones_like(ids))

    def ours(engine: Engine) -> Callable[[int], list[list[int]]]:
        def call(n: int) -> list[list[int]]:
            return [list(c.tokens) for (c,) in engine.generate(prompts, max_new_tokens=n, temperature=0.0, stop_ids=[])]

        return call

    def theirs(n: int) -> list[list[int]]:
        with torch.inference_mode():
            return peer.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)[:, ids.shape[1] :].tolist()

    calls = {name: ours(engine) for name, engine in engines.items()} | {"theirs": theirs}
    outputs = {name: call(tokens) for name, call in calls.items()}
    totals: dict[str, list[float]] = {name: [] for name in calls}
    first: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for times, n in ((totals, tokens), (first, 1)):
                began = time.perf_counter()
                call(n)
                times[name].append(time.perf_counter() - began)
    facts: dict[str, Any] = {"batch": len(prompts), "prompt_tokens": len(prompts[0])}
    alone = {name: statistics.median(map(float.__sub__, totals[name], first[name])) for name in calls}
    for name in calls:
        facts[name] = {
            "tokens_per_second": spread([len(prompts) * tokens / t for t in totals[name]]),
            "decoding_alone_tokens_per_second": len(prompts) * (tokens - 1) / alone[name],
        }
        if name != "theirs":
            facts[name] |= {
                "rows_with_equal_tokens": sum(map(list.__eq__, outputs[name], outputs["theirs"])),
                "ratio": spread([b / a for a, b in zip(totals[name], totals["theirs"], strict=True)]),
                "decoding_alone_ratio": alone["theirs"] / alone[name],
            }
    return facts


def guesses(engine: Engine, rounds: int) -> list[dict[str, Any]]:
    """Batch 1, greedy, whole answers to eight problems, by number of draft tokens."""
    questions = prompts_whole(engine, 8)
    seconds: dict[int, list[float]] = {depth: [] for depth in range(4)}
    accepted, written = {}, {}
    for _ in range(rounds):
        for depth in seconds:
            began = time.process_time()
            texts, figures = [], {"drafted": 0, "accepted": 0}
            for question in questions:
                scheduler = Scheduler(engine, rows=1, drafts=depth)
                scheduler.add(Request(tuple(question), 1, 160, SamplingParams(0.0), tuple(engine.tokenizer.stop_ids)))
                while not scheduler.is_idle:
                    texts += [event.token for event in scheduler.step() if isinstance(event, Token)]
                figures = {name: figures[name] + scheduler.stats().get(name, 0) for name in figures}
            seconds[depth].append(time.process_time() - began)
            written[depth], accepted[depth] = texts, figures["accepted"] / max(1, figures["drafted"])
    return [
        {"drafts": depth, "tokens": len(written[depth]), "same_tokens": written[depth] == written[0],
         "accepted": accepted[depth], "tokens_per_second": spread([len(written[depth]) / t for t in times]),
         "ratio": statistics.median(a / b for a, b in zip(seconds[0], times, strict=True))}
        for depth, times in seconds.items()
    ]  # fmt: skip


def prompts_whole(engine: Engine, rows: int) -> list[list[int]]:
    task = tasks.get("countdown")
    return [question_ids(engine.tokenizer, task.problem("test", n).prompt) for n in range(rows)]


def cache(engine: Engine) -> dict[str, Any]:
    """Measured cache bytes of 64 rows of 256 tokens."""
    cfg = engine.model.cfg
    with torch.inference_mode():
        steps = backend_of(engine.model)
        held = steps.new_cache()
        waiting = [held.open([3] * 256) for _ in range(64)]
        for sequence in waiting:
            held.extend(sequence, len(sequence.ids))
        steps.prefill(held, [PrefillChunk(sequence, len(sequence.ids)) for sequence in waiting])
        held.admit([(sequence, 1) for sequence in waiting])
    stored = sum(pool.untyped_storage().nbytes() for pool in held.layers)
    heads = cfg.n_layers * cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim) * 4
    return {
        "bytes_per_token": stored / (held.pages.total * 64), "formula": kv_cache_bytes(cfg, 4),
        "same_shape_heads": heads, "share": kv_cache_bytes(cfg, 4) / heads,
    }  # fmt: skip


def _case_line(facts: dict[str, Any]) -> str:
    lines = [f"batch {facts['batch']}, prompt {facts['prompt_tokens']}: transformers "
             f"{facts['theirs']['tokens_per_second']['median']:.0f} tokens/s"]  # fmt: skip
    if (plain := facts.get("plain")) is not None:
        lines.append(
            f"  plain {plain['tokens_per_second']['median']:.0f} = {plain['ratio']['median']:.2f}x "
            f"({plain['ratio']['low']:.2f} to {plain['ratio']['high']:.2f}); "
            f"decoding alone {plain['decoding_alone_ratio']:.2f}x; {plain['rows_with_equal_tokens']} rows equal"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
