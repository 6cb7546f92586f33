"""A training step in FP8 against the same step in BF16 and in float32: time, and memory saved for backward.

    python bench/fp8_step.py --preset small --threads 1 --json bench/results/fp8_step_small_1.json
    python bench/fp8_step.py --one-billion --rows 4 --length 4096 --json bench/results/fp8_step_h100.json    on a GPU

One step is forward, backward, clipping and AdamW on fresh random tokens with MTP; routing is real and changes from step
to step. The cases alternate, so that a noisy machine affects all of them; figures are medians with the minimum and the
maximum. On a CPU FP8 is emulated. Memory is torch's allocator reading between forward and backward and its peak over
both, next to the formula `activation_bytes` of `precision/activations.py`. On a GPU BF16 is also measured with
compiled layers.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from machine import processor, spread

from bessemer.addons.accelerate import compiling
from bessemer.addons.accelerate.precision import backends
from bessemer.addons.accelerate.precision.activations import activation_bytes
from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import FP8_RECIPES
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.model import accounting
from bessemer.model.config import PRESETS, ModelConfig, preset
from bessemer.model.transformer import Transformer
from bessemer.train import objective, setup
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.trainer import Trainer
from bessemer_claims.numerics import allocations

TERMS = {"mtp_lambda": 0.3, "balance_alpha": 1e-4}
ONE_BILLION = dict(
    preset="v3", vocab_size=32768, dim=2048, n_layers=16, n_dense_layers=1, inter_dim=8192, moe_inter_dim=1024,
    n_heads=16, q_lora_rank=1024, n_routed_experts=32, n_activated_experts=6, n_expert_groups=4, n_limited_groups=2,
)  # fmt: skip
"""About a billion active parameters, all widths multiples of 128."""


def trainer(cfg: ModelConfig, case: dict[str, Any], device: torch.device, rows: int) -> Trainer:
    model = Transformer(cfg).initialise(0).to(device)
    if case["fp8"]:
        set_fp8(model, FP8_RECIPES[case["fp8"]])
    if case["compile"]:
        compiling.compile_layers([*model.layers, *model.mtp])

    return Trainer(
        model, objective.next_token, None,
        PretrainConfig(kind="pretrain", lr=Points(1e-3), micro_rows=rows, moments="bfloat16"),
        TrainingPlan(
            tokens=1, gamma=constant(1e-3), batch_rows=constant(rows), compute_dtype=case["dtype"],
            terms={name: constant(value) for name, value in TERMS.items()},
        ),
    )  # fmt: skip


def fresh(cfg: ModelConfig, rows: int, length: int, seed: int) -> Batch:
    loss = torch.ones(rows, length)
    loss[:, 0] = 0
    return Batch(torch.randint(0, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)), loss)


def seconds(trainer: Trainer, batch: Batch) -> float:
    began = time.perf_counter()
    trainer.update([batch])
    if batch.tokens_BT.is_cuda or torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def memory(trainer: Trainer, batch: Batch) -> tuple[int, int]:
    """(bytes saved from forward for backward, peak over both) above the bytes allocated before, without gradients."""
    trainer.model.train()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = trainer.objective(trainer.model, batch.to(next(trainer.model.parameters()).device), **TERMS)
        saved = torch.cuda.memory_allocated() - before
        loss.total.backward()
        return saved, torch.cuda.max_memory_allocated() - before
    loss, first = allocations(lambda: trainer.objective(trainer.model, batch, **TERMS))
    _, second = allocations(loss.total.backward)
    return sum(first), max(accumulate(first + second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--one-billion", action="store_true", help="a network of a billion active parameters instead")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setup.keep_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    changes = dict(ONE_BILLION) if args.one_billion else {"preset": args.preset}
    cfg = preset(changes.pop("preset"), **changes)
    cases = {
        "BF16": {"dtype": torch.bfloat16, "fp8": None, "compile": False},
        "float32": {"dtype": torch.float32, "fp8": None, "compile": False},
        "FP8": {"dtype": torch.bfloat16, "fp8": "paper", "compile": False},
    }
    if device.type == "cuda":
        cases["BF16, compiled"] = {"dtype": torch.bfloat16, "fp8": None, "compile": True}
        del cases["float32"]
    trainers = {name: trainer(cfg, case, device, args.rows) for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(args.rounds + 2):
        batch = fresh(cfg, args.rows, args.length, number)
        for name, built in trainers.items():
            times[name].append(seconds(built, batch))
    name_of = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    facts: dict[str, Any] = {
        "device": name_of, "torch": torch.__version__, "threads": args.threads, "rows": args.rows,
        "length": args.length, "active_params": accounting.active_params(cfg), "params": accounting.main_params(cfg),
        "served": backends.summary(backends.table(device)), "cases": {},
    }  # fmt: skip
    print(f"{name_of}, {args.threads} threads, {args.rows} x {args.length} tokens, {facts['active_params']:,} active; "
          f"FP8 {facts['served']}")  # fmt: skip
    for name, seconds_of in times.items():
        seconds_of = seconds_of[2:]  # the first two compile and warm up
        ratios = [a / b for a, b in zip(seconds_of, times["BF16"][2:], strict=True)]
        saved, highest = memory(trainers[name], fresh(cfg, args.rows, args.length, 99))
        fp8, number_bytes, computed = cases[name]["fp8"] is not None, cases[name]["dtype"].itemsize, None
        if fp8 or device.type == "cpu":  # without FP8 the formula describes the CPU path
            computed = activation_bytes(cfg, args.rows, args.length, fp8=fp8, number_bytes=number_bytes)
        facts["cases"][name] = {
            "seconds": spread(seconds_of), "against_bf16": spread(ratios), "kept_bytes": saved, 
            "highest_bytes": highest, "kept_bytes_computed": computed,
        }  # fmt: skip
        ratio = facts["cases"][name]["against_bf16"]
        formula = f" (computed {computed / 2**20:.1f})" if computed else ""
        print(f"{name:15} {spread(seconds_of)['median']:.3f} s, {ratio['median']:.2f} of BF16 "
              f"({ratio['low']:.2f}-{ratio['high']:.2f}); saved for backward {saved / 2**20:.1f} MiB{formula}, "
              f"peak {highest / 2**20:.1f} MiB", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
