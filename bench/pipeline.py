"""The bubble of every pipeline schedule, measured on real processes and predicted from its table.

    python bench/pipeline.py --ranks 2 --json bench/results/pipeline_2.json

Every rank is a process with one core that communicates over gloo. A step is forward and backward of all micro-batches
of a network like the preset `tiny` with 7 layers and an MTP module, so that 8 blocks divide evenly over the ranks;
routing is real. The schedules alternate, so that a noisy machine affects all of them. A step lasts from the first
rank's start to the last rank's end, and a rank is idle while it waits for a message. From the median durations of F, B,
I, W and pairs (without waiting), `simulate` predicts the step time and the idle share. The shortest durations predict
the shortest step, which other work on the machine disturbs least.

The benefit of overlap is measured with an artificially slow network: every exchange sleeps for a fixed time, which uses
no core. `serial` waits for it; `beside` computes meanwhile where the table has pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from machine import processor, spread

from bessemer.addons.distributed.chunk import Overlapped, Serial
from bessemer.addons.distributed.executor import Executor, Work
from bessemer.addons.distributed.model_slice import Slice, cut
from bessemer.addons.distributed.schedules import SCHEDULES, schedule
from bessemer.addons.distributed.table import Pair, Step
from bessemer.addons.distributed.timeline import Costs, Timeline, simulate
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.loss import cross_entropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Watched(Executor):
    """Records (begin, end, seconds waited) of every step it executes."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.spans: list[tuple[float, float, float]] = []
        self._waited = 0.0
        receive = self.channels.receive

        def watched(message: Any) -> torch.Tensor:
            began = time.perf_counter()
            x = receive(message)
            self._waited += time.perf_counter() - began
            return x

        self.channels.receive = watched

    def _do(self, step: Step) -> None:
        began, self._waited = time.perf_counter(), 0.0
        super()._do(step)
        self.spans.append((began, time.perf_counter(), self._waited))


@dataclass(frozen=True)
class Measured(Costs):
    """Measured seconds of every kind of step."""

    seconds: dict[Any, float] = field(default_factory=dict)

    def of(self, step: Step) -> float:
        return self.seconds[kind(step)]


def kind(step: Step) -> Any:
    """The key of steps with equal duration: the same work on the same slice, for any micro-batch."""
    if isinstance(step, Pair):
        return kind(step.forward), kind(step.backward)
    return step.kind, step.stage


def slow(base: type, pause: float, *arguments: Any) -> Serial:
    """Streams whose exchanges take `pause` seconds longer."""

    class Slow(base):
        def run(self, exchange, phase, after):
            def paused():
                time.sleep(pause)
                phase()

            return super().run(exchange, paused if exchange else phase, after)

    return Slow(*arguments)


WAYS = {"serial": Serial, "beside": Overlapped}
CFG = preset("tiny", n_layers=7)


def hideable(name: str, pause: float, args: argparse.Namespace) -> float:
    """Seconds of exchanges inside pairs, on the rank with the most of them: an upper bound for overlap."""
    table = schedule(name, args.ranks, args.micro)
    cuts = cut(CFG, table.stages)
    sparse = [sum(i >= CFG.n_dense_layers for i in layers) for layers in cuts]
    sparse[-1] += CFG.n_mtp
    pairs = [[step for step in steps if isinstance(step, Pair)] for steps in table.steps]
    return (
        2 * pause * max(sum(sparse[part.stage] for pair in pairs_of_rank for part in pair) for pairs_of_rank in pairs)
    )


def executor(name: str, rank: int, args: argparse.Namespace, streams: Serial | None = None) -> Watched:
    table = schedule(name, args.ranks, args.micro)
    model = Transformer(CFG).initialise(0).to_compute(DTYPES[args.dtype])
    model.train()
    slices = {(lane, stage): Slice(model, stage, table.stages) for lane, stage in table.slices_on(rank)}
    return Watched(table, rank, slices, [range(args.ranks)], streams=streams)


def work(executor: Executor, args: argparse.Namespace) -> list[list[Work]]:
    generator = torch.Generator().manual_seed(0)

    def loss(out: Any, head: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        total = 1e-4 * out.balance
        for ahead, hidden in enumerate([out.hidden_BTD, *out.mtp_hidden], start=1):
            target = tokens_BT[:, ahead:]
            total = total + cross_entropy(hidden[:, :-1], head, target, torch.ones_like(target))
        return total

    def micro() -> Work:
        tokens_BT = torch.randint(0, 2048, (args.rows, args.length), generator=generator)
        return Work(tokens_BT, None, lambda out, head: loss(out, head, tokens_BT), torch.tensor(1e-4))

    return [[micro() for _ in range(executor.table.per_lane)] for _ in range(executor.table.lanes)]


def step(executor: Watched, batches: list[list[Work]]) -> list[tuple[float, float, float]]:
    for part in executor.slices.values():
        for parameter in part.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    executor.spans.clear()
    dist.barrier()
    executor.run(batches)
    return list(executor.spans)


def on_a_rank(rank: int, store: str, args: argparse.Namespace, answers: Any) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    cases = {name: executor(name, rank, args) for name in args.schedules}
    for pause in args.exchange_ms:
        for name in (name for name in args.schedules if name.startswith("dualpipe")):
            for mode, make in WAYS.items():
                more = (torch.device("cpu"),) * (make is Overlapped)
                cases[f"{name} {mode} {pause:g}"] = executor(name, rank, args, slow(make, pause / 1e3, *more))
    timings: dict[str, list] = {name: [] for name in cases}
    for turn in range(args.turns + 1):
        for name, runner in cases.items():
            spans = step(runner, work(runner, args))
            if turn:  # the first turn warms up
                timings[name].append(spans)
    answers.put((rank, timings))
    dist.barrier()
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> dict[str, list[list]]:
    """Spans by case: [rank][turn] -> list of spans."""
    context = get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=on_a_rank, args=(rank, f"{folder}/store", args, answers))
            for rank in range(args.ranks)
        ]
        for process in processes:
            process.start()
        results = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    return {name: [results[rank][name] for rank in range(args.ranks)] for name in results[0]}


