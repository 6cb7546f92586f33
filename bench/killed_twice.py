"""Kills a run twice with SIGKILL, restarts it with the same command, and compares its output with a run never killed.

    bessemer run recipes/tiny.toml --out runs/tiny                          (a run never killed)
    python bench/killed_twice.py recipes/tiny.toml --like runs/tiny --out runs/killed

The kill happens when a stage has logged the given number of steps (`--kill STAGE:STEPS`, by default in the middle of
pre-training and of RL). Weights, rollouts and evaluation results must be equal byte for byte, and metrics must be equal
except for seconds and speeds.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from same_run import differences, metric_lines


def logged(out: Path, stage: str) -> int:
    return max((line["step"] for line in metric_lines(out) if line["stage"] == stage), default=0)


def run(recipe: Path, out: Path, kill: tuple[str, int] | None, log) -> None:
    """Runs to the end, or until the kill."""
    command = [sys.executable, "-m", "bessemer", "run", str(recipe), "--out", str(out)]
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            time.sleep(1)
            if kill is not None and logged(out, kill[0]) >= kill[1]:
                os.kill(process.pid, signal.SIGKILL)
                break
    if kill is None:
        assert process.returncode == 0, f"the run exited with {process.returncode}: see the log"
    else:
        assert process.returncode == -signal.SIGKILL, f"the run exited ({process.returncode}) before it reached {kill}"
        print(f"killed in {kill[0]} at step {logged(out, kill[0])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--like", type=Path, required=True, help="finished run of the same recipe, never killed")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--kill", action="append", metavar="STAGE:STEPS", help="default: in the middle of the stages")
    args = parser.parse_args()
    assert not args.out.exists(), f"{args.out} exists; choose another --out"
    kills = [(k.partition(":")[0], int(k.partition(":")[2])) for k in args.kill or ()]
    kills = kills or [(stage, logged(args.like, stage) // 2) for stage in ("pretrain", "zero")]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out.with_name(args.out.name + ".log"), "w") as log:
        for kill in [*kills, None]:
            run(args.recipe, args.out, kill, log)
    if differing := differences(args.like, args.out):
        print(*differing, sep="\n")
        sys.exit(1)
    print("identical, bit for bit")


if __name__ == "__main__":
    main()
