"""The claims' arms at every size that has run: each metric, its interval over seeds and those of its controls.

    python claims/tools/sizes.py PART [--difference ARM NUMBER OTHER] [--arms NUMBER ARM OTHER] [--runs runs/claims]

Prints the committed results, and with --runs those of finished runs as well; `bessemer claims` prints only the
size that judges. --difference: also one number of an arm minus another, such as `long after switched` of the part long.
--arms: also one number of two arms, such as `bpb HASH ref` of the part pretrain, and their difference in each seed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bessemer.addons.evals.intervals import over_seeds
from bessemer_claims import PARTS, results, runs


def shown(values: Sequence[float] | None) -> str:
    if not values:
        return "none"
    if len(values) == 1:
        return f"{values[0]:+.4f} (1 seed)"
    middle, low, high = over_seeds(values)
    return f"{middle:+.4f} ({low:+.4f} to {high:+.4f}, {len(values)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--difference", nargs=3, metavar=("ARM", "NUMBER", "OTHER"))
    parser.add_argument("--arms", nargs=3, metavar=("NUMBER", "ARM", "OTHER"))
    parser.add_argument("--runs", type=Path)
    args = parser.parse_args()
    arm_results = [*results.committed().results, *(results.finished(args.runs).results if args.runs else [])]
    arm_results = [result for result in arm_results if result.part == args.part]
    part = runs.part(args.part)
    for shape, size in part.SIZES.items():
        of_shape = runs.Runs(result for result in arm_results if result.shape == shape)
        print(f"{shape}: {size[0]}")
        for (claim, metric), how in part.METRICS.items():
            if (result := how.measured(of_shape)) is not None:
                controls = f"should differ {shown(result.positive)}; should not {shown(result.negative)}"
                print(f"  {claim} {metric}: {shown(result.values)}; controls: {controls}")
        if args.difference and (seeds := of_shape.arms.get(args.difference[0])):
            arm, number, other = args.difference
            print(
                f"  {arm}, {number} - {other}: {shown([result[number] - result[other] for result in seeds.values()])}"
            )
        if args.arms and (pair := [of_shape.arms.get(arm) for arm in args.arms[1:]]) and all(pair):
            result, control = (
                {seed: arm_results[args.arms[0]] for seed, arm_results in arm.items()} for arm in pair if arm
            )
            for name, numbers in zip(args.arms[1:], (result, control), strict=True):
                print(f"  {name}, {args.arms[0]}: {shown(list(numbers.values()))}")
            differences = [result[seed] - control[seed] for seed in sorted(result.keys() & control.keys())]
            print(f"  difference: {shown(differences)}")


if __name__ == "__main__":
    main()
