"""How good the times are that runs say before and while they run: `python bench/estimates.py`.

    python bench/estimates.py runs/tiny runs/small               what finished runs expected and took, stage by stage
    python bench/estimates.py --on native avx2 --times 3         run a short demo on instruction sets, and compare
    python bench/estimates.py --on native --whole --json bench/results/estimates.json

A run is asked twice. Its first line has the time of the whole run, which should come within 25 % of what it takes, with
an interval for nine runs in ten. Every ten seconds it says how much is left, which is compared with what was left. What
other processes took of the machine during a run is recorded beside it, and so is the ratio of expected to actual
processor seconds of the first process, which other work does not change. No run sees a record of an earlier one
(`plan/record.py`) unless `--again` is given: then every run but the first does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from machine import processor

from bessemer.addons.watch.bars import PLAN
from bessemer.config.units import show_seconds
from bessemer.data.fetch import cache_dir
from bessemer.runs.directory import run_dir, stage_folders
from bessemer.runs.files import read_json

AIM = 0.25
"""Relative error that an estimate should stay within."""
LEAST = 10.0
"""Seconds that a stage must have taken, or a run must have left, to count: below them they matter to nobody."""
SETS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "BESSEMER_KERNELS": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
    "torch": {"BESSEMER_KERNELS": "off"},
    "one-core": {"OMP_NUM_THREADS": "1"},
}  # fmt: skip
"""What a run computes with, as environment variables: all that this processor has, AVX2 alone (MKL and ATen choose for
themselves), torch's own operations, one core."""
SHORT = (
    "corpus.limits.countdown=250K", "corpus.limits.english=50K", "corpus.limits.chinese=50K",
    "corpus.limits.arithmetic=50K", "pretrain.tokens=400K", "pretrain.validate_every=200K",
    'pretrain.lr=[["0",0.0],["80K",6e-3],["400K",1e-3]]', 'pretrain.gamma=[["0",0.001]]',
    'pretrain.mtp_lambda=[["0",0.3],["270K",0.1]]', "zero.rollouts=4", "zero.heldout.every=4",
    "zero.heldout.minimum_pass=0.0", 'zero.max_new_tokens=[["0",80],["4",80],["4",100]]',
    'zero.lr=[["0",0.0],["2",4e-4],["8",1e-4]]', "eval.problems=20", "eval.max_new_tokens=100",
)  # fmt: skip
"""Changes to the demo that leave about a fifteenth of its work, in about the same shares. The limits of length are
lower, too: after so little training answers have about 40 tokens, those of the whole demo about half of their limit."""


def stages_of(root: Path) -> list[dict[str, Any]]:
    """The finished stages of a run: expected and actual seconds, and the relative error."""
    planned = (read_json(root / PLAN) or {}).get("seconds", {})
    rows: list[dict[str, Any]] = []
    for _, name, folder in stage_folders(root):
        done = read_json(folder / "done.json")
        if done is not None and name in planned:
            first, took = float(planned[name]), float(done["seconds"])
            row = {"stage": name, "estimated": first, "took": took, "error": first / max(took, 1e-9) - 1}
            rows.append(row | {"processor": done["cpu_seconds"]})
    return rows


def seconds_of(text: str) -> float:
    """`show_seconds` backwards: "1h 05m", "5m 31s", "9.8s"."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))


def busy_seconds() -> float:
    """Processor seconds of everything on this machine since it started; 0 where the system does not say."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(instructions: str, root: Path, cache: Path, changes: Iterable[str]) -> dict[str, Any]:
    """Runs the demo in `root`, and returns what it said and took."""
    settings = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "bessemer", "run", "tiny", "--out", str(root), *settings]
    environment = os.environ | SETS[instructions] | {"BESSEMER_CACHE": str(cache)}
    load, busy, own, began = os.getloadavg()[0], busy_seconds(), own_seconds(), time.monotonic()
    lines: list[tuple[float, float]] = []
    first = end = began
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            now = time.monotonic()
            if " stages, about " in line:
                first = now
                print(f"{instructions}: {line.strip()}", flush=True)
            if re.match(r"\w+: done \(", line):
                end = now
            if found := re.search(r"· run (.*) left$", line.strip()):
                lines.append((now, seconds_of(found[1])))
    if process.returncode:
        sys.exit(f"{' '.join(command)} exits {process.returncode}")
    plan, stages = read_json(root / PLAN) or {}, stages_of(root)
    interval, processor_seconds = plan["interval"], sum(row["processor"] for row in stages)
    took, wall = end - first, time.monotonic() - began
    others = max(0.0, busy_seconds() - busy - (own_seconds() - own)) / wall / (os.cpu_count() or 1)
    left = [(now, said, end - now) for now, said in lines if end - now >= LEAST]
    return {
        "instructions": instructions, "measuring_seconds": round(first - began, 1), "estimated": interval["likely"],
        "low": interval["low"], "high": interval["high"], "took": round(took, 1),
        "ratio": round(interval["likely"] / took, 3), "inside": interval["low"] <= took <= interval["high"],
        "ratio_processor": round(interval["likely"] * plan["share"] / processor_seconds, 3), "share": plan["share"],
        "load_before": round(load, 2), "others_share": round(others, 2), "stages": stages,
        "left": [
            {"at": round(now - first, 1), "said": said, "was": round(real, 1)} for now, said, real in left
        ],
    }  # fmt: skip


