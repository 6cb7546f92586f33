"""GRPO against filtering at equal samples and at equal processor time, in and out of distribution.

    bessemer run tiny --until pretrain --set seed=7 --out runs/tiny-7        # one base for every seed
    python bench/filtering.py runs/tiny-7 runs/tiny-8 runs/tiny-9 --json bench/results/filtering.json

Three ways to use the same number of answers to countdown, from the same base; each answer is judged right or wrong:

    grpo        recipes/tiny.toml's RL stage, whose schedule ends with the budget
    iterated    rounds: answers of the current model; the right ones are kept, and the model is fine-tuned on them
    expert      the same, but the base is fine-tuned, on the right answers of all rounds so far

A budget is 12, 24 or 48 rollouts of 256 answers. A round has the answers of six rollouts (`expert`: 12) and starts
with fresh moments; learning rate and epochs of fine-tuning are the best of those tried on one seed (`--pilot`).
Filtering goes on beyond the largest budget, so that it can be compared at GRPO's processor time, too, by interpolation
between its rounds.

The rule was fixed before the first run. For each budget: pass@1 of `grpo` less that of the other arm, paired by seed,
with a 95 % t interval over the seeds. An arm is ahead where the interval excludes 0; an interval wider than 5 points
says too little, and `seeds needed` is the number that would narrow it to 5 points. Tasks: countdown's test split;
countdown:4, with a number more; and the same task with numbers up to 20. No arm trains on the last two.

A finished seed is a file; an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor

from bessemer.addons.evals.intervals import over_seeds, smallest_visible

BUDGETS = (12, 24, 48)
"""Rollouts."""
PROMPTS, SAMPLES = 16, 16
ROUND = {"iterated": 6, "expert": 12}
"""Rollouts whose answers a round of filtering has."""
MORE = {"iterated": 4, "expert": 1}
"""Rounds beyond the largest budget."""
TASKS = {"countdown": "in distribution", "countdown:4": "a number more", "larger_numbers.py:Larger": "numbers to 20"}
FILTERS = ("iterated", "expert")
TUNED = {"lr": 5e-4, "epochs": 4}
"""Fine-tuning of all seeds. The pilot has not chosen it yet: one of its six settings has run (docs/log.md)."""
PILOT = [{"lr": lr, "epochs": epochs} for lr in (2.5e-4, 5e-4, 1e-3) for epochs in (2, 4)]
PILOT_ROLLOUTS = 24
HEAD = """name = "filtering"
seed = {seed}
main = "base"

