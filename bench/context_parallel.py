"""Memory, processor time and wall time of a training step on long rows, on one rank and split over several ranks.

    python bench/context_parallel.py --json bench/results/context_parallel.json

Every rank is a process with one core that communicates over gloo and runs the real trainer (`Trainer`) on
the preset `tiny`, with rows of random tokens and one row per micro-batch. `highest` is the peak number of bytes that
torch's allocator handed out in a step, not counting weights and optimizer. `cpu_seconds` is the processor time of the
busiest rank, which excludes waiting and other work on the machine. `seconds` is the time from the first rank's start to
the last rank's end, which includes both. The cases alternate.

    python bench/context_parallel.py --against c6e71f72 --lengths 1024 2048 --turns 3 \\
        --json bench/results/context_attention.json

times the attention core alone, forward and backward in processor seconds of one process, against the form that it had
in that commit (tiles of 64 queries in Python), in turn: V2-Lite's 16 heads of 192 and 128, float32, one row. It also
counts the operations of both, since on a GPU each costs the host a launch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from machine import processor, spread
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from bessemer.addons.distributed.collective import trainer_of
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train import balance
from bessemer.train.objective import next_token
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.trainer import Trainer

TERMS = {"mtp_lambda": 0.3, "balance_alpha": 1e-4}


def config() -> tuple[PretrainConfig, TrainingPlan]:
    return PretrainConfig(kind="pretrain", lr=Points(1e-3), micro_rows=1), TrainingPlan(
        tokens=1, gamma=constant(1e-3), batch_rows=constant(1),
        terms={name: constant(value) for name, value in TERMS.items()},
    )  # fmt: skip


def rows(length: int) -> list[Batch]:
    tokens = torch.randint(0, 2048, (1, length), generator=torch.Generator().manual_seed(length))
    loss = torch.ones(1, length)
    loss[:, 0] = 0
    return [Batch(tokens, loss)]


def on_a_rank(rank: int, store: str, cp: int, args: argparse.Namespace, answers: Any, turn: Any) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=cp)
    cfg = preset("tiny", max_seq_len=max(args.lengths))
    shard = ModelShard(Transformer(cfg).initialise(0), Mesh(Layout(cp=cp), cfg), "gpipe")
    training = trainer_of(shard, next_token, None, *config())
    for length in args.lengths:
        training.update(rows(length))
    while (length := turn.get()) is not None:
        dist.barrier()
        began, spent = time.perf_counter(), time.process_time()
        training.update(rows(length))
        ended, spent = time.perf_counter(), time.process_time() - spent
        answers.put((began, ended, spent, highest(training, length)))
    dist.destroy_process_group()


def highest(training: Trainer, length: int) -> int:
    """Peak bytes over the forward and backward passes of one step."""
    with profile(use_cpu=True, profile_memory=True) as profiler:
        training.collective.accumulate(rows(length), TERMS)
    live = most = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    training.optimizer.zero_grad()
    balance.clear(training.gates)
    return most


class World:
    """The processes of one context-parallel degree."""

    def __init__(self, cp: int, folder: str, args: argparse.Namespace) -> None:
        context = get_context("spawn")
        self.answers, self.turns = context.SimpleQueue(), [context.SimpleQueue() for _ in range(cp)]
        self.processes = [
            context.Process(target=on_a_rank, args=(rank, f"{folder}/{cp}", cp, args, self.answers, self.turns[rank]))
            for rank in range(cp)
        ]
        for process in self.processes:
            process.start()

    def step(self, length: int | None) -> list[tuple[float, float, float, int]]:
        for turn in self.turns:
            turn.put(length)
        if length is None:
            for process in self.processes:
                process.join()
            return []
        return [self.answers.get() for _ in self.turns]


def core_of(commit: str) -> Any:
    """The attention core of a commit, as a module beside this one."""
    path = "src/bessemer/addons/distributed/context_attention.py"
    source = subprocess.run(["git", "show", f"{commit}:{path}"], capture_output=True, text=True, check=True).stdout
    module = types.ModuleType("old_context_attention")
    sys.modules[module.__name__] = module  # its dataclasses look there
    exec(compile(source, path, "exec"), module.__dict__)
    return module


class Operations(TorchDispatchMode):
    """Counts operations; on a GPU each is a kernel or more."""

    n = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.n += not operation.is_view
        return operation(*args, **(kwargs or {}))


def operations(form: Any) -> int:
    with Operations() as counter:
        form().sum().backward()
    return counter.n


def against(args: argparse.Namespace) -> dict[str, Any]:
    from bessemer.addons.distributed import context_attention as new

    torch.set_num_threads(1)
    old, cases = core_of(args.against), []
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for length in args.lengths:
            draw = torch.Generator().manual_seed(length)
            shapes = (1, length, 16, 192), (1, length, 576), (16 * 256, 512)
            arguments = [(torch.randn(shape, generator=draw) * 0.05).requires_grad_() for shape in shapes]
            forms = {
                "old": lambda x=arguments, n=length: old.latent_core(
                    *x, 0.07, None, old.Cut(dist.group.WORLD, 1, 0, n // 2)
                ),
                "new": lambda x=arguments, n=length: new.latent_core(*x, 0.07, new.Cut(dist.group.WORLD, 1, 0, n // 2)),
            }
            seconds: dict[str, list[float]] = {name: [] for name in forms}
            for turn in range(args.turns + 1):
                for name, form in forms.items():
                    began = time.process_time()
                    form().sum().backward()
                    if turn:
                        seconds[name].append(time.process_time() - began)
            ratios = [a / b for a, b in zip(seconds["old"], seconds["new"], strict=True)]
            calls = {name: operations(form) for name, form in forms.items()}
            times = {name: spread(spent) for name, spent in seconds.items()}
            cases.append({"length": length, "operations": calls, **times, "ratio": spread(ratios)})
            speed = f"{statistics.median(ratios):.2f} times as fast, {min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{length:>6} tokens: {speed}; {calls['old']} operations before, {calls['new']} now")
        dist.destroy_process_group()
    return {"against": args.against, "dtype": "float32", "heads": 16, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.against:
        facts = {"processor": processor(), "torch": torch.__version__, "turns": args.turns, **against(args)}
        if args.json:
            args.json.write_text(json.dumps(facts, indent=1) + "\n")
        return
    runs: dict[tuple[int, int], list] = {(n, length): [] for length in args.lengths for n in args.ranks}
    with tempfile.TemporaryDirectory() as folder:
        worlds = {n: World(n, folder, args) for n in args.ranks}
        for _ in range(args.turns):
            for n, length in runs:
                runs[n, length].append(worlds[n].step(length))
        for world in worlds.values():
            world.step(None)
    cases = []
    for (n, length), turns in runs.items():
        seconds = [max(end for _, end, *_ in ranks) - min(begin for begin, *_ in ranks) for ranks in turns]
        spent = [max(rank[2] for rank in ranks) for ranks in turns]
        most = max(rank[3] for ranks in turns for rank in ranks)
        cases.append({"cp": n, "length": length, "highest_mib": round(most / 2**20, 1), "cpu_seconds": spread(spent),
                      "seconds": spread(seconds)})  # fmt: skip
        print(
            f"{length:>6} tokens, cp {n}: peak {most / 2**20:7.1f} MiB a rank, "
            f"{statistics.median(spent):6.2f} s processor time, {statistics.median(seconds):6.2f} s wall time"
        )
    if args.json:
        facts = {"processor": processor(), "torch": torch.__version__, "turns": args.turns, "cases": cases}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
