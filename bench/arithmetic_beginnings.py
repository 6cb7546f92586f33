"""Whether test chains of `arithmetic` that begin a longer training question are solved more often than the others.

    python bench/arithmetic_beginnings.py RUN [more runs] [--models base r1]

The page of a question such as `2*6-1+9` computes the test question `2*6-1` on the way. The runs need a corpus stage
with a part called `arithmetic` and an evaluation of that task by language. Only chains of two operations are counted,
since few longer ones are met. The standard error takes a problem in each language and run for one of its own, so it is
a lower bound.
"""

import argparse
import re
from pathlib import Path
from statistics import fmean, variance

import numpy as np

from bessemer import Tokenizer, tasks
from bessemer.runs.files import read_json

CHAIN = re.compile(r"\d+(?:[-+*]\d+){2,}")


def beginnings(corpus: Path) -> set[str]:
    """The proper beginnings, ending with a whole term, of the chains in the questions of the training pages."""
    tokenizer, found = Tokenizer.load(corpus / "tokenizer"), set()
    for shard in sorted((corpus / "arithmetic").glob("train-*.tokens")):
        ids = np.memmap(shard, read_json(corpus / "arithmetic" / "meta.json")["dtype"], "r")
        for page in np.split(ids, np.load(shard.with_suffix(".ends.npy"))[:-1]):
            question = re.split("<think>|<answer>", tokenizer.decode(page.tolist()))[0]
            for chain in CHAIN.findall(question):
                found |= {chain[: sign.start()] for sign in re.finditer("[-+]", chain)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--models", nargs="+", default=["base", "r1"])
    args = parser.parse_args()
    solved: dict[tuple[str, bool], list[float]] = {(model, met): [] for model in args.models for met in (True, False)}
    for run in args.runs:
        shown = beginnings(next(run.glob("*-corpus")))
        for row in read_json(next(run.glob("*-eval")) / "results.json")["rows"]:
            if row["task"] != "arithmetic" or row["model"] not in args.models:
                continue
            task = tasks.get("arithmetic", languages=[row["language"]])
            for number, rate in enumerate(row["by_problem"].values()):
                problem = task.problem("test", number, seed=0)
                if problem.meta["difficulty"] == 2:
                    solved[row["model"], CHAIN.findall(problem.prompt)[0] in shown].append(rate)
    for model in args.models:
        met, other = solved[model, True], solved[model, False]
        error = (variance(met) / len(met) + variance(other) / len(other)) ** 0.5
        print(
            f"{model}: {100 * fmean(met):.1f} % of {len(met)} that begin a training question, "
            f"{100 * fmean(other):.1f} % of {len(other)} others; standard error of the difference {100 * error:.1f}"
        )


if __name__ == "__main__":
    main()