[[stage]]
kind = "import"
name = "base"
model = {model}
"""
RL = """
[[stage]]
kind = "rl"
name = "grpo-{budget}"
from = "base"
precision = "auto"
tasks = ["countdown"]
prompt_template = "model"
rollouts = {budget}
updates_per_rollout = 2
max_new_tokens = [["0", 200], ["{late}", 200], ["{late}", 300]]
lr = [["0", 0.0], ["6", 2.5e-4], ["{late}", 2.5e-4], ["{steps}", 3e-5]]
loss.clip_high = 0.28
kl.weight = 0.0
normalise = "token"
accuracy_needs_format = true
reward = "accuracy"
heldout.every = {budget}
heldout.minimum_pass = 0.0
"""
REJECT = """
[[stage]]
kind = "reject"
name = "{arm}-answers-{number}"
from = "{source}"
prompt_template = "model"
precision = "auto"
tasks = ["countdown"]
problems = {problems}
first_problem = {first}
samples = {samples}
keep = {samples}
consistency = 0.0
repeated = 1.0
paragraph = 10_000
max_new_tokens = {cap}
"""
SFT = """
[[stage]]
kind = "sft"
name = "{arm}-{number}"
from = "{start}"
samples = [{sources}]
epochs = {epochs}
row_length = 512
batch_rows = 4
micro_rows = 4
lr = {lr}
lr_final = {end}
weight_decay = 0.0
mtp_lambda = 0.0
"""
EVAL = """
[[stage]]
kind = "eval"
models = [{models}]
precision = "auto"
tasks = [{tasks}]
problems = {problems}
samples = 8
temperatures = [1.0]
max_new_tokens = 300
"""


def rounds_of(arm: str, rollouts: int) -> int:
    return rollouts // ROUND[arm]


def filtering(arm: str, rounds: int, tuned: Mapping[str, float]) -> Iterator[str]:
    """The stages of a filtering arm."""
    for n in range(rounds):
        before = f"{arm}-{n - 1}" if n else "base"
        yield REJECT.format(
            arm=arm, number=n, source=before, problems=ROUND[arm] * PROMPTS, first=n * ROUND[arm] * PROMPTS,
            samples=SAMPLES, cap=200 if n < rounds_of(arm, BUDGETS[-1]) // 2 else 300,
        )  # fmt: skip
        used = [n] if arm == "iterated" else range(n + 1)
        yield SFT.format(
            arm=arm, number=n, start=before if arm == "iterated" else "base", epochs=tuned["epochs"], lr=tuned["lr"],
            end=tuned["lr"] / 8, sources=", ".join(f'"{arm}-answers-{k}"' for k in used),
        )  # fmt: skip


def recipe(base: Path, seed: int) -> str:
    """All arms of one seed."""
    stages = [HEAD.format(seed=seed, model=json.dumps(str((base / "02-pretrain" / "model").resolve())))]
    for budget in BUDGETS:
        stages.append(RL.format(budget=budget, late=budget * 5 // 6, steps=2 * budget))
    for arm in FILTERS:
        stages.extend(filtering(arm, rounds_of(arm, BUDGETS[-1]) + MORE[arm], TUNED))
    models = ["base", *(f"grpo-{budget}" for budget in BUDGETS)]
    models += [f"{arm}-{n}" for arm in FILTERS for n in measured_rounds(arm)]
    return "".join(stages) + evaluation(models, 100, TASKS)


def measured_rounds(arm: str) -> list[int]:
    """Rounds after which filtering is measured, from 0: those of the budgets, and the last."""
    return [rounds_of(arm, budget) - 1 for budget in BUDGETS] + [rounds_of(arm, BUDGETS[-1]) + MORE[arm] - 1]


def evaluation(models: Sequence[str], problems: int, tasks: Sequence[str] | Mapping[str, str]) -> str:
    quoted = (", ".join(map(json.dumps, names)) for names in (models, tasks))
    return EVAL.format(models=next(quoted), tasks=next(quoted), problems=problems)


def run(text: str, folder: Path) -> Path:
    """Runs a recipe beside this file's plug-in on one core; an interrupted run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "larger_numbers.py").write_text((Path(__file__).parent / "larger_numbers.py").read_text())
    (folder / "filtering.toml").write_text(text)
    command = [sys.executable, "-m", "bessemer", "run", str(folder / "filtering.toml"), "--out", str(folder / "run")]
    with (folder / "log").open("a") as log:
        subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT, check=True
        )
    return folder / "run"


