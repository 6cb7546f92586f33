"""The tables of docs/results.md for runs of one recipe that differ in their seed, as Markdown.

    python bench/stage_tables.py RUN [more runs] [--pairs base:r1 zero:r1 ...]

Reads the evaluation stage of each run: a column for every model, with the mean of the runs and the lowest and highest;
the differences of `bessemer compare` for the pairs in pass@1, readability and language; and the first pair's in pass@1
by run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from bessemer.addons.evals import paired
from bessemer.runs.files import read_json

PAIRS = ["base:r1", "zero:r1", "zero:dev1", "dev1:dev2", "dev2:dev3", "dev3:r1", "student-rl:distilled"]
MEANS = {
    "pass_at_1": ("mean: pass@1", 100),
    "pass_at_k": ("pass@k", 100),
    "maj_at_k": ("cons@k", 100),
    "readable": ("readable", 100),
    "language_consistency": ("language consistency", 100),
    "formatted": ("well-formed", 100),
    "truncated": ("cut off", 100),
    "mean_length": ("tokens per answer", 1),
}
Rows = list[dict[str, Any]]


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def stages(runs: list[Rows]) -> None:
    models = list(dict.fromkeys(row["model"] for row in runs[0]))
    groups = list(dict.fromkeys((row["task"], row["language"]) for row in runs[0]))
    line("", *models)
    line(*["---"] * (len(models) + 1))

    def cells(name: str, value: Callable[[Rows], float]) -> None:
        """`value` of each model's rows in each run."""
        values = [[value([row for row in rows if row["model"] == model]) for rows in runs] for model in models]
        line(name, *(f"{fmean(v):.1f}" + (f" ({min(v):.0f}-{max(v):.0f})" if len(v) > 1 else "") for v in values))

    for question in groups:
        cells(
            " ".join(question),
            lambda rows: 100 * next(r["pass_at_1"] for r in rows if (r["task"], r["language"]) == question),  # noqa: B023
        )
    for key, (name, scale) in MEANS.items():
        cells(name, lambda rows: scale * fmean(row[key] for row in rows))  # noqa: B023


def differences(runs: list[Rows], pairs: list[list[str]]) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in runs[0]))

    def cell(pair: list[str], task: str | None, chosen: list[Rows], measure: str = "pass@1") -> str:
        first, second = (
            [paired.rates([row for row in rows if row["model"] == model], model, measure) for rows in chosen]
            for model in pair
        )
        comparison = paired.compare(first, second, only=[task] if task else ())[-1]
        return f"{100 * comparison.difference:+.1f} ({100 * comparison.low:.1f} to {100 * comparison.high:.1f})"

    for measure in paired.MEASURES:
        print()
        line(measure, *(f"{second} over {first}" for first, second in pairs))
        line(*["---"] * (len(pairs) + 1))
        for task in (*tasks, None):
            line(task or "mean", *(cell(pair, task, runs, measure) for pair in pairs))
    print()
    line("{1} over {0}".format(*pairs[0]), *(f"run {number}" for number in range(1, len(runs) + 1)))
    line(*["---"] * (len(runs) + 1))
    for task in (*tasks, None):
        line(task or "mean", *(cell(pairs[0], task, [run]) for run in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="BEFORE:AFTER")
    args = parser.parse_args()
    runs: list[Rows] = []
    for run in args.runs:
        if (results := read_json(next(run.glob("*-eval"), run) / "results.json")) is None:
            raise SystemExit(f"{run} has no finished evaluation; run its recipe to the end")
        runs.append(results["rows"])
    models = {row["model"] for row in runs[0]}
    stages(runs)
    pairs = [pair.split(":") for pair in args.pairs]
    differences(runs, [pair for pair in pairs if models.issuperset(pair)])


if __name__ == "__main__":
    main()
