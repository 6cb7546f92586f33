"""Whether a model's gain in `arithmetic` comes from test chains that begin a longer training question.

    python bench/arithmetic_beginnings.py RUN [more runs] [--models base r1]

The page of a question such as `2*6-1+9` computes the test question `2*6-1` on the way. Training questions are those
that the contamination search of the evaluation reads: pages, samples and RL problems of both models. The runs need an
evaluation of that task by language. Intervals of gains are those of `bessemer compare`: the wider of Student's over the
runs and the bootstrap over the problems.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bessemer import tasks
from bessemer.addons.evals.intervals import Rates, over_seeds, stratified, wider
from bessemer.config.recipe import Recipe
from bessemer.data.fetch import cache_dir
from bessemer.pipeline.stages.eval import training_data
from bessemer.runs.files import read_json

CHAIN = re.compile(r"\d+(?:[-+*]\d+){2,}")
GROUPS = ("begin a training question", "do not", "have two operations and do not")


def beginnings(run: Path, models: Sequence[str]) -> set[str]:
    """The proper beginnings, ending with a whole term, of the chains in the models' training questions."""
    recipe = Recipe.load(run / "recipe.toml")
    openings: set[str] = set()
    for _, texts in training_data(recipe, models, run, cache_dir(None)):
        for text in texts:
            question = re.split("<think>|<answer>", text if isinstance(text, str) else text.prompt)[0]
            for chain in CHAIN.findall(question):
                openings |= {chain[: sign.start()] for sign in re.finditer("[-+]", chain)}
    return openings


def rates(run: Path, models: Sequence[str]) -> dict[str, list[dict[str, Rates]]]:
    """Group -> for each language, model -> number of a test problem -> share of right answers."""
    shown_openings = beginnings(run, models)
    if (results := read_json(next(run.glob("*-eval"), run) / "results.json")) is None:
        raise SystemExit(f"{run} has no finished evaluation; run its recipe to the end")
    by_group: dict[str, list[dict[str, Rates]]] = {group: [] for group in GROUPS}
    rows = [row for row in results["rows"] if row["task"] == "arithmetic" and row["model"] in models]
    for language in dict.fromkeys(row["language"] for row in rows):
        task = tasks.get("arithmetic", languages=[language])
        of = {row["model"]: list(row["by_problem"].values()) for row in rows if row["language"] == language}
        chosen: dict[str, list[int]] = {group: [] for group in GROUPS}
        for number in range(len(of[models[0]])):
            problem = task.problem("test", number, seed=0)
            begins = CHAIN.findall(problem.prompt)[0] in shown_openings
            chosen[GROUPS[0 if begins else 1]].append(number)
            if not begins and problem.meta["difficulty"] == 2:
                chosen[GROUPS[2]].append(number)
        for group, numbers in chosen.items():
            by_group[group].append({model: {n: of[model][n] for n in numbers} for model in models})
    return by_group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--models", nargs=2, default=["base", "r1"], help="before and after")
    args = parser.parse_args()
    before, after = args.models
    runs = [rates(run, args.models) for run in args.runs]
    for group in GROUPS:
        seeds = [run[group] for run in runs]
        gains = [[{n: row[after][n] - rate for n, rate in row[before].items()} for row in seed] for seed in seeds]
        by_seed = [fmean(fmean(gain.values()) for gain in seed) for seed in gains]
        problems = stratified([("arithmetic", gain) for seed in gains for gain in seed], lowest=-1.0)
        interval = wider(over_seeds(by_seed), problems) if len(by_seed) > 1 else problems
        mean = {model: fmean(fmean(row[model].values()) for seed in seeds for row in seed) for model in args.models}
        counts = " + ".join(str(sum(map(len, seed))) for seed in gains)
        print(
            f"{counts} test questions {group}: {before} {100 * mean[before]:.1f} %, {after} {100 * mean[after]:.1f} %, "
            f"{100 * interval.middle:+.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
        )


if __name__ == "__main__":
    main()
