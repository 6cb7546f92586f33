"""Whether a model's gain in `arithmetic` comes from test chains that begin a longer training question.

    python bench/arithmetic_beginnings.py RUN [more runs] [--models base r1]

The page of a question such as `2*6-1+9` computes the test question `2*6-1` on the way. Training questions are those of
the corpus part `arithmetic`, of all samples, and of all RL rollouts of the run. The runs need an evaluation of that
task by language. Intervals of gains are those of `bessemer compare`: the wider of Student's over the runs and the
bootstrap over the problems.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np

from bessemer import Tokenizer, tasks
from bessemer.eval.intervals import Rates, over_seeds, stratified, wider
from bessemer.runs.files import read_json

CHAIN = re.compile(r"\d+(?:[-+*]\d+){2,}")


def questions(run: Path) -> Iterator[str]:
    """The training questions of the run, among others that hold no chain."""
    corpus = next(run.glob("*-corpus"))
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    for shard in sorted((corpus / "arithmetic").glob("train-*.tokens")):
        ids = np.memmap(shard, read_json(corpus / "arithmetic" / "meta.json")["dtype"], "r")
        for page in np.split(ids, np.load(shard.with_suffix(".ends.npy"))[:-1]):
            yield re.split("<think>|<answer>", tokenizer.decode(page.tolist()))[0]
    for file in run.glob("*/samples.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["messages"][0]["content"]
    for file in run.glob("*/rollouts.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if "/train/" in (row := json.loads(line))["id"]:
                yield row["prompt"]


def beginnings(run: Path) -> set[str]:
    """The proper beginnings, ending with a whole term, of the chains in the training questions."""
    return {
        chain[: sign.start()]
        for question in questions(run)
        for chain in CHAIN.findall(question)
        for sign in re.finditer("[-+]", chain)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--models", nargs=2, default=["base", "r1"], help="before and after")
    args = parser.parse_args()
    groups = ("begin a training question", "do not", "have two operations and do not")
    rows: dict[str, list[list[dict[str, Rates]]]] = {group: [] for group in groups}
    for run in args.runs:
        shown, of_run = beginnings(run), {group: [] for group in groups}
        table = read_json(next(run.glob("*-eval")) / "results.json")["rows"]
        for language in dict.fromkeys(row["language"] for row in table if row["task"] == "arithmetic"):
            task = tasks.get("arithmetic", languages=[language])
            rates = {
                row["model"]: list(row["by_problem"].values())
                for row in table
                if (row["task"], row["language"]) == ("arithmetic", language)
            }
            chosen: dict[str, list[int]] = {group: [] for group in groups}
            for number in range(len(rates[args.models[0]])):
                problem = task.problem("test", number, seed=0)
                if CHAIN.findall(problem.prompt)[0] in shown:
                    chosen[groups[0]].append(number)
                else:
                    chosen[groups[1]].append(number)
                    if problem.meta["difficulty"] == 2:
                        chosen[groups[2]].append(number)
            for group, numbers in chosen.items():
                of_run[group].append({model: {n: rates[model][n] for n in numbers} for model in args.models})
        for group in groups:
            rows[group].append(of_run[group])
    for group, seeds in rows.items():
        before, after = args.models
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
