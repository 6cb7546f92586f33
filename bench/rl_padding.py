"""Padding in the training batches of an RL stage, with one row for each sample and with packed rows.

    python bench/rl_padding.py RUN STAGE [--rollouts N]     RUN: a run directory that has the model STAGE starts from

Samples the stage's first rollouts with that model, without updates, and lays each mini-batch out in both ways. The
result goes to bench/results/rl_padding.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from bessemer.config.recipe import Recipe
from bessemer.data.chat import question_ids
from bessemer.engine.engine import Engine
from bessemer.rl import rollout
from bessemer.rl.generator import candidates
from bessemer.rl.rollout import Packing
from bessemer.rl.task_mix import mixture
from bessemer.runs.directory import stage_folders
from bessemer.tasks import stable_hash
from bessemer.train import setup

RESULT = Path(__file__).parent / "results" / "rl_padding.json"


def length_of(sample: rollout.ScoredSample) -> int:
    return len(sample.prompt_tokens) + len(sample.completion.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--rollouts", type=int, default=2)
    given = parser.parse_args()
    recipe = Recipe.load(given.run / "recipe.toml")
    config = recipe.stage(given.stage)
    folders = {name: path for _, name, path in stage_folders(given.run)}
    model, tokenizer = setup.load_to_sample(folders[config.source] / "model", print, precision="float32")
    tokenizer.use_template(config.prompt_template)
    engine, families = Engine(model, tokenizer, setup.workers()), mixture(config, config.tasks)
    seed = recipe.seed_of(config)
    counts = {name: {"tokens": 0, "padded": 0, "rows": 0, "micro_batches": 0} for name in ("one_row_each", "packed")}
    lengths = []
    for number in range(given.rollouts):
        _, problems = candidates(config, [], families, seed, number, 0)
        groups = rollout.sample(
            engine, problems, lambda problem: question_ids(tokenizer, problem.prompt), samples=config.samples,
            seed=stable_hash(seed, config.name, number), temperature=config.temperature, top_p=config.top_p,
            max_new_tokens=round(config.max_new_tokens(0)), batch_rows=setup.batch_rows(len(problems) * config.samples),
        )  # fmt: skip
        samples = [sample for group in groups for sample in group]
        lengths += map(length_of, samples)
        order = np.random.default_rng([seed, number]).permutation(len(samples))
        for part in np.split(order, config.updates_per_rollout):
            for packs, name in enumerate(counts):
                packing = Packing(config.micro_tokens, tokenizer.pad_id, packs=bool(packs))
                for rows in packing.parts([samples[i] for i in part]):
                    batch = packing.batch(rows, rows)
                    counts[name]["padded"] += batch.tokens_BT.numel()
                    counts[name]["rows"] += batch.n_rows
                    counts[name]["micro_batches"] += 1
                    counts[name]["tokens"] += sum(length_of(sample) for row in rows for sample in row)
    for figures in counts.values():
        figures["padding"] = round(1 - figures["tokens"] / figures["padded"], 4)
    quantiles = np.quantile(lengths, [0.1, 0.5, 0.9, 1.0]).tolist()
    facts = {"recipe": recipe.name, "stage": config.name, "rollouts": given.rollouts, "samples": len(lengths)}
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    known[f"{recipe.name}/{config.name}"] = facts | {"length_10_50_90_100": quantiles} | counts
    RESULT.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(known[f"{recipe.name}/{config.name}"], indent=1))


if __name__ == "__main__":
    main()
