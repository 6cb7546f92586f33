"""C++ kernels against the torch code they replace: single operations, whole training steps and decoding, by size.

    python bench/kernels.py --threads 1 --json bench/results/kernels.json
    python bench/kernels.py --only curves --dtype bfloat16
    python bench/kernels.py --only profile --dtype bfloat16 --optimizer muon

Both sides run in one process, one call of each in turn, so that other work on the machine slows both; figures are the
best of `--repeats` calls by processor time (one thread), or by the clock (more). Routing is real: random weights,
random tokens. "step" is forward, backward, clipping and AdamW of 4,096 tokens; "decode" is one step of the engine's
network, with the cache, without sampling.

"profile" lists where the processor time of a whole step goes, part by part, with the kernels of BESSEMER_KERNELS if it
is set: the share that a part's matrix products reach of the fastest product measured on the same core, and what would
be saved if all of them did.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from machine import processor
from torch import Tensor

from bessemer.addons.accelerate.kernel_steps import KernelSteps
from bessemer.addons.accelerate.kernels import deferred, library
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.engine.decode import TorchSteps
from bessemer.engine.steps import PrefillChunk
from bessemer.model.accounting import attention_params, embedding_params, flops_per_token
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


def trainer_of(
    cfg: ModelConfig, dtype: torch.dtype, rows: int, length: int, optimizer: str = "adamw"
) -> tuple[Trainer, list[Batch]]:
    """A trainer on this process alone, and one micro-batch."""
    trainer = Trainer(
        Transformer(cfg).initialise(0), objective.next_token, None,
        PretrainConfig(kind="pretrain", lr=Points(1e-3), micro_rows=rows, optimizer=optimizer),
        TrainingPlan(
            tokens=1, gamma=constant(1e-3), batch_rows=constant(rows), compute_dtype=dtype, workers=Workers(),
            terms={"mtp_lambda": constant(0.0), "balance_alpha": constant(1e-4)},
        ),
    )  # fmt: skip
    weight = torch.ones(rows, length)
    weight[:, 0] = 0
    return trainer, list(Batch(torch.randint(0, cfg.vocab_size, (rows, length)), weight).micro(rows))


def step(cfg: ModelConfig, dtype: torch.dtype, rows: int, length: int) -> Callable[[], object]:
    trainer, micro = trainer_of(cfg, dtype, rows, length)
    return lambda: trainer.update(micro)


PARTS = {
    "_LatentAttention": "attention core", "_Experts": "experts and FFNs", "_ChunkedCrossEntropy": "head and loss",
    "Product": "plain matrices", "_CPUNorm": "norms", "_Routing": "gates",
}  # fmt: skip
"""Parts of a step by the names of the functions that compute them, forward and backward."""


class Shares:
    """Processor time by part, ms, while the functions of `PARTS` run on this thread."""

    def __init__(self) -> None:
        self.ms: Counter[str] = Counter()

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            begin = time.thread_time()
            try:
                return work(*arguments)
            finally:
                self.ms[part] += 1e3 * (time.thread_time() - begin)

        return function

    @contextmanager
    def watched(self, trainer: Trainer) -> Iterator[None]:
        """Times the parts of `trainer`'s steps inside."""
        with ExitStack() as undo:
            for function in torch.autograd.Function.__subclasses__():
                if part := PARTS.get(function.__name__):
                    for name in ("forward", "backward"):
                        work = getattr(function, name)
                        undo.callback(setattr, function, name, staticmethod(work))
                        setattr(function, name, staticmethod(self.timed(part, work)))
            undo.callback(setattr, trainer.optimizer, "step", trainer.optimizer.step)
            trainer.optimizer.step = self.timed("optimizer", trainer.optimizer.step)  # type: ignore[method-assign]
            yield


