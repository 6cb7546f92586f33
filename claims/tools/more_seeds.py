"""Runs the seeds of pre-training arms that arms.toml plans and the committed results lack, seed by seed, at full size.

    python claims/tools/more_seeds.py NL NS ref DACT MTP [--runs runs/claims] [--at-once 1] [--dry-run]

All named arms of a seed run before any of the next, and are then added to the committed results. After a kill the same
command resumes. `python claims/tools/page.py` then makes the page.
"""

import argparse
import sys
from pathlib import Path

from bessemer_claims import pretrain, results, runner
from bessemer_claims.runs import ArmJob

SHAPE = pretrain.SHAPE["full"]


def lacking(arms: list[str]) -> dict[int, list[ArmJob]]:
    """Seed -> its jobs without committed results, in the order of the arms' names given; the corpora are seed 0's."""
    held = {
        (result.arm, result.seed) for result in results.committed(results.COMMITTED).results if result.shape == SHAPE
    }
    planned = pretrain.jobs("full")
    jobs = {(job.arm, job.seed): job for job in planned if job.shape == SHAPE or job.arm == pretrain.CORPUS}
    if unknown := set(arms) - {arm for arm, _ in jobs}:
        sys.exit(f"no arm {', '.join(sorted(unknown))} in arms.toml")
    most = max(seed for _, seed in jobs)
    chosen = {
        seed: [jobs[arm, seed] for arm in arms if (arm, seed) in jobs and (arm, seed) not in held]
        for seed in range(1, most + 1)
    }
    return {0: [jobs[pretrain.CORPUS, 0]]} | {seed: of_seed for seed, of_seed in chosen.items() if of_seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="+", metavar="ARM")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"))
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    for seed, jobs in lacking(args.arms).items():
        if args.dry_run:
            print(f"seed {seed}: {' '.join(job.arm for job in jobs)}, {sum(job.minutes for job in jobs):.0f} minutes")
            continue
        if failed := runner.run(jobs, "full", args.runs, args.at_once, lambda line: print(line, flush=True)):
            sys.exit("; ".join(f"{failure.job.name}: {failure.why}" for failure in failed))
        finished = [results.of_job(job, args.runs / job.name) for job in jobs if job.arms]
        results.save([result for result in finished if result is not None], results.COMMITTED)


if __name__ == "__main__":
    main()
