"""GRPO less filtering at equal samples and at equal processor time, in and out of distribution, from a study's runs.

    bessemer study studies/rl-against-filtering.toml
    python bench/filtering.py runs/studies/rl-against-filtering --json bench/results/filtering.json

Prints for every budget pass@1 of both sides and GRPO's lead, paired by seed, with a 95 % t interval over the seeds, its
width in points, and the seeds with which it would be 5 points wide. Tasks: countdown's held-out problems, and the same
task with numbers up to 20, which nobody trains on.

Processor seconds are those of the stages, from their wall.json; filtering pays for the answers and the fine-tuning of
all its rounds so far. At GRPO's time its pass@1 is interpolated between its measured rounds, and after the last of
them it keeps that round's: `beyond` counts the seeds for which that had to be done.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor

from bessemer.addons.evals.intervals import over_seeds
from bessemer.addons.study.seeds import seeds_for

BUDGETS = {1_536: "grpo-6", 3_072: "grpo-12", 6_144: "grpo-24"}
"""Sampled answers -> the model of GRPO."""
TASKS = {"countdown": "in distribution", "larger-numbers": "numbers to 20"}
_ROUNDS = [("answers-1", "round-1"), ("answers-2", "round-2"), ("answers-3", "round-3"), ("answers-4", "round-4")]
_EXPERT = [_ROUNDS[0], ("answers-2", "expert-2"), ("expert-answers-3", "expert-3"), ("expert-answers-4", "expert-4")]
FILTERS = {"rounds": _ROUNDS, "expert iteration": _EXPERT}
"""Stages of every round, each with 1,536 answers: sampling and fine-tuning. `answers-2` are those of round-1, from
which both continue."""
MEASURED = (1, 2, 4)
"""Rounds after which filtering is measured, one for every budget."""
WIDTH = 0.05


def facts_of(run: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """pass@1 by task and model, and processor seconds by stage, of a seed's run."""
    seconds = {
        stage.name.split("-", 1)[1]: json.loads((stage / "wall.json").read_text())["cpu_seconds"]
        for stage in run.glob("[0-9]*-*")
    }
    (results,) = run.glob("*-eval/results.json")
    rows = json.loads(results.read_text())["rows"]
    scores = {
        task: {
            model: statistics.fmean(row["pass_at_1"] for row in rows if (row["model"], row["task"]) == (model, task))
            for model in {row["model"] for row in rows}
        }
        for task in TASKS
    }
    return scores, seconds


def spent(seconds: Mapping[str, float], way: str) -> list[float]:
    """Processor seconds of a way of filtering up to the end of each round."""
    return list(np.cumsum([seconds[answers] + seconds[model] for answers, model in FILTERS[way]]))


def lead(differences: Sequence[float]) -> dict[str, Any]:
    """Their mean, 95 % t interval, its width, and the seeds that would narrow it to WIDTH."""
    found = over_seeds(differences)
    return {
        "mean": found.middle, "low": found.low, "high": found.high, "width": found.high - found.low,
        "seeds_for_5_points": seeds_for(differences, WIDTH / 2), "values": list(differences),
    }  # fmt: skip


def table(seeds: Sequence[tuple[dict[str, dict[str, float]], dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for every task, budget and way of filtering."""
    rows = []
    for task, place in TASKS.items():
        for (answers, grpo), rounds in zip(BUDGETS.items(), MEASURED, strict=True):
            for way, stages in FILTERS.items():
                if rounds == 1 and way != "rounds":
                    continue  # the first round is the same
                same, timed, beyond, ratios = [], [], 0, []
                for scores, seconds in seeds:
                    times = [0.0, *(spent(seconds, way)[k - 1] for k in MEASURED)]
                    known = [scores[task]["pretrain"], *(scores[task][stages[k - 1][1]] for k in MEASURED)]
                    ours, theirs = scores[task][grpo], scores[task][stages[rounds - 1][1]]
                    same.append(ours - theirs)
                    timed.append(ours - float(np.interp(seconds[grpo], times, known)))
                    beyond += int(seconds[grpo] > times[-1])
                    ratios.append(float(times[MEASURED.index(rounds) + 1] / seconds[grpo]))
                rows.append({
                    "task": place, "answers": answers, "against": way,
                    "base": statistics.fmean(scores[task]["pretrain"] for scores, _ in seeds),
                    "grpo": statistics.fmean(scores[task][grpo] for scores, _ in seeds),
                    "filtering": statistics.fmean(scores[task][stages[rounds - 1][1]] for scores, _ in seeds),
                    "grpo_seconds": statistics.median(seconds[grpo] for _, seconds in seeds),
                    "seconds_ratio": statistics.median(ratios),
                    "equal samples": lead(same), "equal time": lead(timed) | {"beyond": beyond},
                })  # fmt: skip
    return rows


def shown(found: Mapping[str, Any]) -> str:
    low, middle, high = (100 * found[key] for key in ("low", "mean", "high"))
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f}; width {high - low:.1f}, seeds {found['seeds_for_5_points']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's folder, with at least three finished seeds")
    parser.add_argument("--json", type=Path, help="where to put it; seeds that are there and have no run here stay")
    given = parser.parse_args()
    runs = {
        int(path.parent.name.rpartition("-")[2]): path.parent / "run" for path in given.study.glob("all-*/result.json")
    }
    measured = json.loads(given.json.read_text())["seeds"] if given.json and given.json.is_file() else {}
    for seed, run in runs.items():
        scores, seconds = facts_of(run)
        measured[str(seed)] = {"machine": processor(), "pass_at_1": scores, "cpu_seconds": seconds}
    if len(measured) < 3:
        parser.error(f"{given.study} has {len(measured)} finished seeds; run the study first")
    rows = table([(seed["pass_at_1"], seed["cpu_seconds"]) for seed in measured.values()])
    for row in rows:
        print(
            f"{row['task']}, {row['answers']:,} answers: base {row['base']:.1%}, GRPO {row['grpo']:.1%}, "
            f"{row['against']} {row['filtering']:.1%}; GRPO's lead in points: {shown(row['equal samples'])} at equal "
            f"samples, {shown(row['equal time'])} at equal processor time ({row['against']} takes "
            f"{row['seconds_ratio']:.2f} of GRPO's {row['grpo_seconds']:.0f} s)"
        )
    if given.json:
        report = {"table": rows, "seeds": {str(seed): measured[str(seed)] for seed in sorted(map(int, measured))}}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
