"""The demo on several seeds: what it reaches, and what it costs in processor time.

    python bench/demo.py --seeds 7 8 9 --out runs/demo --json bench/results/demo.json

Runs recipes/tiny.toml once per seed, stage by stage, and counts the processor seconds of each stage, helper processes
and imports included: on a shared machine they say more than a clock, although a neighbour in the same caches raises
them too. What is finished is only read, so a second call goes on, and seeds may be run side by side by several calls.
The rule for a change of the recipe: at least AIM in both languages on every seed; exits with 1 if it is broken.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from bessemer.config.recipe import Recipe
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json, write_json

AIM = 0.71
"""Accuracy after RL on held-out countdown (pass@1, T 1, 100 problems x 16 answers per language)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--until", help="stop after this stage, and print no table")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    names = [stage.name for stage in Recipe.load(args.recipe).stages]
    if args.until:
        names = names[: names.index(args.until) + 1]
    for seed in args.seeds:
        run(args.recipe, seed, args.out / f"seed{seed}", names)
    if args.until:
        return 0
    facts = {str(seed): facts_of(args.out / f"seed{seed}") for seed in args.seeds}
    for seed, found in facts.items():
        print(f"seed {seed}: processor seconds {found['processor_seconds']}")
        for row in found["rows"]:
            mean, low, high = (100 * value for value in (row["pass_at_1"], *row["interval"]))
            print(f"  {row['model']:>8} {row['language']}  {mean:.1f} ({low:.0f}-{high:.0f})")
    least = min(row["pass_at_1"] for found in facts.values() for row in found["rows"] if row["model"] == "zero")
    print(f"least after RL: {100 * least:.1f} %, aim {100 * AIM:.0f} %")
    if args.json:
        args.json.write_text(json.dumps({"aim": AIM, "least": least, "seeds": facts}, indent=1) + "\n")
    return int(least < AIM)


def run(recipe: str, seed: int, root: Path, names: list[str]) -> None:
    """Runs the stages one by one, and keeps the processor seconds of each beside the run."""
    path = root.with_suffix(".json")
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        if any(found == name and (folder / "done.json").exists() for _, found, folder in stage_folders(root)):
            continue
        before = spent()
        command = [sys.executable, "-m", "bessemer", "run", recipe, "--set", f"seed={seed}", "--out", str(root)]
        try:
            subprocess.run([*command, "--until", name], check=True)
        finally:  # an attempt that was stopped counts, too
            kept = read_json(path) or {}
            write_json(path, kept | {name: round(kept.get(name, 0.0) + spent() - before, 1)})


def spent() -> float:
    """Processor seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def facts_of(root: Path) -> dict:
    """What a finished run says about itself."""
    folders = {name: folder for _, name, folder in stage_folders(root)}
    done = {name: read_json(folder / "done.json") or {} for name, folder in folders.items()}
    rows = [
        {
            "model": row["model"], "language": row["language"], "pass_at_1": row["pass_at_1"],
            "interval": row["pass_at_1_interval"], "pass_at_k": row["pass_at_k"], "readable": row.get("readable"),
            "truncated": row["truncated"], "mean_length": row["mean_length"],
        }
        for row in json.loads((folders["eval"] / "results.json").read_text())["rows"]
    ]  # fmt: skip
    return {
        "processor_seconds": read_json(root.with_suffix(".json")),
        "wall_seconds": {name: facts.get("seconds") for name, facts in done.items()},
        "summary": {name: done[name].get("summary") for name in ("pretrain", "zero")},
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
