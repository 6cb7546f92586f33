"""How good the first estimates of runs were: `python bench/estimates.py RUN...`.

A run's plan.json holds what each stage was estimated to take before it began, its done.json what it took. Prints both,
stage by stage and in all, and how many stages came within 25 %. Nothing is measured: run it on a machine that was quiet
while the runs ran.

    python bench/estimates.py runs/tiny
    python bench/estimates.py runs/* --json estimates.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bessemer.addons.watch.bars import PLAN
from bessemer.config.units import show_seconds
from bessemer.runs.directory import run_dir, stage_folders
from bessemer.runs.files import read_json

AIM = 0.25
"""Relative error that an estimate should stay within."""
LEAST = 5.0
"""Seconds that a stage must have taken to count: below them the clock matters to nobody."""


def compared(root: Path) -> list[dict[str, Any]]:
    """The finished stages of a run: estimated and actual seconds, and the relative error."""
    planned = (read_json(root / PLAN) or {}).get("seconds", {})
    rows = []
    for _, name, folder in stage_folders(root):
        done = read_json(folder / "done.json")
        if done is not None and name in planned:
            first, took = float(planned[name]), float(done["seconds"])
            rows.append({"stage": name, "estimated": first, "took": took, "error": first / max(took, 1e-9) - 1})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    facts, near, counted = {}, 0, 0
    for run in args.runs:
        rows = compared(run_dir(run))
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
        near += sum(abs(row["error"]) <= AIM for row in checked)
        counted += len(checked)
        facts[str(run)] = [*rows, total]
    print(f"within {100 * AIM:.0f} %: {near} of {counted} (stages of {LEAST:g} s or more, and whole runs)")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
