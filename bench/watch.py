"""The live page on a long run: when it answers, when it has read everything, and how much memory it takes.

    python bench/watch.py [--lines 1000000] [--json bench/results/watch.json]

`bessemer watch` is started as a user starts it, on a run with one stage and that many lines of four metrics, and gets
the page's requests. Seconds are wall time from the start of the process, and processor time, which other work hardly
affects; memory is the largest resident size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from machine import processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_run(root, args.lines)
        measurements = measure(root, args.lines)
    results = {
        "machine": processor(),
        "load": os.getloadavg()[0],
        "lines": args.lines,
        "megabytes": size / 1e6,
    } | measurements
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def write_run(root: Path, lines: int) -> int:
    """Writes the run; returns the bytes of metrics.jsonl."""
    (root / "recipe.toml").write_text('name = "long"\n[[stage]]\nkind = "pretrain"\n')
    (root / "01-pretrain").mkdir()
    with open(root / "metrics.jsonl", "w") as file:
        for step in range(1, lines + 1):
            values = {"train/loss": round(8 / step, 5), "train/grad_norm": 3 + step % 7 / 10, "train/lr": 1e-3,
                      "train/tokens_per_second": 1000.5 + step % 50}  # fmt: skip
            line = {"time": 1.78e9 + step, "stage": "pretrain", "step": step, "tokens": 100 * step, "values": values}
            file.write(json.dumps(line) + "\n")
    return (root / "metrics.jsonl").stat().st_size


def measure(root: Path, lines: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bessemer", "watch", str(root), "--no-browser", "--port", "0"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[2]

        def ask(path: str) -> dict:
            with urllib.request.urlopen(url + path) as reply:
                return json.load(reply)

        def spent() -> dict[str, float]:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks = int(fields[11]) + int(fields[12])
            return {"seconds": time.perf_counter() - begin, "cpu_seconds": ticks / os.sysconf("SC_CLK_TCK")}

        with urllib.request.urlopen(url) as reply:
            reply.read()
        ask("api/state")
        first = spent()
        while (run := ask("api/state")["runs"][0])["reading"]:
            time.sleep(0.3)
        read = spent()
        assert run["version"] == f"0.{lines}", run["version"]
        begin_curve = time.perf_counter()
        ask("api/curves?stage=pretrain&panel=Training%20loss")
        curve = time.perf_counter() - begin_curve
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        return {"first_answer": first, "all_read": read, "curve_seconds": curve, "peak_mb": peak / 1e3}
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
