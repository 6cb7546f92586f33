"""What staleness costs: the RL stage of recipes/tiny.toml with 0, 1, 2, 4 and 8 rollouts in flight, on three seeds.

    bessemer run tiny --until pretrain
    python bench/staleness.py runs/tiny                 # --rollouts N: fewer than the recipe's 24

Every cell (staleness, seed) is a run of its own from the same base, with the hook "sample-ahead" and, beside it,
"correction" (token-truncate), which also the cells without staleness have. A finished cell is a file of
bench/results/staleness; it is not run again, and an interrupted one goes on. The table is bench/results/staleness.json:
held-out reward at the end and in the mean of the run's evaluations, the sampler's gap (nats per token) and KL in the
second half, and how many optimizer steps old the samples are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULT, CELLS = HERE / "results" / "staleness.json", HERE / "results" / "staleness"
STALENESS, SEEDS = (0, 1, 2, 4, 8), (1, 2, 3)
CORRECTION = '{name="correction", form="token-truncate"}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a run of tiny with the stage pretrain")
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=[], help="cells such as 4-2 (staleness 4, seed 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/staleness"))
    given = parser.parse_args()
    CELLS.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:  # a whole row of the table first
        for most in STALENESS:
            if not given.only or f"{most}-{seed}" in given.only:
                measured(most, seed, given.base, given.rollouts, given.runs)
                write_table()


def measured(most: int, seed: int, base: Path, rollouts: int, runs: Path) -> None:
    """Runs a cell, unless its result is there."""
    name = f"rollouts-{rollouts}-staleness-{most}-seed-{seed}"
    cell = CELLS / f"{name}.json"
    if cell.is_file():
        return
    ahead = [f'{{name="sample-ahead", max_off_policy_rollouts={most}}}'] if most else []
    changes = {
        "zero.hooks": f"[{', '.join([*ahead, CORRECTION])}]", "zero.rollouts": rollouts, "zero.seed": seed,
        "zero.precision": "float32", "zero.heldout.every": max(1, rollouts // 4), "zero.heldout.problems": 64,
    }  # fmt: skip
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "bessemer", "run", "tiny", "--out", str(runs / name), "--reuse", str(base)]
    subprocess.run([*command, "--until", "zero", *sets], check=True)
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    values = [line["values"] for line in lines if line["stage"] == "zero"]
    late = [line for line in values if "rl/sampler_gap" in line][rollouts // 2 :]
    heldout = [line["rl/heldout_reward"] for line in values if "rl/heldout_reward" in line]
    accuracy = [line["rl/heldout_accuracy"] for line in values if "rl/heldout_accuracy" in line]
    facts = {
        "staleness": most, "seed": seed, "rollouts": rollouts, "heldout_reward": heldout,
        "heldout_accuracy": accuracy, "steps_old": statistics.fmean(line["rl/staleness"] for line in late),
        **{name: statistics.fmean(line[f"rl/{name}"] for line in late)
           for name in ("sampler_gap", "sampler_kl", "correction_weight", "correction_cut", "clip_share")},
    }  # fmt: skip
    cell.write_text(json.dumps(facts, indent=1) + "\n")


def write_table() -> None:
    """Means over the seeds of all finished cells, with the lowest and the highest."""
    cells = [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]
    table = []
    for rollouts, most in sorted({(cell["rollouts"], cell["staleness"]) for cell in cells}):
        same = [cell for cell in cells if (cell["rollouts"], cell["staleness"]) == (rollouts, most)]
        columns = {
            "heldout_reward_start": [cell["heldout_reward"][0] for cell in same],
            "heldout_reward_end": [cell["heldout_reward"][-1] for cell in same],
            "heldout_reward_mean": [statistics.fmean(cell["heldout_reward"][1:]) for cell in same],
            **{name: [cell[name] for cell in same] for name in ("steps_old", "sampler_gap", "sampler_kl")},
        }
        row = {name: [round(f(values), 5) for f in (statistics.fmean, min, max)] for name, values in columns.items()}
        table.append({"rollouts": rollouts, "staleness": most, "seeds": sorted(cell["seed"] for cell in same)} | row)
    RESULT.write_text(json.dumps({"columns": "mean, lowest and highest of the seeds", "rows": table}, indent=1) + "\n")
    for row in table:
        reward, gap = row["heldout_reward_end"], row["sampler_gap"]
        print(
            f"{row['staleness']} ahead, {len(row['seeds'])} seeds: held-out reward {reward[0]:.3f} "
            f"({reward[1]:.3f} to {reward[2]:.3f}), gap {gap[0]:.4f} nats"
        )


if __name__ == "__main__":
    main()
