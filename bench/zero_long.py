"""Thinking that grows by itself: `recipes/zero-long.toml` on three seeds, its rule, its curves and their picture.

    python bench/zero_long.py --seeds 1 2 3 --json bench/results/zero_long.json --svg docs/zero-long.svg

Every seed has its own base and its own stages of RL: `zero` (five numbers, right or wrong), `coin` (the same problems,
a random reward) and `easy` (two numbers, where a long search gains nothing). A finished seed is not run again, and an
interrupted one goes on from its checkpoints. `--picture` draws what is in the JSON file.

The rule was fixed before the runs, on a seed that does not count (docs/log.md). On each seed:

    short     the base's held-out answers have fewer than 100 tokens
    long      those after `zero` have more than 600
    right     held-out accuracy rises by at least 30 points, and so does the lower bound over the seeds
    coin      after the random reward they have less than twice as many as the base's
    easy      where short solutions are possible, answers gain less than half of the tokens that `zero` gains
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from machine import processor

from bessemer import tasks
from bessemer.addons.evals.intervals import over_seeds
from bessemer.addons.tasks.countdown_diagnosis import diagnose, rates

RECIPE = Path(__file__).parent.parent / "recipes" / "zero-long.toml"
STAGES = ("zero", "coin", "easy")
SHORT, LONG, RISE, COIN, EASY = 100, 600, 0.30, 2.0, 0.5
CURVES = {
    "length": "rl/length", "accuracy": "rl/accuracy", "tries": "rl/tries", "returned": "rl/trace/returned",
    "repeated": "rl/trace/repeated", "words": "rl/reflective_words", "truncated": "rl/truncated",
}  # fmt: skip
HELD_OUT = ("model", "task", "n", "samples", "pass_at_1", "pass_at_k", "mean_length", "truncated")
FIVE, TWO = "countdown:5", "countdown:2"
COLOURS = {"zero": "#1f6fb4", "coin": "#6b6b6b", "easy": "#c8641b"}


def run(seed: int, out: Path, threads: str | None, more: Sequence[str]) -> Path:
    """One seed of the recipe, in a process of its own."""
    folder = out / f"seed-{seed}"
    command = [sys.executable, "-m", "bessemer", "run", str(RECIPE), "--out", str(folder), "--set", f"seed={seed}"]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": threads})
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"seed-{seed}.log").open("a") as log:
        subprocess.run([*command, *more], env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    return folder


def facts(folder: Path, seed: int) -> dict[str, Any]:
    """The curves of the stages, what their models did on held-out problems, and the seconds of every stage."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = {path.parent.name[3:]: json.loads(path.read_text()) for path in sorted(folder.glob("*/wall.json"))}
    curves = {name: curves_of([line["values"] for line in lines if line["stage"] == name]) for name in STAGES}
    (results,) = folder.glob("*-eval/results.json")
    held_out = [{key: row[key] for key in HELD_OUT} for row in json.loads(results.read_text())["rows"]]
    return {"seed": seed, "stages": curves, "held_out": held_out, "seconds": seconds}


def curves_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return {
        name: [round(values[metric], 4) for values in lines if values.get(metric) is not None]
        for name, metric in CURVES.items()
    }


def corpus_rates(pages: int = 2_000) -> dict[str, float | None]:
    """What the thoughts of the corpus hold: the base rates of what the curves count."""
    task = tasks.get(f"{RECIPE.parent / 'few_numbers.py'}:FiveNumbers")
    written = [task.written(number) for number in range(pages)]
    found = rates(diagnose(page.problem, page.response) for page in written)
    lengths = [page.response.count("\n") + 1 for page in written if "<think>" in page.response]
    return found | {"longest": max(lengths)}


def held_out(seed: Mapping[str, Any], model: str, task: str) -> Mapping[str, float]:
    return next(row for row in seed["held_out"] if row["model"] == model and row["task"].endswith(task))


