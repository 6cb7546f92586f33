"""Speed-up by MTP speculative decoding at batch 1, by network depth, on memorised text.

    python bench/guesses.py [--layers 4 16] [--drafts 3] [--rounds 5] [--json bench/results/guesses.json]

For every depth, one network, otherwise the preset `tiny`, is trained on 400 tokens of this project's README until it
reproduces them. It then recites them greedily from their first 32 tokens, with 0, 1, ... draft tokens per step. The MTP
module is one layer and a head, so a draft token costs the same at any depth: a quarter of a network of four layers, one
sixty-first of V3. Figures are tokens per second of processor time of the decoding loop, prefill included, as the median
over the rounds with the minimum and the maximum. The benchmark checks that drafts change no token.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from machine import processor, spread

from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import Token
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.sequence import SamplingParams
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.loss import cross_entropy
from bessemer.train.setup import keep_memory

README = Path(__file__).parents[1] / "README.md"
TEXT, WINDOW, ROWS, LEARNT, STEPS = 400, 128, 8, 0.02, 1500
"""Tokens of the text, tokens per training row, rows per step, loss at which training ends, maximum number of steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_memory()
    tokenizer = Tokenizer.train([README.read_text("utf-8")], 1000)
    ids = tokenizer.encode(README.read_text("utf-8"))[:TEXT]
    facts: dict[str, Any] = {
        "processor": processor(), "torch": torch.__version__, "dtype": "float32",
        "threads": 1, "batch": 1, "routing": "real", "rounds": args.rounds, "new_tokens": args.tokens,
        "networks": [],
    }  # fmt: skip
    for layers in args.layers:
        model, steps, losses = learn(ids, tokenizer.vocab_size, layers)
        print(f"{layers} layers: {steps} steps, loss {losses[0]:.3f}, MTP loss {losses[1]:.3f}", flush=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        lines = recite(Engine(model, tokenizer), ids, args)
        torch.set_num_threads(threads)
        facts["networks"].append({"layers": layers, "steps": steps, "losses": losses, "guesses": lines})
        for line in lines:
            print(f"  {line['drafts']} draft tokens: {line['tokens_per_second']['median']:.0f} tokens/s = "
                  f"{line['ratio']['median']:.2f}x ({line['ratio']['low']:.2f} to {line['ratio']['high']:.2f}), "
                  f"accepted {line['accepted']:.3f}, same tokens {line['same_tokens']}", flush=True)  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def learn(ids: list[int], vocab: int, layers: int) -> tuple[Transformer, int, list[float]]:
    """Trains a network on the text. Returns (model, steps, final losses of the main model and of the MTP module)."""
    model = Transformer(preset("tiny", vocab_size=vocab, n_layers=layers)).initialise(7).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    generator, text = torch.Generator().manual_seed(7), torch.tensor(ids)
    smooth = [9.0, 9.0]
    for step in range(1, STEPS + 1):  # noqa: B007 (returned to the caller)
        starts = torch.randint(-WINDOW // 2, len(ids) - WINDOW // 2, (ROWS,), generator=generator)
        starts = starts.clamp(0, len(ids) - WINDOW - 2)  # samples both ends as often as the middle
        rows_BT = torch.stack([text[s : s + WINDOW + 2] for s in starts.tolist()])
        out = model.train_outputs(rows_BT[:, :-1])
        losses = []
        for k, hidden_BTD in enumerate((out.hidden_BTD, out.mtp_hidden[0]), start=1):
            target_BT = rows_BT[:, k : k + hidden_BTD.shape[1]]
            hidden_BTD = hidden_BTD[:, : target_BT.shape[1]]
            losses.append(cross_entropy(hidden_BTD, model.head_weight, target_BT, torch.ones(target_BT.shape)))
        (losses[0] + losses[1]).div(target_BT.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = [
            0.9 * old + 0.1 * float(new.detach()) / target_BT.numel() for old, new in zip(smooth, losses, strict=True)
        ]
        if max(smooth) < LEARNT:
            break
    return model.eval(), step, smooth


def recite(engine: Engine, ids: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Recites the text from its beginning with every number of draft tokens, alternating between them."""
    seconds: dict[int, list[float]] = {drafts: [] for drafts in range(args.drafts + 1)}
    outputs, accepted = {}, {}
    for round_ in range(-1, args.rounds):
        for drafts in seconds:
            began = time.process_time()
            scheduler = Scheduler(engine, rows=1, drafts=drafts)
            scheduler.add(Request(tuple(ids[:32]), 1, args.tokens, SamplingParams(0.0), ()))
            outputs[drafts] = []
            while not scheduler.is_idle:
                outputs[drafts] += [event.token for event in scheduler.step() if isinstance(event, Token)]
            if round_ >= 0:  # the first round warms up
                seconds[drafts].append(time.process_time() - began)
            figures = scheduler.stats()
            accepted[drafts] = figures.get("accepted", 0) / max(1, figures.get("drafted", 0))
    return [
        {"drafts": drafts, "accepted": accepted[drafts], "same_tokens": outputs[drafts] == outputs[0],
         "recited": sum(a == b for a, b in zip(outputs[drafts], ids[32:], strict=False)),
         "tokens_per_second": spread([args.tokens / t for t in times]),
         "ratio": spread([a / b for a, b in zip(seconds[0], times, strict=True)])}
        for drafts, times in seconds.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
