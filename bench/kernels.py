"""C++ kernels against the torch code they replace: single operations, whole training steps and decoding, by size.

    python bench/kernels.py --threads 1 --json bench/results/kernels.json
    python bench/kernels.py --only curves --dtype bfloat16

Both sides run in one process, one call of each in turn, so that other work on the machine slows both; figures are the
best of `--repeats` calls by processor time (one thread), or by the clock (more). Routing is real: random weights,
random tokens. "step" is forward, backward, clipping and AdamW of 4,096 tokens; "decode" is one step of the engine's
network, with the cache, without sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from machine import processor
from torch import Tensor

from bessemer.addons.accelerate.kernel_steps import KernelSteps
from bessemer.addons.accelerate.kernels import library
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.engine.decode import TorchSteps
from bessemer.engine.steps import PrefillChunk
from bessemer.model.config import ModelConfig, preset
from bessemer.model.moe import FFN
from bessemer.model.norm import RMSNorm
from bessemer.model.transformer import Transformer
from bessemer.train import loss, objective, setup, update_rules
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

TOKENS = 4096
CURVES = {
    "length": [{"length": n} for n in (128, 256, 512, 1024, 2048, 4096)],
    "width": [{"dim": d, "n_heads": d // 32} for d in (128, 256, 512)],
    "experts": [{"n_routed_experts": n} for n in (8, 16, 32, 64, 128, 256)],
    "rows": [{"rows": n} for n in (1, 2, 4, 8, 16)],
}


@contextmanager
def kernels(setting: str) -> Iterator[None]:
    """BESSEMER_KERNELS=setting inside."""
    os.environ[library.VARIABLE] = setting
    library.forget()
    yield


class Meter:
    """The best time of a call on both sides, in milliseconds."""

    def __init__(self, repeats: int, clock: Callable[[], float]):
        self.repeats, self.clock = repeats, clock

    def __call__(self, work: Callable[[], object]) -> dict[str, float]:
        best = {"torch": float("inf"), "kernels": float("inf")}
        for turn in range(self.repeats + 1):
            for side, setting in (("torch", "off"), ("kernels", "auto")):
                with kernels(setting):
                    library.available()  # loaded for the new setting, outside the measurement
                    begin = self.clock()
                    work()
                    if turn:
                        best[side] = min(best[side], 1e3 * (self.clock() - begin))
        return best | {"ratio": best["torch"] / best["kernels"]}


def there_and_back(module: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    def work() -> None:
        result = module(*inputs)
        result.backward(torch.ones_like(result))

    return work


def operations(cfg: ModelConfig, dtype: torch.dtype, length: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of the parts of one layer on TOKENS tokens."""
    model = Transformer(cfg).initialise(0).to_compute(dtype).train()
    layer, rows = model.layers[-1], TOKENS // length
    x = torch.randn(rows, length, cfg.dim).to(dtype).requires_grad_()
    rope = model.rope_table(length)
    hidden = torch.randn(TOKENS, cfg.dim).to(dtype).requires_grad_()
    head = model.head.weight
    target, ones = torch.randint(0, cfg.vocab_size, (TOKENS,)), torch.ones(TOKENS)
    norm, ffn = RMSNorm(cfg.dim, 1e-6), FFN(cfg.dim, cfg.inter_dim).to(dtype)
    matrices = torch.randn(cfg.n_routed_experts, cfg.moe_inter_dim, cfg.dim)

    def moe(x_BTD: Tensor) -> Tensor:
        attended = layer.route(x_BTD)
        return layer.feed_forward(attended)

    return {
        "RMSNorm": there_and_back(norm, x),
        "attention with its projections": there_and_back(lambda x: layer.attn(x, rope), x),
        "gate": there_and_back(lambda x: layer.sparse_ffn.gate(x.flatten(0, 1), rows).weight_NK, x),
        "norm, gate, experts and shared expert": there_and_back(moe, x),
        "dense FFN": there_and_back(ffn, x),
        "head and cross entropy": there_and_back(lambda h: loss.cross_entropy(h, head, target, ones), hidden),
        "head and log-probabilities": there_and_back(lambda h: loss.token_logprobs(h, head, target).logp, hidden),
        "Muon, one layer's experts": lambda: update_rules.orthogonalise_([matrices], dtype),
    }


