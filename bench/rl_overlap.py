"""Is sampling one rollout ahead, concurrently with the updates, faster on two cores? Computed from CPU seconds.

    python bench/rl_overlap.py runs/tiny/02-pretrain --json bench/results/rl_overlap.json

The RL stage of recipes/tiny.toml runs for a few rollouts in one process, with the hook `sample-ahead`. The bench
records the CPU seconds of every item that workers would share (a batch of the Engine, a micro-batch of the trainer or
the reference) and of the remaining work. CPU seconds are used because other work on the machine hardly affects them.
From them follow the times of two schedules:

    sequential   (`after`) sampling on both cores, then the updates on both cores: items are processed in pairs, a pair
                 takes as long as its longer item, and the remaining work takes one core
    concurrent   (`beside`) one core for the sampler, one for the trainer: a rollout takes as long as the slower one

The second needs that hook, hence older samples; it is worth building only if it is clearly shorter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from bessemer.workers import Workers

os.environ["OMP_NUM_THREADS"] = "1"


class Timed(Workers):
    """`Workers` of one process that record the CPU seconds of each item."""

    def __init__(self) -> None:
        self.pieces: list[list[float]] = []

    def map(self, work, items):
        self.pieces.append([])
        for item in items:
            began = time.process_time()
            result = work(item)
            self.pieces[-1].append(time.process_time() - began)
            yield result


def phase(timed: Timed, work):
    """(result, CPU seconds on one core, CPU seconds on two cores with the items shared as `Workers` does)."""
    timed.pieces.clear()
    began = time.process_time()
    result = work()
    total = time.process_time() - began
    shared = sum(sum(pieces) for pieces in timed.pieces)
    pairs = sum(max(pieces[i : i + 2]) for pieces in timed.pieces for i in range(0, len(pieces), 2))
    return result, total, total - shared + pairs


def machine() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a stage that has a model")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from bessemer.config.recipe import Recipe
    from bessemer.rl import loop
    from bessemer.runs.context import StageContext, StopFlag
    from bessemer.runs.metrics import Metrics, StageMetrics
    from bessemer.runs.progress import RunProgress
    from bessemer.train import setup

    recipe = Recipe.load(Path(__file__).parent.parent / "recipes" / "tiny.toml", ['zero.hooks=["sample-ahead"]'])
    timed = Timed()
    setup.workers = lambda: timed
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        metrics = StageMetrics(Metrics(Path(folder) / "metrics.jsonl"), "zero")
        ctx = StageContext("zero", Path(folder), {}, args.base, recipe, Path(folder), metrics,
                           RunProgress({}).begin("zero"), StopFlag())  # fmt: skip
        run = loop.Loop(recipe.stage("zero"), ctx, {})
        run.sampler.open()
        run._start()
        ahead = next(component for component in run.components if component.ahead)
        take = ahead.take
        for number in range(args.rollouts):
            samples, sample_one, sample_two = phase(timed, lambda n=number: take(n))
            ahead.take = lambda n, samples=samples: samples
            _, train_one, train_two = phase(timed, lambda n=number: run._rollout(n))
            if number:  # the first one samples two
                row = {"sample": sample_one, "train": train_one, "after": sample_two + train_two}
                rows.append(row | {"beside": max(sample_one, train_one)})
    mean = {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]}
    result = mean | {"beside_over_after": round(mean["beside"] / mean["after"], 3), "rollouts": len(rows)}
    result |= {"unit": "CPU seconds per rollout", "machine": machine()}
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
