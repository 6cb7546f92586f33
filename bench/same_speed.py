"""Speed of two versions of the package on one machine: training, GRPO step and decoding, the versions in turn.

    git worktree add OLD COMMIT
    python bench/same_speed.py OLD . --rounds 5 --set-old zero.minimum_pass=0 --json bench/results/same_speed.json

Each round runs a shortened `tiny` recipe from both trees (the first one alternates) and then decodes with the round's
own model, 64 prompts of countdown, greedy, float32, one thread. A figure is the median of the rounds' ratios NEW / OLD,
with the lowest and the highest. Above 1 the new version is faster.

    training   tokens per second of a pre-training step, median of the steps after the fifth
    GRPO step  optimizer steps per second of the RL stage: sampling, verification, reference, update
    decoding   new tokens per second of one call of `Engine.generate`, prefill included, best of three calls
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import processor, spread

CUT = ["pretrain.tokens=400K", "zero.rollouts=10", "corpus.vocab_sample=60000"]
"""What is cut off `tiny`, as `--set` values that both versions know."""
NEW = ["zero.heldout.minimum_pass=0"]
"""The same for this version alone: so little pre-training solves nothing."""

PROMPTS, NEW_TOKENS = 64, 96


def decode(model_dir: Path) -> float:
    """New tokens per second, best of three calls, in this process."""
    import torch

    import bessemer
    from bessemer import tasks
    from bessemer.data.chat import question_ids
    from bessemer.data.tokenizer import Tokenizer
    from bessemer.engine.engine import Engine

    torch.set_num_threads(1)
    model, tokenizer = bessemer.load(model_dir, dtype="float32"), Tokenizer.load(model_dir)
    engine, task = Engine(model, tokenizer), tasks.get("countdown")
    prompts = [question_ids(tokenizer, task.problem("test", n).prompt) for n in range(PROMPTS)]
    speeds = []
    for _ in range(3):
        start = time.perf_counter()
        engine.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0.0, stop_ids=[])
        speeds.append(PROMPTS * NEW_TOKENS / (time.perf_counter() - start))
    return max(speeds)


def run(tree: Path, out: Path, own: list[str]) -> dict[str, float]:
    """One shortened run from a tree's sources, in processes of its own, and its three speeds."""
    sources = os.pathsep.join(str(tree.resolve() / folder) for folder in ("src", "claims/src"))
    env = os.environ | {"PYTHONPATH": sources}
    settings = [word for value in CUT + own for word in ("--set", value)]
    command = [sys.executable, "-m", "bessemer", "run", "tiny", "--out", str(out), *settings]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["values"].get("train/tokens_per_second") for line in lines if line["stage"] == "pretrain"]
    steps = [
        (line["time"], line["step"]) for line in lines if line["stage"] == "zero" and "rl/reward" in line["values"]
    ]
    seconds, updates = steps[-1][0] - steps[0][0], steps[-1][1] - steps[0][1]
    model = next(out.glob("*-zero/model"))
    decoding = subprocess.run(
        [sys.executable, __file__, "--decode", str(model)], env=env, check=True, capture_output=True, text=True
    )
    return {
        "training": statistics.median([speed for speed in speeds if speed is not None][5:]),
        "GRPO step": updates / seconds,
        "decoding": float(decoding.stdout),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set-old", action="append", default=[], help="KEY=VALUE for the old version alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        print(decode(args.decode))
        return
    if len(args.trees) != 2:
        parser.error("give the tree of the old version and that of the new one")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for n in range(args.rounds):
            versions = {"old": (args.trees[0], args.set_old), "new": (args.trees[1], NEW)}
            order = list(versions) if n % 2 == 0 else list(reversed(versions))
            speeds = {}
            for version in order:
                tree, own = versions[version]
                speeds[version] = run(tree, Path(folder) / f"{n}-{version}", own)
            rounds.append(speeds)
            print(n, {name: f"{speeds['new'][name] / old:.3f}" for name, old in speeds["old"].items()}, flush=True)
    ratios = {name: spread([r["new"][name] / r["old"][name] for r in rounds]) for name in rounds[0]["old"]}
    for name, ratio in ratios.items():
        print(f"{name:10} {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    if args.json:
        args.json.write_text(json.dumps({"machine": processor(), "ratios": ratios, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
