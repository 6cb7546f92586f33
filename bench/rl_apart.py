"""Seconds per RL step with a separate rollout worker (`rollout.engine = "ray"`) against the same run in one process.

    bessemer run recipes/tiny.toml --until pretrain --out runs/tiny
    python bench/rl_apart.py runs/tiny/02-pretrain --json bench/results/rl_apart.json

The RL stage of recipes/tiny.toml runs for a few rollouts with the hook `sample-ahead`. "here" alternates sampling
and updates on all cores; "ray" runs the worker on one core and the trainer on the others, concurrently. Both give the
same bits. The first two rollouts of a run are excluded, because processes start during them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import processor, spread

ENGINES = {"here": [], "ray": ["zero.rollout.engine=ray"]}
SHARES = ("rl/trainer_waited", "rl/workers_waited", "rl/handover_seconds")
LEFT_OUT = 2


def stage(base: Path, engine: str, rollouts: int) -> dict[str, float]:
    """Runs the stage once in this process."""
    from bessemer.config.recipe import Recipe
    from bessemer.rl import loop
    from bessemer.runs.context import StageContext, StopFlag
    from bessemer.runs.metrics import Metrics, StageMetrics
    from bessemer.runs.progress import RunProgress

    changes = ['zero.hooks=["sample-ahead"]', f"zero.rollouts={rollouts}", "zero.save_seconds=9999",
               "zero.heldout={every=99, minimum_pass=0.0, problems=4}", *ENGINES[engine]]  # fmt: skip
    recipe = Recipe.load(Path(__file__).parent.parent / "recipes" / "tiny.toml", changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        ctx = StageContext("zero", Path(folder), {}, base, recipe, Path(folder), StageMetrics(Metrics(path), "zero"),
                           RunProgress({}).begin("zero"), StopFlag())  # fmt: skip
        loop.Loop(recipe.stage("zero"), ctx, {}).run()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "rl/reward" in line["values"]]
    seconds = lines[-1]["time"] - lines[LEFT_OUT - 1]["time"]
    counted = lines[LEFT_OUT:]
    steps = counted[-1]["step"] - lines[LEFT_OUT - 1]["step"]
    result = {"seconds_per_step": seconds / steps}
    means = {name: statistics.mean(line["values"][name] for line in counted) for name in ("rl/reward", "rl/length")}
    shares = {name: [line["values"][name] for line in counted if name in line["values"]] for name in SHARES}
    return result | means | {name: statistics.mean(values) for name, values in shares.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a stage that has a model")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="do one run in this process and print it as JSON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(stage(args.base, args.engine, args.rollouts)))
        return
    runs = {engine: [] for engine in ENGINES}
    for _ in range(args.repeats):
        for engine, runs_of in runs.items():
            command = [sys.executable, __file__, str(args.base), "--rollouts", str(args.rollouts), "--engine", engine]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs_of.append(json.loads(done.stdout.splitlines()[-1]) | {"load": round(os.getloadavg()[0], 2)})
            print(engine, runs_of[-1], file=sys.stderr, flush=True)
    result = {engine: spread([run["seconds_per_step"] for run in runs_of]) for engine, runs_of in runs.items()}
    pairs = zip(runs["ray"], runs["here"], strict=True)
    result["ray_over_here"] = spread([ray["seconds_per_step"] / local["seconds_per_step"] for ray, local in pairs])
    result |= {"unit": "seconds per optimizer step", "machine": processor(), "cores": len(os.sched_getaffinity(0))}
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