def gflop_of(cfg: ModelConfig, tokens: int, length: int) -> dict[str, float]:
    """GFLOP of the parts of a step, without MTP."""
    flops = flops_per_token(cfg, length)
    plain, head = (6 * n for n in (cfg.n_layers * attention_params(cfg), embedding_params(cfg)))
    gates = 6 * (cfg.n_layers - cfg.n_dense_layers) * cfg.n_routed_experts * cfg.dim
    of_token = {
        "attention core": 3 * flops.attention, "plain matrices": plain, "head and loss": head, "gates": gates,
        "experts and FFNs": 3 * flops.matmul - plain - head - gates,
    }  # fmt: skip
    return {part: tokens * n / 1e9 for part, n in of_token.items()}


def fastest_product(dtype: torch.dtype) -> float:
    """GFLOPS on this thread of the fastest product, torch's or the kernels', of matrices that stay in the cache."""
    a, b, c = (torch.randn(n, n).to(t) for n, t in ((256, dtype), (256, dtype), (256, torch.float32)))
    ways = (
        lambda: torch.mm(a, b.t()),
        lambda: library.call(
            f"product_{library.DTYPES[dtype]}", "iiipiipiipiii", 256, 256, 256, a, 256, 1, b, 1, 256, c, 256, 0, 1
        ),
    )
    best = 0.0
    for way in ways:
        for _ in range(20):
            begin = time.thread_time()
            for _ in range(10):
                way()
            best = max(best, 10 * 2 * 256**3 / (time.thread_time() - begin) / 1e9)
    return best


def profile(cfg: ModelConfig, dtype: torch.dtype, optimizer: str, repeats: int) -> dict[str, Any]:
    """Processor time of a step's parts on one thread, ms, the median over `repeats` steps, and their GFLOP."""
    length, rows = 256, TOKENS // 256
    trainer, micro = trainer_of(cfg, dtype, rows, length, optimizer)
    deferred.Store().serve(trainer.model)  # plain matrices in a function of their own, which multiplies as before
    trainer.update(micro)
    steps, parts = [], []
    for _ in range(repeats):
        shares, begin = Shares(), time.process_time()
        with shares.watched(trainer):
            trainer.update(micro)
        steps.append(1e3 * (time.process_time() - begin))
        parts.append(shares.ms | {"the rest": steps[-1] - shares.ms.total()})
    rate, gflop = fastest_product(dtype), gflop_of(cfg, TOKENS, length)
    step_ms = statistics.median(steps)
    ms = {part: statistics.median(taken[part] for taken in parts) for part in parts[0]}
    at_rate = sum(max(0.0, ms[part] - 1e3 * n / rate) for part, n in gflop.items())
    share = {part: 1e3 * n / ms[part] / rate for part, n in gflop.items()}
    return {
        "step_ms": step_ms, "tokens_per_second": 1e3 * TOKENS / step_ms, "fastest_product_gflops": rate,
        "share_of_it": sum(gflop.values()) / step_ms * 1e3 / rate, "left_in_products_ms": at_rate,
        "parts": {part: {"ms": ms[part], "gflop": gflop.get(part), "share": share.get(part)} for part in ms},
    }  # fmt: skip


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
    parser.add_argument("--only", choices=["operations", "curves", "decode", "profile"])
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"], help="of the profile")
    parser.add_argument("--presets", nargs="*", default=["tiny", "small"], help="of the profile")
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

    with kernels(os.environ.get(library.VARIABLE, "auto") if args.only == "profile" else "auto"):
        print(f"{processor()}, {args.threads} thread(s), {args.dtype}, kernels: {library.status().why}", flush=True)
    for name in args.presets if args.only == "profile" else ():
        shown = profile(preset(name, n_mtp=0), dtype, args.optimizer, args.repeats)
        results.append({"group": "profile", "what": name, "optimizer": args.optimizer, **shown})
        print(f"{name}: {shown['step_ms']:.0f} ms a step, {shown['tokens_per_second']:,.0f} tokens/s, "
              f"{shown['share_of_it']:.0%} of {shown['fastest_product_gflops']:.0f} GFLOPS; products at that rate "
              f"would save {shown['left_in_products_ms']:.0f} ms")  # fmt: skip
        for part, of in shown["parts"].items():
            share = f"{of['gflop']:6.1f} GFLOP, {of['share']:.0%}" if of["gflop"] else ""
            print(f"    {part:18} {of['ms']:8.1f} ms  {share}", flush=True)
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
