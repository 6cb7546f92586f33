"""200 concurrent streams through the server against the same requests in a bare scheduler.

    python bench/serve_streams.py MODEL [--streams 200] [--tokens 96] [--rounds 3] [--out FILE]

Every round runs two cases in turn, each in a fresh process: the bare scheduler with all requests, and the server with a
client that opens all streams at once. Overhead is the extra time of the server from the first request to the last
token. On a busy machine the wall time mostly reflects other work, so processor time is reported too: that of the
model's process, which is the relevant figure when the server has its own core, and that of the server's process.

Lost: a stream without [DONE], or with a number of tokens other than requested. Mixed: a text that differs from that of
the same request run alone in an engine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from machine import processor

SAMPLING = {"temperature": 0.8, "top_p": 0.95}
WORDS = ["water", "iron", "coal", "steam", "glass", "stone", "river", "mill", "forge", "tower"]


def question(n: int) -> str:
    return f"How many {WORDS[n % 10]} and {WORDS[n // 10 % 10]} are {n} and {7 * n % 41}?"


def body(n: int, tokens: int) -> dict:
    return {
        "messages": [{"role": "user", "content": question(n)}], "seed": n, "max_tokens": tokens, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "reasoning_format": "none", **SAMPLING,
    }  # fmt: skip


def engine_and_requests(model: str, streams: int, tokens: int):
    """The engine, and the requests as the server builds them."""
    import torch

    from bessemer.addons.families.named_models import model_dir
    from bessemer.addons.serve.requests import ServedRequest as Request
    from bessemer.data.chat import question_ids
    from bessemer.engine.engine import load_engine
    from bessemer.engine.generation import prompt_digest
    from bessemer.engine.random_streams import stream_key
    from bessemer.engine.sequence import SamplingParams

    torch.set_num_threads(1)
    engine = load_engine(model_dir(model))
    prompts = [tuple(question_ids(engine.tokenizer, question(n))) for n in range(streams)]
    built = [
        Request(ids, stream_key(n, prompt_digest(ids), 0), tokens, SamplingParams(**SAMPLING))
        for n, ids in enumerate(prompts)
    ]
    return engine, built


def bare(model: str, streams: int, tokens: int) -> dict:
    """Runs all requests in a bare scheduler."""
    from bessemer.addons.serve.fair_queue import FairQueue
    from bessemer.addons.serve.requests import Token
    from bessemer.addons.serve.scheduler import Scheduler

    engine, requests = engine_and_requests(model, streams, tokens)
    engine.generate([requests[0].prompt], max_new_tokens=2, **SAMPLING)  # initialises whatever is created on first use
    gc.freeze()  # as the server does
    scheduler = Scheduler(engine, rows=streams, queue=FairQueue())
    start, cpu = time.perf_counter(), time.process_time()
    for request in requests:
        scheduler.add(request)
    generated = 0
    while not scheduler.is_idle:
        generated += sum(type(event) is Token for event in scheduler.step())
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "tokens": generated}


def alone(model: str, streams: int, tokens: int) -> list[str]:
    """The text of every request run alone."""
    engine, requests = engine_and_requests(model, streams, tokens)
    opening = engine.tokenizer.opening
    return [
        opening
        + engine.generate(
            [request.prompt], seed=n, max_new_tokens=tokens, stop_ids=[], **SAMPLING
        )[0][0].text
        for n, request in enumerate(requests)
    ]  # fmt: skip


def served(model: str, streams: int, tokens: int) -> dict:
    """Sends all requests at once over HTTP."""
    config = f"ServeConfig(rows={streams}, waiting={streams})"
    code = (
        "from bessemer.addons.serve.server import serve; from bessemer.addons.serve import ServeConfig\n"
        f"serve({model!r}, port=0, config={config})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline().split()[1].rsplit(":", 1)[1])
        asyncio.run(ask(port, 0, 2, time.perf_counter()))  # initialises whatever is created on first use
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        pids = (process.pid, int(worker))
        before, start = list(map(cpu_seconds, pids)), time.perf_counter()
        streams_read = asyncio.run(ask_all(port, streams, tokens))
        seconds = max(stream["ended"] for stream in streams_read) - start
        server, model = (cpu_seconds(pid) - first for pid, first in zip(pids, before, strict=True))
        return {"seconds": seconds, "server_cpu": server, "model_cpu": model, "streams": streams_read}
    finally:
        process.terminate()
        process.wait(60)


async def ask_all(port: int, streams: int, tokens: int) -> list[dict]:
    start = time.perf_counter()
    return await asyncio.gather(*(ask(port, n, tokens, start) for n in range(streams)))


async def ask(port: int, n: int, tokens: int, start: float) -> dict:
    """Reads one stream as it arrives; it is parsed later, so that the client costs little."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body(n, tokens)).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    )
    parts, first = [], None
    while part := await reader.read(1 << 16):
        parts.append((time.perf_counter(), part))
        if first is None and b'"delta":{"content":' in part:
            first = parts[-1][0]
    writer.close()
    raw = b"".join(part for _, part in parts)
    pauses = [later - sooner for (sooner, _), (later, _) in pairwise(parts[1:])]
    return {
        "raw": raw,
        "ended": parts[-1][0],
        "first": (first or parts[-1][0]) - start,
        "pause": max(pauses, default=0.0),
    }