def step(cfg: ModelConfig, dtype: torch.dtype, rows: int, length: int) -> Callable[[], object]:
    trainer = Trainer(
        Transformer(cfg).initialise(0), objective.next_token, None,
        PretrainConfig(kind="pretrain", lr=Points(1e-3), micro_rows=rows),
        TrainingPlan(
            tokens=1, gamma=constant(1e-3), batch_rows=constant(rows), compute_dtype=dtype, workers=Workers(),
            terms={"mtp_lambda": constant(0.0), "balance_alpha": constant(1e-4)},
        ),
    )  # fmt: skip
    weight = torch.ones(rows, length)
    weight[:, 0] = 0
    micro = list(Batch(torch.randint(0, cfg.vocab_size, (rows, length)), weight).micro(rows))
    return lambda: trainer.update(micro)


@torch.inference_mode()
def decoding(cfg: ModelConfig, dtype: torch.dtype, rows: int, length: int) -> Callable[[], object]:
    """One step of `rows` rows with `length` cached tokens each."""
    model = Transformer(cfg).initialise(0).to_compute(dtype).eval()
    torchs = TorchSteps(model)
    cache = torchs.new_cache()
    prompt = cache.open([5] * length)
    cache.extend(prompt, length)
    torchs.prefill(cache, [PrefillChunk(prompt, length)])
    cache.admit([(prompt, rows)])
    tokens, positions = torch.randint(0, cfg.vocab_size, (rows,)), torch.full((rows,), length)

    steps_of = {}
    for setting in ("off", "auto"):
        with kernels(setting):
            steps_of[setting] = KernelSteps.of(model) or torchs

    @torch.inference_mode()
    def work() -> object:
        return steps_of[os.environ[library.VARIABLE]].forward(tokens.unsqueeze(1), positions, cache)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["operations", "curves", "decode"])
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()
    setup.keep_memory()
    torch.set_num_threads(args.threads)
    meter = Meter(args.repeats, time.process_time if args.threads == 1 else time.perf_counter)
    dtype, results = getattr(torch, args.dtype), []

    def report(group: str, what: str, work: Callable[[], object], tokens: int = 0) -> None:
        timing = meter(work)
        results.append({"group": group, "what": what, **timing})
        rate = f", {1e3 * tokens / timing['kernels']:9,.0f} tokens/s" if tokens else ""
        print(f"{group:12} {what:38} {timing['torch']:9.3f} -> {timing['kernels']:9.3f} ms, "
              f"{timing['ratio']:.2f}x{rate}", flush=True)  # fmt: skip

    with kernels("auto"):
        print(f"{processor()}, {args.threads} thread(s), {args.dtype}, kernels: {library.status().why}", flush=True)
    for name in ("tiny", "small") if args.only in (None, "operations") else ():
        for what, work in operations(preset(name, n_mtp=0), dtype, 256).items():
            report(name, what, work)
    for curve, points in CURVES.items() if args.only in (None, "curves") else ():
        for point in points:
            point = dict(point)
            length = point.pop("length", 256)
            rows = point.pop("rows", TOKENS // length)
            cfg = preset("tiny", n_mtp=0, max_seq_len=4096, **point)
            what = ", ".join(f"{k} {v}" for k, v in point.items()) or f"{rows} rows of {length}"
            report(curve, what, step(cfg, dtype, rows, length), rows * length)
    for name in ("tiny", "small") if args.only in (None, "decode") else ():
        for rows, length in ((1, 64), (1, 450), (8, 128), (32, 128), (64, 128), (128, 128), (128, 450), (512, 128)):
            work = decoding(preset(name, n_mtp=0), dtype, rows, length)
            report(f"{name} decode", f"{rows} rows, {length} cached tokens each", work, rows)
    if args.json:
        report_ = {
            "machine": processor(), "threads": args.threads, "dtype": args.dtype, "routing": "real",
            "kernels": library.status().why, "results": results,
        }  # fmt: skip
        with open(args.json, "w") as file:
            json.dump(report_, file, indent=1)


if __name__ == "__main__":
    main()
