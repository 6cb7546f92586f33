"""Seconds per GRPO step against TRL's GRPOTrainer: same weights, prompts, verifier, group size, lengths and machine.

    python bench/grpo_step.py --json bench/results/grpo_step.json
    python bench/grpo_step.py --quick --rounds 1 --steps 2

A step is what either side does between two optimizer steps: sample PROMPTS x 16 completions, verify them, compute
group-relative advantages and log-probabilities under the reference (the paper's KL), forward, backward, clip, AdamW.
There is one update per rollout, so neither side recomputes the sampler's log-probabilities. Routing is real (the tiny
preset with random weights, exported to a Hugging Face directory that both sides load). Both sides compute in float32,
and in BF16 with float32 masters (`--dtypes`; TRL's bf16 is autocast). Every completion has exactly LENGTH tokens: the
peer's end token is suppressed (min_new_tokens), ours is not a stop token (stop_ids = []).

The peer generates with transformers (use_cache). Its figure is its best of: grouped or eager experts; a paged
continuous batch; the whole rollout as one micro-batch or four; compiled; one or two threads. It uses our allocator
setting in all cases, without gradient checkpointing (on by default; it costs a second forward pass). Ours uses one
process or two. Each case runs in its own process, and the cases alternate `--rounds` times, so that other work on the
machine slows both sides equally; the load average at each start is recorded. With one thread the CPU seconds of the
process are reported too, which other work hardly affects.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SAMPLES, TASK = 16, "countdown"
LR, KL, CLIP_LOW, CLIP_HIGH = 1e-4, 0.001, 0.2, 0.28


def prepare(directory: Path) -> None:
    """Writes the model directory that both sides load. The peer has no MTP, so neither side trains it."""
    from bessemer import tasks
    from bessemer.data.tokenizer import Tokenizer
    from bessemer.hf import deepseek
    from bessemer.model.config import preset
    from bessemer.model.transformer import Transformer

    task = tasks.get(TASK)
    tokenizer = Tokenizer.train((task.document(i) for i in range(2000)), 400)  # the network keeps its 2,048 rows
    tokenizer.save(directory / "tokenizer")
    model = Transformer(preset("tiny", n_mtp=0)).initialise(0)
    deepseek.save(model, directory / "model", tokenizer_dir=directory / "tokenizer")


def problems(first: int, count: int) -> list:
    from bessemer import tasks
    from bessemer.rl import rollout

    return rollout.problems_of([tasks.get(TASK, languages=["en"])], "train", first, count, 0)


def ours(args: argparse.Namespace, case: dict) -> dict:
    import torch

    from bessemer.config.rl import RLConfig
    from bessemer.config.training import PretrainConfig
    from bessemer.config.units import Points
    from bessemer.data.chat import question_ids
    from bessemer.engine.engine import Engine
    from bessemer.rl import rollout
    from bessemer.rl.algorithms import advantage_of, loss_of
    from bessemer.rl.losses import GRPO
    from bessemer.rl.reference import Reference
    from bessemer.rl.reward import Reward
    from bessemer.train import setup
    from bessemer.train.plan import TrainingPlan
    from bessemer.train.runtime import Runtime
    from bessemer.train.trainer import Trainer

    setup.keep_memory()
    clips = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}
    settings = RLConfig(kind="rl", name="step", tasks=[TASK], loss=clips, reward=["accuracy", "format"])
    model, tokenizer = setup.load_model(args.directory / "model")
    workers = setup.workers()
    trainer = Trainer(
        model, GRPO(loss_of(settings), KL), None,
        PretrainConfig(kind="pretrain", lr=Points(LR), weight_decay=0.0),
        TrainingPlan(workers=workers, compute_dtype=getattr(torch, case["dtype"])),
    )  # fmt: skip
    engine, reward = Engine(model, tokenizer, workers), Reward.of_config(settings)
    advantage = advantage_of(settings)(None)
    reference = Reference(trainer, Runtime(), args.directory / "model", 10**9, 1.0)
    rows = args.prompts * SAMPLES

    def step(number: int) -> float:
        begin = time.perf_counter()
        groups = rollout.sample(
            engine, problems(number * args.prompts, args.prompts), lambda p: question_ids(tokenizer, p.prompt),
            samples=SAMPLES, seed=number, max_new_tokens=args.length, stop_ids=[], batch_rows=-(-rows // workers.n),
        )  # fmt: skip
        generated = time.perf_counter() - begin
        reward.score(groups)
        advantage.assign(groups)
        packing = rollout.Packing(4096, tokenizer.pad_id, "sequence")
        parts = packing.parts([row for group in groups for row in group])
        batches = [packing.batch(part, part) for part in parts]
        reference.before_step(batches)
        trainer.update(batches)
        lengths = {len(row.completion.tokens) for group in groups for row in group}
        assert lengths == {args.length}, lengths
        return generated

    timings = measure(step, args.steps)
    assert workers.n == case["threads"]
    return timings


def peer(args: argparse.Namespace, case: dict) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from bessemer import tasks
    from bessemer.data.chat import render
    from bessemer.train import setup

    setup.keep_memory()
    torch.set_num_threads(case["threads"])
    steps = args.steps + 1
    chosen = [problem for _, problem in problems(0, steps * args.prompts)]
    prompts = [render([{"role": "user", "content": p.prompt}], "zero") for p in chosen]
    by_prompt = dict(zip(prompts, chosen, strict=True))
    task = tasks.get(TASK, languages=["en"])

    def reward(prompts, completions, completion_ids, **_):
        assert {len(ids) for ids in completion_ids} == {args.length}
        verdicts = (task.verify(by_prompt[p], c) for p, c in zip(prompts, completions, strict=True))
        return [verdict.score + float(verdict.formatted) for verdict in verdicts]

    rows, cuts = args.prompts * SAMPLES, case["micro_batches"]
    config = GRPOConfig(
        output_dir=str(args.directory / "trl"), use_cpu=True, bf16=case["dtype"] == "bfloat16", report_to="none",
        save_strategy="no",
        logging_strategy="no", disable_tqdm=True, shuffle_dataset=False, gradient_checkpointing=False,
        per_device_train_batch_size=rows // cuts, gradient_accumulation_steps=cuts, steps_per_generation=cuts,
        num_generations=SAMPLES, max_completion_length=args.length, max_steps=steps,
        generation_kwargs={"min_new_tokens": args.length, "use_cache": True},
        use_transformers_continuous_batching=case["paged"], torch_compile=case["compile"],
        loss_type="grpo", beta=KL, use_bias_correction_kl=False, epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH,
        learning_rate=LR, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        args.directory / "model", dtype=torch.float32, attn_implementation="sdpa",
        experts_implementation=case["experts"],
    )  # fmt: skip
    marks, cpu, generated = [], [], []

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args, **named):
            begin = time.perf_counter()
            result = super()._generate_single_turn(*args, **named)
            generated.append(time.perf_counter() - begin)
            return result

    class Clock(TrainerCallback):
        def mark(self, *_, **__):
            marks.append(time.perf_counter())
            cpu.append(time.process_time())

        on_train_begin = on_step_end = mark

    tokenizer = AutoTokenizer.from_pretrained(args.directory / "model", padding_side="left")
    trainer = Timed(
        model, reward_funcs=reward, args=config, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    check_prompts(tokenizer, prompts, chosen, args)
    trainer.train()
    assert len(generated) == steps
    return {
        "seconds": [b - a for a, b in itertools.pairwise(marks[1:])], "generation": generated[1:],
        "cpu": [b - a for a, b in itertools.pairwise(cpu[1:])], "first_step_seconds": marks[1] - marks[0],
    }  # fmt: skip


def check_prompts(tokenizer, prompts: list[str], chosen: list, args: argparse.Namespace) -> None:
    """Checks that both sides read the same ids."""
    from bessemer.data.chat import question_ids
    from bessemer.data.tokenizer import Tokenizer

    own = Tokenizer.load(args.directory / "model")
    assert tokenizer(text=prompts)["input_ids"] == [question_ids(own, problem.prompt) for problem in chosen]


def measure(step: Callable[[int], float], steps: int) -> dict:
    """Seconds of `steps` steps after one warm-up step; `step` returns its seconds of generation."""
    seconds, cpu, generation = [], [], []
    for number in range(steps + 1):
        begin, spent = time.perf_counter(), time.process_time()
        generation.append(step(number))
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - spent)
    return {
        "seconds": seconds[1:], "generation": generation[1:], "cpu": cpu[1:], "first_step_seconds": seconds[0],
    }  # fmt: skip


def cases(args: argparse.Namespace) -> list[dict]:
    chosen = [case | {"dtype": dtype} for dtype in args.dtypes for case in every_case(args.quick)]
    return [case for case in chosen if case["threads"] in args.threads]


def every_case(quick: bool) -> list[dict]:
    own = [{"side": "ours", "threads": n} for n in (1, 2)]

    def theirs(experts="grouped_mm", micro_batches=1, threads=1, paged=False, compile=False):
        return {"side": "peer", "experts": experts, "micro_batches": micro_batches, "threads": threads, "paged": paged,
                "compile": compile}  # fmt: skip

    usual = [theirs(micro_batches=4, threads=n) for n in (1, 2)]
    if quick:
        return [own[0], usual[0], own[1], usual[1]]
    rest = [theirs(threads=n) for n in (1, 2)] + [theirs(experts="eager", threads=n) for n in (1, 2)]
    odd = [theirs(paged=True), theirs(paged=True, threads=2), theirs(micro_batches=4, compile=True, threads=2)]
    return [own[0], usual[0], *rest, own[1], usual[1], *odd]


def machine() -> str:
    """The processor's name, or the architecture if the system does not report one."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def run_case(args: argparse.Namespace, case: dict) -> dict:
    threads = str(case["threads"])
    environment = dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, __file__, "--prompts", str(args.prompts), "--length", str(args.length)]
    command += ["--steps", str(args.steps), "--directory", str(args.directory), "--case", json.dumps(case)]
    load = os.getloadavg()[0]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished within {args.timeout} s", "load": load}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["failed"]
        return {"error": lines[-1][:300], "load": load}
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "load": load}


