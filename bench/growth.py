"""How training speed scales: tokens/s of `small` by row length, width, routed experts and rows, for both sides.

    python bench/growth.py --json bench/results/growth.json

One axis varies, the others stay at 16 rows of 256, width 256, 36 experts of which 4 are active. On the row-length axis
every step has 4,096 tokens. A step is as in `train_speed.py`, on one core or `--threads`; the sides take steps in turn.
The peer runs eagerly, in the faster of float32 and autocast: compiling it takes minutes per point and makes it 1.2 to
1.6 times as fast. Routing is real.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from typing import Any

import train_speed
from machine import processor

AXES: dict[str, list[tuple[float, tuple[int, int], dict[str, Any]]]] = {
    "row length": [(length, (4096 // length, length), {}) for length in (128, 256, 512, 1024, 2048, 4096)],
    "width": [
        (
            width,
            (16, 256),
            {"dim": width, "n_heads": width // 32, "inter_dim": width * 5 // 4, "moe_inter_dim": width // 2},
        )
        for width in (128, 256, 384, 512)
    ],
    "experts": [
        (n, (16, 256), {"n_routed_experts": n, "n_expert_groups": 1, "n_limited_groups": 1})
        for n in (8, 16, 32, 64, 128, 256)
    ],
    "rows": [(rows, (rows, 256), {}) for rows in (2, 4, 8, 16, 32)],
}
"""By axis: its value, rows and length of a step, and the preset fields that it changes."""


def point(args: argparse.Namespace, shape: tuple[int, int], fields: dict[str, Any]) -> dict[str, Any]:
    base = {"shape": list(shape), "set": {"max_seq_len": max(shape[1], 1024), **fields}}
    forms = [{"side": "ours", "compile": False, "mtp": False, "dtype": "auto"}]
    forms += [
        {"side": "peer", "dtype": dtype, "experts": "grouped_mm", "compile": False, "allocator": True}
        for dtype in ("float32", "autocast")
    ]
    ours, *peers = cases = [train_speed.Case(args, form | base) for form in forms]
    for case in cases:
        if case.error:
            raise SystemExit(f"{case.case}: {case.error}")
    for _ in range(args.steps):
        for case in cases:
            case.step()
    for case in cases:
        case.close()
    peer = max(peers, key=lambda case: case.rate)
    ratios = [b / a for a, b in zip(ours.seconds, peer.seconds, strict=True)]
    gflops = ours.facts["flops_per_token"] * ours.rate / 1e9
    return {
        "ours": ours.rate, "peer": peer.rate, "peer_dtype": peer.case["dtype"], "dtype": ours.facts["dtype"],
        "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "gflops": gflops,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--first", action="store_true", help="time the steps at real-time priority")
    parser.add_argument("--json", help="write the results here, after each point")
    args = parser.parse_args()
    args.preset = "small"
    results: dict[str, Any] = {"machine": processor(), "threads": args.threads, "steps": args.steps, "axes": {}}
    for axis in args.axes:
        for label, shape, fields in AXES[axis]:
            row = {"at": label, "load": os.getloadavg()[0], **point(args, shape, fields)}
            results["axes"].setdefault(axis, []).append(row)
            print(
                f"{axis} {label}: {row['ours']:,.0f} tokens/s, {row['gflops']:.0f} GFLOPS; peer {row['peer']:,.0f} "
                f"({row['peer_dtype']}); {row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
                flush=True,
            )
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