def verdict(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts of the rule by seed, and the interval of the rise over the seeds."""
    parts: dict[str, list[bool]] = {name: [] for name in ("short", "long", "right", "coin", "easy")}
    rises = []
    for seed in seeds:
        base, zero, coin = (held_out(seed, model, FIVE) for model in ("base", "zero", "coin"))
        before, easy = (held_out(seed, model, TWO) for model in ("base", "easy"))
        rises.append(zero["pass_at_1"] - base["pass_at_1"])
        parts["short"].append(base["mean_length"] < SHORT)
        parts["long"].append(zero["mean_length"] > LONG)
        parts["right"].append(rises[-1] >= RISE)
        parts["coin"].append(coin["mean_length"] < COIN * base["mean_length"])
        gained = easy["mean_length"] - before["mean_length"]
        parts["easy"].append(gained < EASY * (zero["mean_length"] - base["mean_length"]))
    found: dict[str, Any] = {"parts": parts, "rise": fmean(rises)}
    if len(rises) > 1:
        interval = over_seeds(rises)
        found |= {"low": interval.low, "high": interval.high}
        parts["right"].append(interval.low >= RISE)
    return found | {"holds": all(all(answers) for answers in parts.values())}


def rows(seed: Mapping[str, Any], every: int = 10) -> Iterable[str]:
    for name in STAGES:
        stage = seed["stages"][name]
        for start in range(0, len(stage["length"]), every):
            means = {
                key: fmean(stage[key][start : start + every]) for key in CURVES if stage[key][start : start + every]
            }
            shown = ", ".join(f"{key} {value:.3g}" for key, value in means.items())
            yield f"  {name} {start + 1:3} to {min(start + every, len(stage['length'])):3}: {shown}"
    for row in seed["held_out"]:
        yield (
            f"  {row['model']} on {row['task']}: right {row['pass_at_1']:.1%}, {row['mean_length']:.0f} tokens, "
            f"cut off {row['truncated']:.1%}"
        )


def draw(seeds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens per answer and accuracy over rollouts: a thin line for each seed, a thick one for their mean."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.fonttype"] = "none"
    rcParams["svg.hashsalt"] = "zero-long"
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("length", "accuracy"), ("tokens per answer", "share of right answers"), strict=True
    ):
        for name in STAGES:
            curves = [seed["stages"][name][key] for seed in seeds]
            for curve in curves:
                axes.plot(range(1, len(curve) + 1), curve, color=COLOURS[name], linewidth=0.6, alpha=0.5)
            mean = [fmean(values) for values in zip(*curves, strict=False)]
            axes.plot(range(1, len(mean) + 1), smooth(mean), color=COLOURS[name], linewidth=2, label=LABELS[name])
        axes.set_xlabel("rollouts")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, format="svg", metadata={"Date": None})


LABELS = {"zero": "five numbers", "coin": "five numbers, random reward", "easy": "two numbers"}


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Running means of `window` values, shorter at both ends."""
    return [fmean(values[max(0, n - window // 2) : n + window // 2 + 1]) for n in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/zero-long"))
    parser.add_argument("--threads", help="OMP_NUM_THREADS of the runs; by default all cores")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--picture", action="store_true", help="only draw what --json holds")
    given, more = parser.parse_known_args()
    if given.picture:
        draw(json.loads(given.json.read_text())["seeds"], given.svg)
        return
    seeds = []
    for seed in given.seeds:
        seeds.append(facts(run(seed, given.out.resolve(), given.threads, more), seed))
        print(f"seed {seed}:", *rows(seeds[-1]), sep="\n", flush=True)
        found = verdict(seeds)
        print(json.dumps(found), flush=True)
        if given.json:
            report = {"machine": processor(), "rule": found, "corpus": corpus_rates(), "seeds": seeds}
            given.json.write_text(json.dumps(report, indent=None) + "\n")
    if given.svg:
        draw(seeds, given.svg)


if __name__ == "__main__":
    main()