def off(ratios: Iterable[float]) -> dict[str, float]:
    """The ratio that is furthest from 1, and the median of them all, each as a factor of at least 1."""
    factors = [math.exp(abs(math.log(max(ratio, 1e-3)))) for ratio in ratios]
    return {"worst": round(max(factors), 3), "median": round(statistics.median(factors), 3)} if factors else {}


def ran(args: argparse.Namespace) -> None:
    """Runs the demo on every instruction set in turn."""
    runs: list[dict[str, Any]] = []
    earlier = (read_json(args.json) or {}).get("sessions", []) if args.json else []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.times):
            for instructions in args.on:
                cache = Path(scratch) / (f"cache-{instructions}" if args.again else f"cache-{instructions}-{turn}")
                cache.mkdir(exist_ok=True)
                for path in cache_dir(None).iterdir() if cache_dir(None).is_dir() else ():  # kernels, downloads
                    if path.is_dir() and not (cache / path.name).exists():
                        (cache / path.name).symlink_to(path)
                root = Path(scratch) / f"{instructions}-{turn}"
                run = timed(instructions, root, cache, [] if args.whole else SHORT)
                run["lines"] = off(line["said"] / line["was"] for line in run["left"])
                shown = ", ".join(f"{row['stage']} {row['estimated']:.0f}/{row['took']:.0f}" for row in run["stages"])
                print(f"  took {show_seconds(run['took'])}, ratio {run['ratio']}, of processor time "
                      f"{run['ratio_processor']}, others {run['others_share']:.0%}; lines {run['lines']}; {shown}",
                      flush=True)  # fmt: skip
                runs.append(run)
                if args.json:
                    session = {"processor": processor(), "cores": os.cpu_count(), "whole": args.whole,
                               "again": args.again, **near(runs), "runs": runs}  # fmt: skip
                    args.json.write_text(json.dumps({"sessions": [*earlier, session]}, indent=1) + "\n")
    print(f"of {len(runs)} runs: {near(runs)}")


def near(runs: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many first estimates came within 25 %, and how many intervals held the time."""
    return {
        **{f"near_{key}": sum(abs(run[key] - 1) <= AIM for run in runs) for key in ("ratio", "ratio_processor")},
        "inside": sum(run["inside"] for run in runs),
    }


def compared(runs: Iterable[str]) -> dict[str, Any]:
    """Finished runs, stage by stage."""
    facts, close, counted = {}, 0, 0
    for run in runs:
        rows = stages_of(run_dir(run))
        if not rows:
            print(f"{run}: no finished stage with an estimate")
            continue
        sums = {key: sum(row[key] for row in rows) for key in ("estimated", "took")}
        total = sums | {"stage": "in all", "error": sums["estimated"] / max(sums["took"], 1e-9) - 1}
        print(run)
        for row in [*rows, total]:
            estimated, took = show_seconds(row["estimated"]), show_seconds(row["took"])
            print(f"  {row['stage']:<16}{estimated:>10}{took:>10}{100 * row['error']:>+7.0f}%")
        checked = [row for row in [*rows, total] if row["took"] >= LEAST]
        close += sum(abs(row["error"]) <= AIM for row in checked)
        counted += len(checked)
        facts[str(run)] = [*rows, total]
    print(f"within {100 * AIM:.0f} %: {close} of {counted} (stages of {LEAST:g} s or more, and whole runs)")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="finished runs to compare")
    parser.add_argument("--on", nargs="+", choices=SETS, help="run the demo with these")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="the demo itself, not a fifteenth of it")
    parser.add_argument("--again", action="store_true", help="later runs see the record of earlier ones")
    parser.add_argument("--json", type=Path, help="write the figures to this file; runs are added to it")
    args = parser.parse_args()
    if args.on:
        return ran(args)
    facts = compared(args.runs)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
