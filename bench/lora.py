"""Time and memory of training steps with LoRA beside full training of the same model, on this machine.

    bessemer run smollm2 --out runs/smollm2               # stop it after the stage import
    python bench/lora.py runs/smollm2/01-import/model --json bench/results/lora.json

A step is forward, backward, clip and AdamW on ROWS rows of LENGTH random tokens in float32, through the trainer. The
SFT cases train the next token; the GRPO cases also compute log-probabilities under the reference, which full training
keeps as a second network; a step excludes sampling. Each case runs in its own process on one core, and the cases
alternate `--rounds` times, so that other work slows all of them; the load average at each start is recorded.

Other work hardly affects `cpu_seconds`. `peak` is the largest resident size during the steps, after loading; `held` the
trained weights with their gradients and moments; `checkpoint` the tensors of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = ("sft-full", "sft-lora", "grpo-full", "grpo-lora")
ROWS, LENGTH = 2, 256


def measure(case: str, folder: Path, steps: int, rank: int) -> dict[str, float]:
    import torch

    from bessemer.addons.accelerate import gpu_faults
    from bessemer.addons.families import lora
    from bessemer.addons.families.causal_lm import load
    from bessemer.config.rl import RLConfig
    from bessemer.config.training import LoRAConfig
    from bessemer.config.units import Points
    from bessemer.data.batch import Batch
    from bessemer.rl.losses import GRPO
    from bessemer.rl.reference import Reference
    from bessemer.train import setup
    from bessemer.train.objective import next_token
    from bessemer.train.plan import TrainingPlan, constant
    from bessemer.train.runtime import Runtime
    from bessemer.train.trainer import Trainer

    torch.set_num_threads(1)
    setup.keep_memory()
    model = load(folder, "float32")
    if case.endswith("lora"):
        model = lora.attach(model, LoRAConfig(rank=rank), 0, folder, case)
    config = RLConfig(kind="rl", name=case, tasks=["sums"], lr=Points(1e-5))
    grpo = case.startswith("grpo")
    terms = {} if grpo else {"mtp_lambda": constant(0.0), "balance_alpha": constant(0.0)}
    with tempfile.TemporaryDirectory() as state:
        objective = GRPO(kl=0.001) if grpo else next_token
        trainer = Trainer(model, objective, None, config, TrainingPlan(terms=terms), Path(state))
        reference = Reference(trainer, Runtime(), folder, 400, 1.0) if grpo else None
        generator = torch.Generator().manual_seed(0)
        seconds, cpu = [], []
        reset_peak()
        for _ in range(steps + 1):
            tokens = torch.randint(5, model.cfg.vocab_size, (ROWS, LENGTH), generator=generator)
            weights = torch.ones(ROWS, LENGTH)
            weights[:, 0] = 0.0
            batch, start, used = Batch(tokens, weights), time.perf_counter(), time.process_time()
            if reference is not None:
                reference.before_step([batch])
                advantage = torch.tensor([1.0, -1.0])[:, None].expand(ROWS, LENGTH).contiguous()
                batch.extras |= {"old_logp_BT": batch.extras["ref_logp_BT"], "advantage_BT": advantage}
            trainer.update([batch])
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
        held_bytes = gpu_faults.held(trainer.optimizer.groups)
        return {
            "seconds": statistics.median(seconds[1:]),
            "cpu_seconds": statistics.median(cpu[1:]),
            "peak_mb": status("VmHWM") / 1e3,
            "held_mb": sum(held_bytes.values()) / 1e6,
            "checkpoint_mb": trainer.state().bytes() / 1e6,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }


def reset_peak() -> None:
    """From now on VmHWM is the largest resident size since this call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def status(name: str) -> int:
    """A figure of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.model, options.steps, options.rank)))
        return
    measurements: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            load_average = os.getloadavg()[0]
            command = [sys.executable, __file__, str(options.model), "--case", case, "--steps", str(options.steps)]
            command += ["--rank", str(options.rank)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(done.stderr)
            measurements[case].append(json.loads(done.stdout.splitlines()[-1]) | {"load": load_average})
            print(case, measurements[case][-1], flush=True)
    if options.json:
        facts = {"machine": platform.processor() or platform.machine(), "rows": ROWS, "length": LENGTH}
        facts |= {"rank": options.rank, "steps": options.steps, "rounds": measurements}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
