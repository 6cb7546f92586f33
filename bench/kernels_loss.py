"""The loss of a 300-step run with the C++ kernels and without, for several seeds: how far apart the two end.

    python bench/kernels_loss.py --json bench/results/kernels_loss.json
    python bench/kernels_loss.py --steps 300 --seeds 3 --dtype bfloat16

Each run trains `tiny` with its MTP module, Muon, on documents of the countdown task, 16 rows of 256 per step; a seed
chooses the initial weights and the documents, the same for both sides. The loss is that of fresh documents at the end
and the mean of the last 20 training steps. The control is the torch path with its micro-batches cut in half: the same
mathematics summed in another order, as a kernel does. Each run is a process of its own on one core. The --json file is
written after each run, and runs that it already holds are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import processor

ROWS, LENGTH, LAST = 16, 256, 20
SIDES = {"torch": ("off", 8), "torch, other order": ("off", 4), "kernels": ("auto", 8)}
"""Name: BESSEMER_KERNELS and the rows of a micro-batch."""


def run(seed: int, steps: int, micro_rows: int, dtype: str) -> dict:
    import torch

    from bessemer import tasks
    from bessemer.addons.accelerate.kernels import library
    from bessemer.config.training import PretrainConfig
    from bessemer.config.units import Points
    from bessemer.data.batch import Batch
    from bessemer.data.tokenizer import Tokenizer
    from bessemer.model.config import preset
    from bessemer.model.transformer import Transformer
    from bessemer.train import loss, objective, setup
    from bessemer.train.plan import TrainingPlan, constant
    from bessemer.train.trainer import Trainer

    setup.keep_memory()
    torch.set_num_threads(1)
    task = tasks.get("countdown")
    tokenizer = Tokenizer.train((task.document(i) for i in range(2000)), 2048)
    needed, stream, index = (steps + 4) * ROWS * LENGTH, [], seed * 1_000_000
    while len(stream) < needed:
        stream += [*tokenizer.encode(task.document(index)), tokenizer.eos_id]
        index += 1
    rows = torch.tensor(stream[:needed]).view(-1, ROWS, LENGTH)
    weight = torch.ones(ROWS, LENGTH)
    weight[:, 0] = 0
    trainer = Trainer(
        Transformer(preset("tiny")).initialise(seed), objective.next_token, None,
        PretrainConfig(kind="pretrain", optimizer="muon", lr=Points(3e-3), micro_rows=micro_rows),
        TrainingPlan(
            tokens=1, gamma=constant(1e-3), batch_rows=constant(ROWS), compute_dtype=getattr(torch, dtype),
            terms={"mtp_lambda": constant(0.3), "balance_alpha": constant(1e-4)},
        ),
    )  # fmt: skip
    losses, start = [], time.perf_counter()
    for step in range(steps):
        values = trainer.update(Batch(rows[step], weight).micro(micro_rows))
        losses.append(values["train/loss"])
    seconds = time.perf_counter() - start
    nats, tokens = loss.heldout_nats(trainer.model, [Batch(held, weight) for held in rows[steps:]])
    return {
        "heldout": nats / tokens, "last": statistics.mean(losses[-LAST:]), "losses": losses, "seconds": seconds,
        "kernels": library.status().instructions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--json", type=Path, default=Path("kernels_loss.json"), help="results, and where they resume")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(int(args.run[0]), args.steps, int(args.run[1]), args.dtype)))
        return

    settings = {"steps": args.steps, "dtype": args.dtype}
    stored = json.loads(args.json.read_text()) if args.json.exists() else settings | {"runs": []}
    if {name: stored[name] for name in settings} != settings:
        parser.error(f"{args.json} holds runs of other settings; name another file")
    results = {(run_of["side"], run_of["seed"]): run_of for run_of in stored["runs"]}

    def process(job: tuple[str, int]) -> None:
        kernels, micro_rows = SIDES[job[0]]
        environment = dict(os.environ, OMP_NUM_THREADS="1", BESSEMER_KERNELS=kernels)
        command = [sys.executable, __file__, "--steps", str(args.steps), "--dtype", args.dtype, "--run"]
        command += [str(job[1]), str(micro_rows)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{job[0]:20} seed {job[1]}: held-out {result['heldout']:.5f}, last {result['last']:.5f}, "
              f"{result['seconds']:.0f} s ({result['kernels']})", flush=True)  # fmt: skip
        results[job] = {"side": job[0], "seed": job[1], **result}
        args.json.write_text(json.dumps({"machine": processor(), **settings, "runs": list(results.values())}, indent=1))

    jobs = [(side, seed) for seed in range(args.seeds) for side in SIDES]
    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(process, [job for job in jobs if job not in results]))
    gaps = {
        side: {
            kind: [results[side, seed][kind] / results["torch", seed][kind] - 1 for seed in range(args.seeds)]
            for kind in ("heldout", "last")
        }
        for side in list(SIDES)[1:]
    }
    for side, kinds in gaps.items():
        for kind, values in kinds.items():
            print(f"{side:20} {kind:8} against torch: {', '.join(f'{100 * value:+.3f} %' for value in values)}")
    args.json.write_text(json.dumps(json.loads(args.json.read_text()) | {"gaps": gaps}, indent=1))


if __name__ == "__main__":
    main()