def makespans(ranks: list[list]) -> list[float]:
    turns = zip(*ranks, strict=True)
    return [max(s[-1][1] for s in turn) - min(s[0][0] for s in turn) for turn in turns]


def row(name: str, ranks: list[list], args: argparse.Namespace) -> dict[str, Any]:
    table = schedule(name, args.ranks, args.micro)
    lengths = makespans(ranks)
    idle = []
    for length, turn in zip(lengths, zip(*ranks, strict=True), strict=True):
        busy = sum(end - begin - waited for spans in turn for begin, end, waited in spans)
        idle.append(1 - busy / (length * len(ranks)))
    took: dict[Any, list[float]] = defaultdict(list)
    for steps, turns in zip(table.steps, ranks, strict=True):
        for spans in turns:
            for step_work, (begin, end, waited) in zip(steps, spans, strict=True):
                took[kind(step_work)].append(end - begin - waited)

    def predicted(of: Callable[[list[float]], float]) -> Timeline:
        return simulate(table, Measured(seconds={piece: of(values) for piece, values in took.items()}))

    def share(timeline: Timeline) -> float:
        return sum(timeline.idle) / (timeline.makespan * len(ranks))

    usual, best, unit = predicted(statistics.median), predicted(min), simulate(table)
    return {
        "schedule": name, "stages": table.stages, "seconds": spread(lengths), "idle": spread(idle),
        "predicted_seconds": {"median": usual.makespan, "low": best.makespan},
        "predicted_idle": {"median": share(usual), "low": share(best)}, "idle_of_equal_pieces": share(unit),
        "pieces": {str(item): spread(values) for item, values in sorted(took.items(), key=str)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro", type=int, default=8, help="micro-batches per step")
    parser.add_argument("--rows", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--exchange-ms", nargs="*", type=float, default=[], help="delay per exchange, for dualpipe")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    spans = measure(args)
    rows = [row(name, spans[name], args) for name in args.schedules]
    slowed = []
    for case in (case for case in spans if case.endswith("beside", 0, case.rfind(" "))):
        name, _, pause = case.split()
        serial, beside = (makespans(spans[f"{name} {mode} {pause}"]) for mode in WAYS)
        most = hideable(name, float(pause) / 1e3, args)
        saved = [a - b for a, b in zip(serial, beside, strict=True)]
        slowed.append({
            "schedule": name, "exchange_ms": float(pause), "serial": spread(serial), "beside": spread(beside),
            "inside_pairs": most, "hidden": statistics.median(saved) / most,
        })  # fmt: skip
    about = {
        "processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "ranks": args.ranks,
        "micro_batches": args.micro, "rows": args.rows, "length": args.length, "dtype": args.dtype,
        "routing": "real", "turns": args.turns,
    }  # fmt: skip
    print(f"{about['processor']}, {about['cores']} cores; {args.ranks} ranks of one core over gloo, {args.dtype}")
    print(f"{args.micro} micro-batches of {args.rows} x {args.length} tokens, real routing; medians of {args.turns}\n")
    print(f"{'':14}{'step, ms':>20}{'predicted, ms':>17}{'idle':>8}{'predicted':>11}{'if F = I = W':>14}")
    print(f"{'':14}{'median':>10}{'low':>10}{'median':>9}{'low':>8}")
    for line in rows:
        step_ms, predicted_ms = ({k: 1e3 * v for k, v in line[key].items()} for key in ("seconds", "predicted_seconds"))
        print(
            f"{line['schedule']:14}{step_ms['median']:10.0f}{step_ms['low']:10.0f}{predicted_ms['median']:9.0f}"
            f"{predicted_ms['low']:8.0f}{line['idle']['median']:8.1%}{line['predicted_idle']['median']:11.1%}"
            f"{line['idle_of_equal_pieces']:14.1%}"
        )
    for line in slowed:
        serial, beside, inside = (1e3 * x for x in (*(line[mode]["median"] for mode in WAYS), line["inside_pairs"]))
        print(
            f"\n{line['schedule']}, every exchange {line['exchange_ms']:g} ms longer: {serial:.0f} ms "
            f"serial, {beside:.0f} ms overlapped; {line['hidden']:.0%} of {inside:.0f} ms inside pairs hidden"
        )
    if args.json:
        args.json.write_text(json.dumps({**about, "schedules": rows, "slow_network": slowed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
