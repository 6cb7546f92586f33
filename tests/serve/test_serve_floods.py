"""Floods of heads and bodies, before any key is checked: others are answered within a second, memory stays low."""

import asyncio
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from serving import error_of

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BLOCK = 1 << 16
HOST = "127.0.0.2"
"""Another loopback address, which only Linux has from the start."""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses another loopback address, reads /proc")


def body(data):
    return [POST + b"Content-Length: %d\r\n\r\n" % len(data) + data]


def endless(head, block):
    yield head
    while True:
        yield block


FLOODS = {  # what one connection sends
    "a header value without an end": lambda: endless(b"GET / HTTP/1.1\r\nHost: localhost\r\nx: ", b"x" * BLOCK),
    "a path without an end": lambda: endless(b"GET /", b"x" * BLOCK),
    "headers without an end": lambda: endless(b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"a:\r\n" * (BLOCK // 4)),
    "a thousand headers": lambda: [b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 1000 + b"\r\n"],
    "pipelined requests": lambda: endless(b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000),
    "empty lines": lambda: endless(b"", b"\r\n" * (BLOCK // 2)),
    "tiny chunks": lambda: endless(POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * (BLOCK // 6)),
    "a chunk's extension": lambda: endless(POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * BLOCK),
    "lists": lambda: body(b'{"prompt":[' + b"[]," * 1_299_000 + b"[]]}"),
    "numbers": lambda: body(b'{"prompt":[' + b"1," * 240_000 + b"1]}"),
    "strings": lambda: body(b'{"prompt":[' + b'"abcdefghij",' * 240_000 + b'""]}'),
    "messages": lambda: body(b'{"messages":[' + b"{}," * 70_000 + b"{}]}"),
    "echoes": lambda: body(b'{"max_tokens":0,"echo":true,"n":128,"prompt":[' + b'"a",' * 2047 + b'"a"]}'),
    "a text": lambda: body(b'{"prompt":"' + b"hello, " * 500_000 + b'"}'),
    "bodies without an end": lambda: [POST + b"Content-Length: 3900000\r\n\r\n" + b"x" * 3_800_000],
}


@pytest.fixture(scope="module")
def process(r1):
    options = f"host={HOST!r}, port=0, launch=serving.in_thread"
    code = f"import bessemer.addons.serve.server as s, serving; s.serve({str(r1)!r}, {options})"
    path = os.pathsep.join((os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        port = int(process.stdout.readline().split()[1].rsplit(":", 1)[1])
        for path, body in (("/v1/completions", {"prompt": "the fox", "max_tokens": 9}), ("/tokenize", {"prompt": "a"})):
            assert httpx.post(f"http://{HOST}:{port}{path}", json=body, timeout=60).status_code == 200
        yield process.pid, port
    finally:
        process.kill()
        process.wait()


def memory(pid, field):
    """In megabytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


async def attack(port, blocks, until):
    """One client: it sends, reads nothing, and reconnects when it is thrown out."""
    while time.monotonic() < until:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, port)
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                    for block in blocks():
                        writer.write(block)
                        await writer.drain()
                    await asyncio.sleep(0.2)
            except TimeoutError:
                pass
            finally:
                writer.transport.abort()


async def slowest(port, until):
    """The slowest of many calls of /health, in seconds."""
    worst = 0.0
    while time.monotonic() < until:
        started = time.monotonic()
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        worst = max(worst, time.monotonic() - started)
        writer.close()
        await asyncio.sleep(0.02)
    return worst


def test_a_server_accepts_the_host_it_was_bound_to(process):
    url = f"http://{HOST}:{process[1]}/health"
    assert httpx.get(url).status_code == 200
    answer = httpx.get(url, headers={"Host": "evil.example"})
    assert error_of(answer)["code"] == "unknown_host" and error_of(answer)["message"].endswith(f" or {HOST}")


def test_a_flood_delays_no_one_and_fills_no_queue(process):
    pid, port = process

    async def flood(blocks, seconds=0.6, clients=8):
        until = time.monotonic() + seconds
        worst, *_ = await asyncio.gather(slowest(port, until), *(attack(port, blocks, until) for _ in range(clients)))
        return worst

    before, slowest_seconds = memory(pid, "VmRSS"), {}
    for name, blocks in FLOODS.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
        worst = asyncio.run(flood(blocks))
        if worst >= 1.0:  # other load on this machine can do that, but not twice
            worst = asyncio.run(flood(blocks))
        slowest_seconds[name] = (round(worst, 2), round(memory(pid, "VmHWM") - before))
    print(slowest_seconds)
    assert all(worst < 1.0 and grown < 50 for worst, grown in slowest_seconds.values()), slowest_seconds
    answer = httpx.post(f"http://{HOST}:{port}/v1/completions", json={"prompt": "the fox", "max_tokens": 3})
    assert answer.status_code == 200
