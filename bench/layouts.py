"""The same pre-training under several layouts, and resumed under a different one: does the curve change?

    python bench/layouts.py --out runs/layouts [--recipe recipes/tiny.toml] [--tokens 120K] [--json FILE]

The corpus is built once. Every layout then pre-trains from the same weights. Rows named "A, then B" are stopped by
SIGTERM half-way and resumed under the second layout. Reported: the largest relative difference of the loss from that of
one process, over the first 20 steps and over all steps, and held-out bits per byte at the end.
"""

import argparse
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LAYOUTS: dict[str, list[str]] = {
    "one process": [],
    "dp 2": ["layout.dp=2"],
    "cp 2": ["layout.cp=2"],
    "ep 2": ["layout.ep=2"],
    "pp 2, 1f1b": ["layout.pp=2", "layout.schedule=1f1b"],
    "pp 2, dualpipe": ["layout.pp=2", "layout.schedule=dualpipe"],
    "pp 2 x ep 2, zb1p": ["layout.pp=2", "layout.ep=2", "layout.schedule=zb1p"],
}
CHANGES = [("pp 2, dualpipe", "ep 2"), ("ep 2", "one process"), ("one process", "pp 2 x ep 2, zb1p")]


def start(args: argparse.Namespace, out: Path, layout: str) -> subprocess.Popen:
    sets = [
        f"pretrain.tokens={args.tokens}",
        "pretrain.sample_every=1B",
        "pretrain.precision=float32",
        *LAYOUTS[layout],
    ]
    command = [sys.executable, "-m", "bessemer", "run", str(args.recipe), "--out", str(out), "--until", "pretrain"]
    return subprocess.Popen(
        [*command, *(word for override in sets for word in ("--set", override))], stdout=subprocess.DEVNULL,
        stderr=open(out.with_suffix(".log"), "a"),
    )  # fmt: skip


def lines(out: Path, key: str) -> dict[int, float]:
    records = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: x["values"][key] for x in records if x["stage"] == "pretrain" and key in x["values"]}


def row(name: str, out: Path, base: Path, seconds: float) -> dict:
    actual, expected = lines(out, "train/loss"), lines(base, "train/loss")
    assert list(actual) == list(expected), f"{name}: steps are missing or duplicated"
    gap = {step: abs(actual[step] - loss) / loss for step, loss in expected.items()}
    parts = json.loads((out / "02-pretrain" / "done.json").read_text())["summary"]
    bits = {key: value for key, value in parts.items() if key.startswith("bpb_")}
    return {"layout": name, "steps": len(actual), "first_20": max(list(gap.values())[:20]), "all": max(gap.values()),
            "last_loss": actual[max(actual)], **bits, "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny.toml"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="120K")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    first = next(iter(LAYOUTS))
    base, rows = args.out / "base", []
    corpus = [sys.executable, "-m", "bessemer", "run", str(args.recipe), "--out", str(base), "--until", "corpus"]
    subprocess.run(corpus, check=True, stdout=subprocess.DEVNULL)
    base_run = args.out / "run-0"
    for number, (name, change) in enumerate([*((name, None) for name in LAYOUTS), *CHANGES]):
        out = args.out / f"run-{number}"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out)
        began = time.monotonic()
        process = start(args, out, name)
        if change is not None:
            total = len(lines(base_run, "train/loss"))
            while len(lines(out, "train/loss")) < total // 2:
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 130, f"see {out.with_suffix('.log')}"
            process = start(args, out, change)
        assert process.wait() == 0, f"see {out.with_suffix('.log')}"
        rows.append(row(name if change is None else f"{name}, then {change}", out, base_run, time.monotonic() - began))
        print(" ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in
                       rows[-1].items()), flush=True)  # fmt: skip
    assert rows[0]["layout"] == first and rows[0]["all"] == 0
    if args.json:
        facts = {"recipe": str(args.recipe), "tokens": args.tokens, "dtype": "float32", "machine": platform.processor()}
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
