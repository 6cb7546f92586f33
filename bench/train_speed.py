"""Training tokens/s of Bessemer against transformers' DeepseekV3ForCausalLM: same config, batch, optimizer and machine.

    python bench/train_speed.py --preset tiny --threads 1
    python bench/train_speed.py --preset small --threads 2 --json bench/results/train_speed_small_2.json

One step is forward, backward, clipping and AdamW. The peer's figure is its best of: eager or compiled; float32,
autocast or bfloat16; every experts implementation. It uses our allocator setting (one case runs without it, for the
record). On several cores the peer uses OpenMP threads, the parallelism it offers; ours uses one process per core.
Neither side trains MTP (the peer cannot); ours is also measured with it. Routing is real (random weights, random
tokens). Each case runs in its own process, and all take a step in turn, so that other work slows them alike; the
figure is the median of the timed steps, and the ratio is also given turn by turn. Where other work shares the cores,
`--first` (Linux, root) times the steps at real-time priority, and the figure is the best of them, since Linux stops
such threads for a twentieth of every second. Without it a single busy process takes a third of two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time

ROWS, LENGTH = 16, 256


@contextlib.contextmanager
def before_others(is_first: bool):
    """A context in which the threads of this process and of its helpers run before all others."""

    def schedule(policy: int, priority: int) -> None:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            processes = [os.getpid(), *map(int, file.read().split())]
        for process in processes:
            for thread in os.listdir(f"/proc/{process}/task"):
                os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    if is_first:
        schedule(os.SCHED_RR, 20)
    yield
    if is_first:
        schedule(os.SCHED_OTHER, 0)


def serve(step, first: bool, facts: dict) -> None:
    """Takes two steps, prints `facts`, then takes a step for every line of standard input and prints its seconds."""
    begin = time.perf_counter()
    step()
    facts["first_step_seconds"] = time.perf_counter() - begin
    step()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        with before_others(first):
            begin = time.perf_counter()
            step()
            seconds = time.perf_counter() - begin
        print(seconds, flush=True)


def ours(preset_name: str, case: dict) -> None:
    import torch

    from bessemer.addons.accelerate import compiling, measured
    from bessemer.config.training import PretrainConfig
    from bessemer.config.units import Points
    from bessemer.data.batch import Batch
    from bessemer.model.accounting import flops_per_token
    from bessemer.model.config import preset
    from bessemer.model.transformer import Transformer
    from bessemer.train import objective, setup
    from bessemer.train.plan import TrainingPlan, constant
    from bessemer.train.trainer import Trainer

    setup.keep_memory()
    with before_others(case["first"]):
        rates = measured.gemm_rates()
    rows, length = case["shape"]
    cfg = preset(preset_name, n_mtp=1 if case["mtp"] else 0, **case["set"])
    model = Transformer(cfg).initialise(0)
    if case["compile"]:
        compiling.compile_layers([*model.layers, *model.mtp])
    dtype = measured.compute_dtype(rates).dtype if case["dtype"] == "auto" else getattr(torch, case["dtype"])

    workers = setup.workers()
    trainer = Trainer(
        model, objective.next_token, None,
        PretrainConfig(kind="pretrain", lr=Points(1e-3), micro_rows=rows),
        TrainingPlan(
            tokens=1, gamma=constant(1e-3), batch_rows=constant(rows),
            terms={"mtp_lambda": constant(0.3 if case["mtp"] else 0.0), "balance_alpha": constant(1e-4)},
            compute_dtype=dtype, workers=workers,
        ),
    )  # fmt: skip
    tokens = torch.randint(0, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    weight = torch.ones(rows, length)
    weight[:, 0] = 0
    micro = list(Batch(tokens, weight).micro(max(1, rows // workers.n)))
    flops = flops_per_token(cfg, length, mtp=case["mtp"]).training
    facts = {"flops_per_token": flops, "gemm": rates, "dtype": str(dtype).removeprefix("torch.")}
    serve(lambda: trainer.update(micro), case["first"], facts)


def peer(preset_name: str, case: dict) -> None:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from bessemer.model.config import preset
    from bessemer.train import setup

    if case["allocator"]:
        setup.keep_memory()
    c = preset(preset_name, **case["set"])
    config = DeepseekV3Config(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.inter_dim,
        moe_intermediate_size=c.moe_inter_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads, n_shared_experts=c.n_shared_experts, n_routed_experts=c.n_routed_experts,
        routed_scaling_factor=c.route_scale, kv_lora_rank=c.kv_lora_rank, q_lora_rank=c.q_lora_rank,
        qk_rope_head_dim=c.qk_rope_head_dim, v_head_dim=c.v_head_dim, qk_nope_head_dim=c.qk_nope_head_dim,
        n_group=c.n_expert_groups, topk_group=c.n_limited_groups, num_experts_per_tok=c.n_activated_experts,
        first_k_dense_replace=c.n_dense_layers, max_position_embeddings=c.max_seq_len, initializer_range=c.init_std,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation=case["experts"]
    )
    if case["dtype"] == "bfloat16":
        model = model.bfloat16()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, c.vocab_size, case["shape"], generator=torch.Generator().manual_seed(0))

    def loss_of(tokens):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    call = torch.compile(loss_of, dynamic=False) if case["compile"] else loss_of

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["dtype"] == "autocast"):
            loss = call(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    serve(step, case["first"], {})


def machine() -> str:
    """The processor's name, or the architecture if the system does not report one."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def cases(quick: bool) -> list[dict]:
    own = [
        {"side": "ours", "compile": c, "mtp": m, "dtype": "auto"}
        for c, m in ((True, False), (False, False), (True, True))
    ]
    grid = itertools.product(("float32", "autocast", "bfloat16"), ("grouped_mm", "eager", "batched_mm"), (True, False))
    peers = [
        {"side": "peer", "dtype": d, "experts": e, "compile": c, "allocator": True}
        for d, e, c in grid
        if e != "batched_mm" or (d == "float32" and not c)  # 20x slower than the others; measured once
    ]
    peers.append({"side": "peer", "dtype": "float32", "experts": "grouped_mm", "compile": False, "allocator": False})
    if quick:
        own = [c for c in own if not c["compile"]]
        peers = [c for c in peers if c["experts"] == "grouped_mm" and c["allocator"] and c["dtype"] != "bfloat16"]
    return own + peers