def facts_of(out: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """pass@1 by model and task, and processor seconds by stage."""
    seconds = {
        stage.name.split("-", 1)[1]: json.loads((stage / "wall.json").read_text())["cpu_seconds"]
        for stage in sorted(out.glob("[0-9]*-*"))
    }
    (results,) = out.glob("*-eval/results.json")
    scores: dict[str, dict[str, float]] = {}
    by_task: dict[tuple[str, str], list[float]] = {}
    for row in json.loads(results.read_text())["rows"]:
        by_task.setdefault((row["model"], row["task"]), []).append(row["pass_at_1"])
    for (model, task), values in by_task.items():
        scores.setdefault(model, {})[task] = statistics.fmean(values)
    return scores, seconds


def seed_result(base: Path, seed: int, folder: Path) -> dict[str, Any]:
    scores, seconds = facts_of(run(recipe(base, seed), folder))
    spent = {f"grpo-{budget}": seconds[f"grpo-{budget}"] for budget in BUDGETS}
    for arm in FILTERS:
        total = 0.0
        for n in range(max(measured_rounds(arm)) + 1):
            total += seconds[f"{arm}-answers-{n}"] + seconds[f"{arm}-{n}"]
            spent[f"{arm}-{n}"] = total
    return {"seed": seed, "scores": scores, "seconds": spent}


def at_time(result: Mapping[str, Any], arm: str, task: str, seconds: float) -> float | None:
    """pass@1 of a filtering arm after so many processor seconds; None beyond its last round."""
    names = ["base", *(f"{arm}-{n}" for n in measured_rounds(arm))]
    times = [0.0, *(result["seconds"][name] for name in names[1:])]
    return None if seconds > times[-1] else float(np.interp(seconds, times, [result["scores"][n][task] for n in names]))


def interval(differences: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % t interval, and the seeds that would narrow it to 5 points."""
    found = over_seeds(differences)
    if len(differences) < 2:
        return {"mean": found.middle, "seeds": 1}
    needed = next((k for k in range(2, 200) if 2 * smallest_visible(like(differences, k)) <= 0.05), None)
    return {
        "mean": found.middle, "low": found.low, "high": found.high, "seeds": len(differences), "seeds_needed": needed,
    }  # fmt: skip


def like(values: Sequence[float], n: int) -> list[float]:
    """n values with the standard deviation of these."""
    made = np.resize([-1.0, 1.0], n)
    return list(made / made.std(ddof=1) * np.std(values, ddof=1))


def table(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for task in TASKS:
        for budget in BUDGETS:
            grpo = [result["scores"][f"grpo-{budget}"][task] for result in results]
            for arm in FILTERS:
                same = [result["scores"][f"{arm}-{rounds_of(arm, budget) - 1}"][task] for result in results]
                timed = [at_time(result, arm, task, result["seconds"][f"grpo-{budget}"]) for result in results]
                both = [g - t for g, t in zip(grpo, timed, strict=True) if t is not None]
                rows.append({
                    "task": TASKS[task], "rollouts": budget, "against": arm, "grpo": statistics.fmean(grpo),
                    "filtering": statistics.fmean(same),
                    "equal samples": interval([g - s for g, s in zip(grpo, same, strict=True)]),
                    "equal time": interval(both) if both else None,
                })  # fmt: skip
    return rows


def shown(found: Mapping[str, Any] | None) -> str:
    if found is None or "low" not in found:
        return "-" if found is None else f"{100 * found['mean']:+.1f} (one seed)"
    return f"{100 * found['mean']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def pilot(base: Path, folder: Path) -> None:
    """pass@1 of filtering with the answers of 24 rollouts, by setting of fine-tuning; a seed that does not count."""
    for tuned in PILOT:
        name = f"pilot-{tuned['lr']}-{tuned['epochs']}"
        model = json.dumps(str((base / "02-pretrain" / "model").resolve()))
        text = HEAD.format(seed=0, model=model) + "".join(
            stage for arm in FILTERS for stage in filtering(arm, rounds_of(arm, PILOT_ROLLOUTS), tuned)
        )
        text += evaluation([f"{arm}-{rounds_of(arm, PILOT_ROLLOUTS) - 1}" for arm in FILTERS], 100, ["countdown"])
        scores, _ = facts_of(run(text, folder / name))
        print(tuned, {model: f"{score['countdown']:.1%}" for model, score in scores.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", type=Path, nargs="+", help="runs of tiny with the stage pretrain, one for every seed")
    parser.add_argument("--out", type=Path, default=Path("build/filtering"))
    parser.add_argument("--pilot", action="store_true", help="choose learning rate and epochs of fine-tuning")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.pilot:
        pilot(given.bases[0], given.out.resolve())
        return
    results = []
    for seed, base in enumerate(given.bases, start=1):
        path = given.out / f"seed-{seed}.json"
        if not path.exists():
            result = seed_result(base, seed, given.out.resolve() / f"seed-{seed}")
            path.write_text(json.dumps(result, indent=1) + "\n")
        results.append(json.loads(path.read_text()))
        rows = table(results)
        for row in rows:
            print(
                f"{len(results)} seeds, {row['task']}, {row['rollouts']} rollouts: grpo {row['grpo']:.1%}, "
                f"{row['against']} {row['filtering']:.1%}; grpo less {row['against']}, points: "
                f"{shown(row['equal samples'])} at equal samples, {shown(row['equal time'])} at equal time",
                flush=True,
            )
        if given.json:
            report = {"machine": processor(), "tuned": TUNED, "table": rows, "seeds": results}
            given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
