"""A server under 300 streams for minutes: is anything lost, and does its memory grow?

    python bench/serve_soak.py MODEL [--streams 300] [--seconds 600] [--out FILE]

That many clients hold one stream each at all times: a client asks again once it has its answer, every tenth request is
abandoned midway, and every twentieth asks for JSON. Memory (resident, server and model processes) is sampled every
second. The figure is its growth from the mean of the second fifth of the time to that of the last; the first fills the
caches. Lost: a stream that ends without [DONE] though its client stayed, or an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from machine import processor
from serve_streams import question


async def client(port: int, n: int, tokens: int, until: float, counts: Counter[str]) -> None:
    """Opens one stream after another."""
    number = 0
    while time.monotonic() < until:
        number += 1
        kind = n + number
        body = {"messages": [{"role": "user", "content": question(kind % 1000)}], "stream": True, "max_tokens": tokens}
        body |= {"response_format": {"type": "json_object"}, "thinking": False} if kind % 20 == 0 else {}
        data, leaves = json.dumps(body).encode(), kind % 10 == 5
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = (
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
            )
            writer.write(head + data)
            if leaves:
                await reader.read(2000)
                counts["left"] += 1
            else:
                raw = await reader.read()
                is_complete = b"data: [DONE]" in raw and b'"error"' not in raw
                counts["whole" if is_complete else "lost"] += 1
            writer.close()
        except OSError:
            counts["lost"] += 1


def resident(pid: int) -> float:
    """Megabytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def soak(port: int, pids: list[int], streams: int, tokens: int, seconds: float) -> tuple[Counter[str], list]:
    until, counts = time.monotonic() + seconds, Counter(whole=0, left=0, lost=0)
    samples: list[list[float]] = []

    async def watch() -> None:
        while time.monotonic() < until:
            samples.append([resident(pid) for pid in pids])
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(port, 37 * n, tokens, until, counts) for n in range(streams)))
    return counts, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve_soak.json")
    args = parser.parse_args()
    config = f"ServeConfig(rows=64, waiting={args.streams}, threads=1)"
    code = (
        "from bessemer.addons.serve.server import serve; from bessemer.addons.serve import ServeConfig\n"
        f"serve({args.model!r}, port=0, config={config})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline().split()[1].rsplit(":", 1)[1])
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        pids = [process.pid, int(worker)]
        counts, samples = asyncio.run(soak(port, pids, args.streams, args.tokens, args.seconds))
    finally:
        process.terminate()
        status = process.wait(60)
    fifth = len(samples) // 5
    growth = {}
    for name, column in zip(("server", "model"), zip(*samples, strict=True), strict=True):
        early, late = statistics.mean(column[fifth : 2 * fifth]), statistics.mean(column[-fifth:])
        growth[name] = {"early_mb": round(early, 1), "late_mb": round(late, 1), "growth": round(late / early - 1, 4)}
    result = {
        "streams": args.streams, "tokens_each": args.tokens, "seconds": args.seconds, **counts, "exit_status": status,
        "memory": growth, "load_average": os.getloadavg()[0], "cores": os.cpu_count(), "processor": processor(),
        "model": Path(args.model).name,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
