"""What a training step costs with every tracker on: TensorBoard, wandb (offline), MLflow and trackio beside `tiny`.

    python bench/trackers.py [--rounds 3] [--json bench/results/trackers.json]

The recipe's pre-training runs as a user starts it, with trackers and without in turn; both sides read the same corpus.
Step times are those of metrics.jsonl between two steps, after the trackers have started. What the trackers spend is
read from the system: the processor time of their process and of all that it started, which other work hardly affects.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from machine import processor

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
FIRST, LAST = 120, 320
"""First and last step measured; before them the trackers import their libraries and create their databases."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        subprocess.run(command(corpus, "--until", "corpus"), check=True, stderr=subprocess.DEVNULL)
        for number in range(args.rounds):
            row = {}
            for arm, names in (("without", ()), ("with", NAMES)):
                root = Path(folder) / f"{arm}-{number}"
                row[arm] = measure(root, corpus, names)
            rounds.append(row)
            print(json.dumps(row), flush=True)
    shares = [row["with"]["tracker_seconds"] / row["with"]["seconds"] for row in rounds]
    ratios = [row["with"]["seconds"] / row["without"]["seconds"] for row in rounds]
    results = {
        "machine": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "steps": LAST - FIRST,
        "step_seconds": statistics.median(row["without"]["seconds"] for row in rounds),
        "trackers_share_of_a_core": statistics.median(shares),
        "ratio_of_step_times": sorted(ratios),
        "rounds": rounds,
    }
    print(json.dumps({key: value for key, value in results.items() if key != "rounds"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def command(root: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "bessemer", "run", "tiny", "--out", str(root), *more]


def measure(root: Path, corpus: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Median seconds of a step, and the trackers' processor seconds a step."""
    trackers = ("--set", f"trackers={json.dumps(names)}")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1"}
    environment |= {"TRACKIO_DIR": str(root / "trackio"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        command(root, "--reuse", str(corpus), "--until", "pretrain", *trackers),
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(process, root, FIRST)
        before = spent(root)
        wait_for(process, root, LAST)
        after = spent(root)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
    times = [moment for step, moment in steps(root) if FIRST <= step <= LAST]
    seconds = statistics.median(b - a for a, b in pairwise(times))
    return {"seconds": seconds, "tracker_seconds": (after - before) / (LAST - FIRST), "tracker_total": after}


def steps(root: Path) -> Iterator[tuple[int, float]]:
    for text in (root / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["stage"] == "pretrain" and "train/loss" in line["values"]:
            yield line["step"], line["time"]


def wait_for(process: subprocess.Popen, root: Path, step: int) -> None:
    sign = f'"stage":"pretrain","step":{step},'
    while not (root / "metrics.jsonl").is_file() or sign not in (root / "metrics.jsonl").read_text():
        if process.poll() is not None:
            raise SystemExit(f"the run ended before step {step}")
        time.sleep(0.5)


def spent(root: Path) -> float:
    """Processor seconds of the session of the run's trackers: their process, its children, and those already reaped."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended a moment ago
        stats[int(path.name)] = (int(fields[3]), sum(map(int, fields[11:15])), words)
    sessions = {
        pid for pid, (_, _, words) in stats.items() if "bessemer.addons.watch.trackers" in words and str(root) in words
    }
    return sum(ticks for session, ticks, _ in stats.values() if session in sessions) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
