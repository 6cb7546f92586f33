"""Compares two runs of one recipe bit for bit, to check that a refactoring changed nothing.

    python bench/same_run.py OLD_RUN NEW_RUN

Corpora, weights, tokenizers, rollouts, samples and evaluation results must be equal byte for byte; metric lines must be
equal except for seconds and speeds. `RENAMED` maps metric names that a version changed intentionally.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

COMPARED = (
    "*/model/*.safetensors",
    "*/model/*.json",
    "*/model/*.jinja",
    "*/rollouts.jsonl",
    "*/results.json",
    "*/samples.md",
    "*/*/train-*.tokens",
    "*/tokenizer/*.json",
)
RENAMED: dict[str, str] = {}
"""Old metric name -> new one."""
ADDED = frozenset({"rl/sampler_far"})
"""Metrics that older runs lack; they are not compared."""


def metric_lines(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl; a partly written last line is ignored."""
    path = run / "metrics.jsonl"
    complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in complete.splitlines()]


def metrics(run: Path) -> list[tuple]:
    """Metric lines without values that depend on the clock."""
    return [
        (
            line["stage"],
            line["step"],
            line["tokens"],
            {
                RENAMED.get(k, k): v
                for k, v in line["values"].items()
                if k not in ADDED and "per_second" not in k and "seconds" not in k
            },
        )
        for line in metric_lines(run)
    ]


def differences(a: Path, b: Path) -> list[str]:
    """The names of files that differ between two runs, and the first metric line that differs."""
    names = sorted({path.relative_to(run) for run in (a, b) for p in COMPARED for path in run.glob(p)})
    if not names:
        raise SystemExit(f"nothing to compare in {a} and {b}")
    missing = [str(n) for n in names if not ((a / n).exists() and (b / n).exists())]
    differing = [str(n) for n in names if str(n) not in missing and (a / n).read_bytes() != (b / n).read_bytes()]
    old_lines, new_lines = metrics(a), metrics(b)
    if old_lines != new_lines:
        at = next((x for x, y in zip(old_lines, new_lines, strict=False) if x != y), None)
        differing.append(f"metrics.jsonl ({len(old_lines)} and {len(new_lines)} lines), first at {at and at[:2]}")
    result = missing + differing
    print(f"compared {len(names)} files and {len(old_lines)} metric lines: {len(result)} differ", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    if result := differences(args.old, args.new):
        print(*result, sep="\n")
        sys.exit(1)
    print("identical, bit for bit")


if __name__ == "__main__":
    main()
