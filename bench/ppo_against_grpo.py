"""The savings of GRPO without a critic: PPO against GRPO from one base, on the same problems (R1-Nature A.3).

    python bench/ppo_against_grpo.py BASE/model --task countdown --json bench/results/ppo_against_grpo.json

Arms: `group` (GRPO), `critic` with lambda 1 and with 0.95 (PPO). Every arm runs the real stage `rl` on one core in a
fresh process; the arms alternate for every seed. They use the same problems and start from the same weights. Reported
per arm:

    memory    peak resident size of the process (getrusage), and the exact bytes of the training state: weights,
              gradients and moments of the policy and of the critic, and the reference's weights
    seconds   CPU seconds of the process per rollout, which other work on the machine hardly affects: sampling with
              verification, critic (values, advantages and its own update), update (with the reference)
    accuracy  held-out pass@1 at the start, after equal rollouts, and at the last evaluation within the CPU seconds
              that GRPO took in total (without evaluations)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ARMS = {
    "group": [],
    "critic, lambda 1": ['advantage={name="critic", gae_lambda=1.0}'],
    "critic, lambda 0.95": ['advantage={name="critic", gae_lambda=0.95}'],
}
RECIPE = """
name = "arm"
seed = {seed}
[[stage]]
kind = "import"
model = "{model}"
[[stage]]
kind = "rl"
name = "arm"
tasks = ["{task}"]
rollouts = {rollouts}
prompts_per_rollout = {prompts}
samples = 16
updates_per_rollout = {updates}
max_new_tokens = {cap}
lr = {lr}
heldout.every = {eval_every}
heldout.problems = {eval_problems}
heldout.minimum_pass = 0.0
save_seconds = 1e9
"""


class Clock:
    """CPU seconds by phase. Nested phases count towards the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = False

    def watch(self, owner: type, method: str, part: str) -> None:
        plain = getattr(owner, method)

        def timed(*args, **named):
            if self.inside:
                return plain(*args, **named)
            self.inside, begin = True, time.process_time()
            try:
                return plain(*args, **named)
            finally:
                self.inside = False
                self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - begin

        setattr(owner, method, timed)


def arm(args: argparse.Namespace) -> dict:

    from bessemer.addons.r1.critic import Critic
    from bessemer.config.recipe import Recipe
    from bessemer.rl import loop as rl_loop
    from bessemer.rl.algorithms.base import FunctionAdvantage
    from bessemer.rl.generator import RolloutGenerator
    from bessemer.rl.monitor import Evaluator
    from bessemer.rl.reference import Reference
    from bessemer.runs.context import StageContext, StopFlag
    from bessemer.runs.metrics import Metrics, StageMetrics
    from bessemer.runs.progress import RunProgress
    from bessemer.train.trainer import Trainer

    clock = Clock()
    clock.watch(RolloutGenerator, "rollout", "sampling")
    clock.watch(FunctionAdvantage, "assign", "critic")
    clock.watch(Critic, "assign", "critic")
    clock.watch(Critic, "before_step", "critic")
    clock.watch(Trainer, "update", "update")
    clock.watch(Reference, "before_step", "update")
    clock.watch(Reference, "after_step", "update")
    parts = ("sampling", "critic", "update")
    curve = []

    class Curve(StageMetrics):
        def write(self, step, tokens, values):
            if "rl/heldout_pass_at_1" in values:
                trained = sum(clock.seconds.get(part, 0.0) for part in parts)
                curve.append({"step": step, "seconds": trained, "pass_at_1": values["rl/heldout_pass_at_1"]})
            super().write(step, tokens, values)

    clock.watch(Evaluator, "evaluate", "evaluation")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.toml").write_text(RECIPE.format(**vars(args)))
        (folder / "base").mkdir()
        (folder / "base" / "model").symlink_to(args.model.resolve())
        (folder / "arm").mkdir()
        recipe = Recipe.load(folder / "recipe.toml", [f"arm.{change}" for change in ARMS[args.arm]])
        ctx = StageContext(
            "arm", folder / "arm", {}, folder / "base", recipe, folder,
            Curve(Metrics(folder / "metrics.jsonl"), "arm"), RunProgress({}).begin("arm"), StopFlag(),
        )  # fmt: skip
        loop = rl_loop.Loop(recipe.stage("arm"), ctx, {})
        loop.run()
    held_sizes = {
        "policy": held_bytes(loop.trainer),
        "reference": sum(nbytes(t) for t in loop.policy.model.state_dict().values()),
    }
    if isinstance(loop.advantage, Critic):
        held_sizes["critic"] = held_bytes(loop.advantage.trainer)
    return {
        "seconds": {part: clock.seconds.get(part, 0.0) / args.rollouts for part in parts},
        "curve": curve,
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "held_mb": {name: size / 2**20 for name, size in held_sizes.items()},
    }


def nbytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def held_bytes(trainer) -> int:
    """Bytes of weights, gradients and moments."""
    return sum(
        nbytes(t) for group in trainer.optimizer.groups for t in (group.master, group.grad, *group.moments.values())
    )


def run_arm(args: argparse.Namespace, name: str, seed: int) -> dict:
    command = [sys.executable, __file__, str(args.model), "--arm", name, "--seed", str(seed)]
    for field in ("task", "rollouts", "prompts", "updates", "cap", "lr", "eval_every", "eval_problems"):
        command += [f"--{field.replace('_', '-')}", str(getattr(args, field))]
    done = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the arm {name!r} exited with status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarise(runs: list[dict]) -> dict:
    """Medians of costs, means of accuracies over seeds; `within`: accuracy reached in the seconds GRPO took."""
    summary = {}
    for name in ARMS:
        arm_runs = [run for run in runs if run["arm"] == name]
        group = {run["seed"]: run for run in runs if run["arm"] == "group"}
        within = []
        for run in arm_runs:
            limit = group[run["seed"]]["curve"][-1]["seconds"] * (1 + 1e-9)
            within.append([point for point in run["curve"] if point["seconds"] <= limit][-1]["pass_at_1"])
        seconds = {part: statistics.median(run["seconds"][part] for run in arm_runs) for part in arm_runs[0]["seconds"]}
        summary[name] = {
            "seconds_per_rollout": seconds | {"all": sum(seconds.values())},
            "peak_resident_mb": statistics.median(run["peak_resident_mb"] for run in arm_runs),
            "held_mb": arm_runs[0]["held_mb"] | {"all": sum(arm_runs[0]["held_mb"].values())},
            "pass_at_1_before": statistics.fmean(run["curve"][0]["pass_at_1"] for run in arm_runs),
            "pass_at_1_equal_rollouts": statistics.fmean(run["curve"][-1]["pass_at_1"] for run in arm_runs),
            "pass_at_1_equal_seconds": statistics.fmean(within),
            "each_seed": [run["curve"][-1]["pass_at_1"] for run in arm_runs],
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a model that solves some problems of the task")
    parser.add_argument("--task", default="countdown")
    parser.add_argument("--rollouts", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps per rollout")
    parser.add_argument("--cap", type=int, default=160, help="maximum tokens per completion")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--eval-every", type=int, default=5)
    parser.add_argument("--eval-problems", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(arm(args)))
        return
    runs = []
    for seed in range(1, args.seeds + 1):
        for name in ARMS:
            run = run_arm(args, name, seed)
            runs.append({"arm": name, "seed": seed, **run})
            seconds = " ".join(f"{part} {value:.2f}" for part, value in run["seconds"].items())
            print(
                f"{name} (seed {seed}): pass@1 {run['curve'][-1]['pass_at_1']:.3f}, {seconds} s per rollout", flush=True
            )
    summary = summarise(runs)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    printed = {key: value for key, value in settings.items() if key not in ("arm", "seed", "json", "model")}
    print(json.dumps({"settings": printed, "arms": summary}, indent=1))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": printed, "arms": summary, "runs": runs}, file, indent=1)


if __name__ == "__main__":
    main()