def summarise(results: list[dict]) -> list[dict]:
    """One row per case: medians over all timed steps of all rounds."""
    rows = {}
    for result in results:
        rows.setdefault(json.dumps(result["case"]), []).append(result)
    summary = []
    for key, runs in rows.items():
        good = [run for run in runs if "error" not in run]
        row = {"case": json.loads(key), "load": [round(run["load"], 2) for run in runs]}
        if good:
            seconds, generation = ([x for run in good for x in run[name]] for name in ("seconds", "generation"))
            row |= {
                "step": statistics.median(seconds), "generation": statistics.median(generation),
                "update": statistics.median(a - b for a, b in zip(seconds, generation, strict=True)),
                "best": min(seconds), "worst": max(seconds), "steps": len(seconds),
            }  # fmt: skip
            if row["case"]["threads"] == 1:
                row["cpu"] = statistics.median(x for run in good for x in run["cpu"])
        else:
            row["error"] = runs[0]["error"]
        summary.append(row)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per case and round, after one warm-up step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=600, help="time limit of a case in a round, seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], choices=(1, 2), help="core counts to measure")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"), help="compute dtypes"
    )
    parser.add_argument("--quick", action="store_true", help="measure only the peer's usual best case")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        case = json.loads(args.case)
        print(json.dumps((ours if case["side"] == "ours" else peer)(args, case)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.directory = Path(folder)
        prepare(args.directory)
        results = []
        for number in range(args.rounds):
            for case in cases(args):
                result = run_case(args, case)
                results.append({"case": case, "round": number, **result})
                outcome = f"error: {result['error']}" if "error" in result else _shown(result)
                print(f"{outcome}  load {result['load']:.1f}  {case}", flush=True)
    report(args, results)


def _shown(result: dict) -> str:
    step, generation = (statistics.median(result[name]) for name in ("seconds", "generation"))
    return f"{step:7.2f} s per step, including {generation:6.2f} s of generation"


def report(args: argparse.Namespace, results: list[dict]) -> None:
    rows = summarise(results)

    def best(side: str, threads: int, dtypes: list[str]) -> dict | None:
        candidates = [row for row in rows if row["case"]["side"] == side and row["case"]["threads"] == threads]
        candidates = [row for row in candidates if "step" in row and row["case"]["dtype"] in dtypes]
        return min(candidates, key=lambda row: row["step"], default=None)

    summary = {
        "machine": machine(), "prompts": args.prompts, "samples": SAMPLES, "completion_tokens": args.length,
        "updates_per_rollout": 1, "kl": KL, "routing": "real", "preset": "tiny",
    }  # fmt: skip
    for threads, dtype in itertools.product(args.threads, args.dtypes):
        own, peer = best("ours", threads, [dtype]), best("peer", threads, args.dtypes)  # the peer's best of all dtypes
        if own is None or peer is None:  # every case of one side failed or timed out; the rows hold the errors
            continue
        figures = {
            "ours": own["step"], "peer": peer["step"], "ratio": peer["step"] / own["step"],
            "generation_ratio": peer["generation"] / own["generation"],
            "update_ratio": peer["update"] / own["update"], "peer_case": peer["case"],
        }  # fmt: skip
        if threads == 1:
            figures["cpu_ratio"] = peer["cpu"] / own["cpu"]
        summary[f"cores_{threads}_{dtype}"] = figures
    print(json.dumps(summary, indent=1))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"summary": summary, "cases": rows, "runs": results}, file, indent=1)


if __name__ == "__main__":
    main()
