"""The exchange of tokens between ranks that share experts: every backend available here, timed and compared.

    python bench/gpu/exchange.py [--ranks 8] [--tokens 4096] [--json FILE]      on the GPUs of this machine
    python bench/gpu/exchange.py --rehearse                                     on a CPU: two processes, small

Each rank sends its tokens to randomly chosen experts and gets them back, changed only by the gate: forward and backward
in BF16, then with rows in FP8. Results and gradients are compared with all-to-all's, bit for bit and by the norm of the
difference. Seconds are medians over rounds of the slowest rank; GB/s count forward rows that leave a rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bessemer.addons.accelerate.precision.fp8_linear import PAPER, FP8Recipe
from bessemer.addons.distributed import mesh
from bessemer.addons.distributed.exchange import Exchange
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.ranks import Ranks
from bessemer.model import moe
from bessemer.model.config import ModelConfig, preset

ROUNDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=0, help="default: a rank for every GPU")
    parser.add_argument("--tokens", type=int, default=0, help="of each rank; default: 4096, in a rehearsal 64")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if Ranks.started():
        return rank(args)
    ranks = args.ranks or (2 if args.rehearse else torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        path = args.json or Path(folder) / "exchange.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        tokens = args.tokens or (64 if args.rehearse else 4096)
        mode = ["--rehearse"] if args.rehearse else []
        ended = subprocess.run([*launch, __file__, "--tokens", str(tokens), "--json", str(path), *mode]).returncode
        if ended:
            sys.exit(ended)
        print(json.dumps(json.loads(path.read_text()), indent=1))


def rank(args: argparse.Namespace) -> None:
    ranks = Ranks.join({}, 120.0)
    facts = compared(ranks, args.tokens, preset("tiny", dim=256) if args.rehearse else preset("v3"), args.rehearse)
    if ranks.me == 0:
        args.json.write_text(json.dumps(facts) + "\n")
    ranks.leave()


def compared(ranks: Ranks, tokens: int, cfg: ModelConfig, rehearse: bool) -> dict[str, Any]:
    """Measures every backend that all ranks can use. Collective."""
    layout = Layout(ep=ranks.n)
    facts: dict[str, Any] = {
        "ranks": ranks.n, "tokens": tokens, "hidden": cfg.dim, "experts": cfg.n_routed_experts,
        "card": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU", "missing": {}, "rows": [],
    }  # fmt: skip
    results: dict[str, list[Tensor]] = {}
    for backend in ("all-to-all", "deepep"):
        unfit = mesh.unfit_for_deepep(layout, cfg, ranks.device) if backend == "deepep" else ""
        if why := next(filter(None, ranks.all_gather(unfit, "the choice of backends")), ""):
            facts["missing"][backend] = why
            continue
        exchange = Mesh(layout, cfg, 1, ranks.device, backend).exchange()
        assert exchange is not None, "several ranks exchange"
        for name, recipe in (("bfloat16", None), ("fp8", PAPER)):
            row = measured(
                ranks, exchange, cfg, tokens, recipe, 3 if rehearse else ROUNDS, results.setdefault(name, [])
            )
            facts["rows"].append({"backend": backend, "rows": name} | row)
    return facts


def measured(
    ranks: Ranks, exchange: Exchange, cfg: ModelConfig, tokens: int, recipe: FP8Recipe | None, rounds: int,
    expected: list[Tensor],
) -> dict[str, Any]:  # fmt: skip
    """A row of the result. `wanted`: results of the first backend, which puts them there."""
    draw = torch.Generator().manual_seed(ranks.me)
    x = torch.randn(tokens, cfg.dim, generator=draw).bfloat16().to(ranks.device).requires_grad_()
    score = torch.rand(tokens, cfg.n_routed_experts, generator=draw)
    weight, expert = (t.to(ranks.device) for t in score.topk(cfg.n_activated_experts, -1))
    weight.requires_grad_()
    dy = torch.randn(tokens, cfg.dim, generator=draw).bfloat16().to(ranks.device)
    routing = moe.Routing(expert, weight, weight.new_zeros(()))
    saved: dict[str, Any] = {}

    def dispatch() -> None:
        saved["sent"] = exchange.dispatch(x, routing, recipe)

    def experts() -> Tensor:
        sent = saved["sent"]
        rows = sent.rows_MD
        if sent.operand is not None:
            rows = rows + sent.operand.dequantise().to(rows.dtype)
        return rows * sent.weight_M[:, None].to(rows.dtype)

    def combine() -> None:
        saved["y"] = exchange.combine(saved["rows"], saved["sent"])

    def backward() -> None:
        x.grad = weight.grad = None
        saved["y"].backward(dy)

    phases: dict[str, list[float]] = {"dispatch": [], "combine": [], "backward": []}
    for number in range(rounds + 2):
        exchange.bytes_sent()
        for phase, run in (("dispatch", dispatch), ("combine", combine), ("backward", backward)):
            if phase == "combine":
                saved["rows"] = experts()
            seconds = timed(ranks, run)
            if number >= 2:
                phases[phase].append(seconds)
    sent = sum(exchange.bytes_sent())
    assert x.grad is not None and weight.grad is not None, "backward reaches tokens and gates"
    results = [saved["y"].detach(), x.grad, weight.grad]
    expected[:] = expected or results
    same = all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    off = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(results, expected, strict=True))
    row: dict[str, Any] = {}
    every = ranks.all_gather((phases, same, off, sent), "the exchange's times")
    for phase in phases:
        slowest = [max(times) for times in zip(*(rank_report[0][phase] for rank_report in every), strict=True)]
        row[f"{phase}_seconds"] = statistics.median(slowest)
    row |= {
        "same_bits": all(rank_report[1] for rank_report in every),
        "off": max(rank_report[2] for rank_report in every),
    }
    return row | {
        "dispatch_gb_per_second": max(rank_report[3] for rank_report in every) / row["dispatch_seconds"] / 1e9
    }


def timed(ranks: Ranks, run: Callable[[], None]) -> float:
    def wait() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    torch.distributed.barrier()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