def parse_stream(raw: bytes) -> tuple[str, int, bool]:
    """(text, number of tokens, whether the stream ended with [DONE])."""
    body, joined = raw.split(b"\r\n\r\n", 1)[1], b""
    while body:
        size, body = body.split(b"\r\n", 1)
        joined, body = joined + body[: int(size, 16)], body[int(size, 16) + 2 :]
    events = [event for event in joined.split(b"\n\n") if event.startswith(b"data: ")]
    chunks = [json.loads(event[6:]) for event in events if event != b"data: [DONE]"]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk.get("choices", ()))
    usage = next((chunk["usage"] for chunk in chunks if chunk.get("usage")), {"completion_tokens": 0})
    return text, usage["completion_tokens"], bool(events) and events[-1] == b"data: [DONE]"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_a_process(what: str, *arguments: object) -> object:
    """Calls a function of this file in a fresh interpreter."""
    code = f"import json, serve_streams as s; print(json.dumps(s.{what}(*{arguments!r})))"
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve_streams.json")
    args = parser.parse_args()
    size = (args.model, args.streams, args.tokens)
    expected = in_a_process("alone", *size)
    lost = mixed = 0
    rounds = []
    for _ in range(args.rounds):
        bare, served_run = in_a_process("bare", *size), served(*size)
        for text, stream in zip(expected, served_run["streams"], strict=True):
            tokens_read, count, ended = parse_stream(stream["raw"])
            lost += not ended or count != args.tokens
            mixed += tokens_read != text
        firsts = sorted(stream["first"] for stream in served_run["streams"])
        rounds.append({
            "bare_seconds": bare["seconds"], "served_seconds": served_run["seconds"],
            "bare_cpu_seconds": bare["cpu_seconds"], "model_cpu_seconds": served_run["model_cpu"],
            "server_cpu_seconds": served_run["server_cpu"], "overhead": served_run["seconds"] / bare["seconds"] - 1,
            "model_cpu_overhead": served_run["model_cpu"] / bare["cpu_seconds"] - 1,
            "first_token_median": statistics.median(firsts), "first_token_95": firsts[int(0.95 * len(firsts))],
            "longest_pause": max(stream["pause"] for stream in served_run["streams"]),
        })  # fmt: skip
        print(json.dumps({key: round(value, 3) for key, value in rounds[-1].items()}), flush=True)
    middle = {key: statistics.median(bare[key] for bare in rounds) for key in rounds[0]}
    total = args.streams * args.tokens
    result = {
        "streams": args.streams, "tokens_each": args.tokens, "lost": lost, "mixed": mixed,
        "bare_tokens_per_second": total / middle["bare_seconds"],
        "served_tokens_per_second": total / middle["served_seconds"],
        "median": middle, "rounds": rounds, "load_average": os.getloadavg()[0], "cores": os.cpu_count(),
        "processor": processor(), "threads": 1, "dtype": "float32",
        "model": Path(args.model).name,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"lost {lost}, mixed {mixed}, overhead {middle['overhead']:.1%} "
        f"(processor time of the model's process {middle['model_cpu_overhead']:.1%})"
    )


if __name__ == "__main__":
    main()