class Case:
    """One form of one side in a process of its own, which takes a step when told to."""

    def __init__(self, args: argparse.Namespace, case: dict) -> None:
        self.case = {"first": args.first, "shape": [ROWS, LENGTH], "set": {}} | case
        self.tokens = self.case["shape"][0] * self.case["shape"][1]
        self.seconds: list[float] = []
        self.facts: dict = {}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--preset", args.preset, "--case", json.dumps(self.case)],
            env=dict(os.environ, OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.error = "" if line else (self.process.stderr.read().strip().splitlines() or ["failed"])[-1][:200]
        if line:
            self.facts = json.loads(line)

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.seconds.append(float(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    @property
    def rate(self) -> float:
        """Tokens/s of the median step; at real-time priority, of the best one."""
        seconds = min(self.seconds) if self.case["first"] else statistics.median(self.seconds)
        return self.tokens / seconds

    def result(self) -> dict:
        if self.error:
            return {"case": self.case, "error": self.error}
        spread = {"best": self.tokens / min(self.seconds), "worst": self.tokens / max(self.seconds)}
        return {"case": self.case, "tokens_per_second": self.rate, **spread, **self.facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="ours without torch.compile; of the peer's forms only its fastest: grouped experts, float32 and autocast",
    )
    parser.add_argument("--first", action="store_true", help="time the steps at real-time priority")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        case = json.loads(args.case)
        (ours if case["side"] == "ours" else peer)(args.preset, case)
        return
    all_cases = []
    for case in cases(args.quick):
        all_cases.append(Case(args, case))
        print(
            all_cases[-1].error or f"{all_cases[-1].facts['first_step_seconds']:6.1f} s, first step", case, flush=True
        )
    running = [case for case in all_cases if not case.error]
    for _ in range(args.steps):
        for case in running:
            case.step()
    for case in running:
        case.close()
        print(f"{case.rate:9.0f} tokens/s  {case.case}", flush=True)
    best_peer = max((c for c in running if c.case["side"] == "peer"), key=lambda c: c.rate)
    best_ours = max((c for c in running if c.case["side"] == "ours" and not c.case["mtp"]), key=lambda c: c.rate)
    ratios = sorted(peer_seconds / own for own, peer_seconds in zip(best_ours.seconds, best_peer.seconds, strict=True))
    facts = best_ours.facts
    gflops = facts["flops_per_token"] * best_ours.rate / 1e9
    summary = {
        "preset": args.preset, "threads": args.threads, "rows": ROWS, "length": LENGTH, "routing": "real",
        "machine": machine(), "ours": best_ours.rate, "peer": best_peer.rate, "ratio": best_ours.rate / best_peer.rate,
        "ratio_by_turn": {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        "peer_case": best_peer.case, "gemm_gflops": facts["gemm"], "dtype": facts["dtype"], "gflops": gflops,
        "share_of_float32_gemm": gflops / facts["gemm"]["float32"],
        "share_of_bf16_gemm": gflops / facts["gemm"]["bfloat16"],
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"summary": summary, "cases": [case.result() for case in all_cases]}, file, indent=1)


if __name__ == "__main__":
    main()
