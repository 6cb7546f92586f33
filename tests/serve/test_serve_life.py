"""Slots, queues, connections, failures and shutdown of a server."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import connection as pipes
from types import SimpleNamespace

import httpx
import openai
import pytest
from serving import error_of, in_thread, running, write_model

from bessemer.addons.families.conversion import convert
from bessemer.addons.families.named_models import model_dir
from bessemer.addons.serve import ServeConfig, service, worker
from bessemer.addons.serve.connections import Connection, ConnectionLimits
from bessemer.addons.serve.models import find_models
from bessemer.addons.serve.protocol import ApiError
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.errors import UserError

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "the fox"}], "ignore_eos": True, "stream": True}
"""Runs to the end of the context, some 150 tokens."""


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Adds `steps.seconds` to each step of a model in a thread, as if it were larger, because these tests need requests
    to overlap. A test that needs an answer to last longer raises it."""
    step, pace = Scheduler.step, SimpleNamespace(seconds=0.003)

    def slowly(self):
        time.sleep(pace.seconds)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slowly)
    return pace


def request(body, path=CHAT):
    """The request as bytes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def raw_request(port, body, path=CHAT):
    plug = socket.create_connection(("127.0.0.1", port))
    plug.sendall(request(body, path))
    return plug


def wait_for(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_a_client_that_vanishes_frees_its_slot(r1, steps):
    steps.seconds = 0.05
    with running(r1) as server:
        cancelled = [
            raw_request(server.port, LONG | {"stream": stream, "n": 3}) for stream in (True, False) for _ in range(2)
        ]
        wait_for(lambda: server.open_samples == 12)
        stats = server.models.loaded["r1"].service.stats
        wait_for(lambda: stats.scheduler.get("running", 0) == 12)
        for plug in cancelled:
            plug.close()
        assert server.settles() and stats.generated < 12 * 140, "nobody decoded to the end"
        assert 'status="499"' in httpx.get(server.url + "/metrics").text


def test_a_client_that_vanishes_is_not_scored_to_the_end(r1, monkeypatch):
    """The texts of a request are scored batch by batch, and hold one place throughout."""
    score, calls, go_on = worker.score, [], threading.Event()

    def slowly(engine, prompts, top):
        calls.append(len(prompts))
        assert go_on.wait(30)
        return score(engine, prompts, top)

    monkeypatch.setattr(worker, "score", slowly)
    monkeypatch.setattr(worker, "BATCH_TOKENS", 2)
    body = {"prompt": ["the fox"] * 20, "max_tokens": 0, "echo": True, "logprobs": 1}
    with running(r1, config=ServeConfig(rows=1, waiting=0)) as server:
        plug = raw_request(server.port, body, "/v1/completions")
        wait_for(lambda: calls)
        answer = server.post("/v1/completions", **body)
        assert answer.status_code == 429 and error_of(answer)["code"] == "queue_full"
        plug.close()
        wait_for(lambda: not server.server.limiter.open)
        go_on.set()
        assert server.settles() and len(calls) < 3
        assert 'status="499"' in httpx.get(server.url + "/metrics").text
        assert server.post("/v1/completions", **body).status_code == 200 and sum(calls) >= 20


def test_a_full_queue_is_refused_and_drains(r1, steps):
    steps.seconds = 0.03
    with running(r1, config=ServeConfig(rows=2, waiting=3)) as server:
        plugs = [raw_request(server.port, LONG) for _ in range(5)]
        wait_for(lambda: server.open_samples == 5)
        answer = server.chat(max_tokens=1)
        assert answer.status_code == 429 and error_of(answer)["code"] == "queue_full"
        assert error_of(answer)["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) >= 1
        api = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            api.completions.create(model="r1", prompt="a")
        plugs.pop().close()
        wait_for(lambda: server.open_samples == 4)
        plugs.append(raw_request(server.port, LONG))
        wait_for(lambda: server.open_samples == 5)
        for plug in plugs:
            plug.close()
        assert server.settles() and server.chat(max_tokens=1).status_code == 200


def test_a_thousand_half_open_connections(r1):
    """Silent ones, half a header, half a body: all are closed in time, and no other request waits for them."""
    with running(r1, limits=ConnectionLimits(request_seconds=3.0, connections=600)) as server:
        starts = (b"", b"POST /v1/chat/comp", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
                  b"Content-Type: application/json\r\n\r\n{")  # fmt: skip
        plugs = []
        for n in range(1000):
            plug = socket.create_connection(("127.0.0.1", server.port))
            plug.sendall(starts[n % 3])
            plugs.append(plug)
        assert server.chat(max_tokens=2).status_code == 200
        wait_for(lambda: len(server.server.server_state.connections) < 600)
        statuses = set()
        for plug in plugs:
            plug.settimeout(10)
            try:
                reply = plug.recv(4096)
            except ConnectionResetError:
                reply = b""
            assert reply == b"" or b"request_timeout" in reply or b"too_many_connections" in reply, reply
            statuses.add(reply[:12])
            plug.close()
        assert statuses - {b""} == {b"HTTP/1.1 408", b"HTTP/1.1 503"}
        assert server.chat(max_tokens=2).status_code == 200
        wait_for(lambda: len(server.server.server_state.connections) == 0)


def receive(plug):
    """The status and JSON of one answer."""
    data = b""
    while b"\r\n\r\n" not in data or len(data.split(b"\r\n\r\n", 1)[1]) < length(data):
        part = plug.recv(65536)
        assert part, data
        data += part
    return int(data.split()[1]), json.loads(data.split(b"\r\n\r\n", 1)[1])


def length(answer):
    return int(answer.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])


def test_a_connection_serves_one_request_after_another(r1):
    """Refused and pipelined ones too, for longer than one request may take; a late or broken body closes it."""
    short = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 1}
    chunked = request({}).replace(b"Content-Length: 2", b"Transfer-Encoding: chunked").removesuffix(b"{}")
    with running(r1, limits=ConnectionLimits(request_seconds=1.0)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plug:
            for _ in range(4):
                plug.sendall(request(short).replace(b"application/json", b"text/plain"))
                assert receive(plug)[0] == 415
                plug.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert receive(plug)[0] == 200
                time.sleep(0.4)
            plug.sendall(request(short) + request(short)[:-1])
            assert receive(plug)[0] == 200
            status, body = receive(plug)
            assert status == 408 and body["error"]["code"] == "request_timeout" and plug.recv(99) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plug:
            plug.sendall(chunked)
            time.sleep(0.2)
            plug.sendall(b"this is no length\r\n")
            status, body = receive(plug)
            assert status == 400 and body["error"]["code"] == "invalid_http" and plug.recv(99) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plug:
            plug.sendall(chunked.replace(b"/v1/chat", b"/v1/none"))
            assert receive(plug)[0] == 404
            plug.sendall(b"this is no length\r\n")  # part of the body of an answered request
            with suppress(ConnectionResetError):
                assert plug.recv(99) == b""
        wait_for(lambda: len(server.server.server_state.connections) == 0)
        limiter = server.server.limiter
        assert limiter.open == 0 and limiter.unread_bytes == 0 and not limiter.incomplete


def test_a_client_that_does_not_read_is_dropped(r1):
    with running(r1, limits=ConnectionLimits(unread_seconds=0.5)) as server:
        plug = socket.socket()
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        plug.connect(("127.0.0.1", server.port))
        body = {"prompt": "the fox", "max_tokens": 150, "n": 64, "stream": True, "ignore_eos": True, "logprobs": 20}
        plug.sendall(request(body, "/v1/completions"))
        wait_for(lambda: server.open_samples == 64)
        assert server.settles(30)
        wait_for(lambda: len(server.server.server_state.connections) == 0)
        plug.close()


def test_a_client_that_does_not_read_the_end_is_dropped_too(r1, monkeypatch):
    """What is left of a closed connection's answer fits into asyncio's buffer, so that nobody is paused."""
    paused = []
    monkeypatch.setattr(Connection, "pause_writing", paused.append)
    with running(r1, limits=ConnectionLimits(unread_seconds=0.3)) as server, socket.socket() as plug:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        plug.connect(("127.0.0.1", server.port))
        plug.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = plug.recv(1024)
        wait_for(lambda: server.server.limiter.open == 0)
        plug.settimeout(10)
        with suppress(ConnectionResetError):
            while part := plug.recv(1024):
                received += part
        assert len(received.split(b"\r\n\r\n", 1)[1]) < length(received) and not paused


def test_a_failed_step_ends_only_the_requests_in_it(r1, steps, monkeypatch):
    """The running answer ends with an error event. A request that had not begun moves to the new scheduler. A request
    that breaks every scheduler ends too."""
    steps.seconds = 0.02
    step, fuse = Scheduler.step, threading.Event()

    def broken(self):
        if fuse.is_set() or any("poison" in client for client in clients(self)):
            fuse.clear()
            raise RuntimeError("as if out of memory")
        return step(self)

    def clients(scheduler):
        return [sequence.request.user for sequence in scheduler.runner.sequences]

    monkeypatch.setattr(Scheduler, "step", broken)
    with running(r1, config=ServeConfig(rows=1)) as server:
        figures = server.models.loaded["r1"].service.stats
        with httpx.stream("POST", server.url + CHAT, json=LONG, timeout=30) as reading:
            lines = reading.iter_lines()
            wait_for(lambda: figures.generated > 2)
            waiting = []
            thread = threading.Thread(target=lambda: waiting.append(server.chat(max_tokens=3)))
            thread.start()
            wait_for(lambda: server.open_samples == 2)
            fuse.set()
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "generation_failed"
        thread.join()
        assert waiting[0].status_code == 200
        answer = server.chat(max_tokens=3, user="poison")
        assert answer.status_code == 500 and error_of(answer)["type"] == "server_error"
        assert server.chat(max_tokens=3).status_code == 200 and server.settles()
        assert figures.scheduler["failures"] >= 2


def in_pieces(folder, config):
    """A worker whose messages arrive in pieces, as long ones do on a busy machine."""
    connection, thread = in_thread(folder, config)
    served, relay = socket.socketpair()
    worker = socket.socket(fileno=os.dup(connection.fileno()))
    connection.close()

    def forward(source, target, pause):
        with suppress(OSError):
            while data := source.recv(4096):
                target.sendall(data)
                time.sleep(pause)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    for way in ((relay, worker, 0.0), (worker, relay, 0.002)):
        threading.Thread(target=forward, args=way, daemon=True).start()
    return pipes.Connection(served.detach()), thread


def test_a_model_whose_long_message_arrives_in_pieces_is_kept(tmp_path):
    """500 tokens with the five likeliest at each are more than 16 KiB."""
    with running(write_model(tmp_path, "r1", context=512), launch=in_pieces) as server:
        body = {"prompt": [5 + n % 200 for n in range(500)], "max_tokens": 1, "echo": True, "logprobs": 5}
        answers = [server.post("/v1/completions", **body) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert len(answers[0].json()["choices"][0]["logprobs"]["top_logprobs"]) == 501


def test_a_killed_model_is_replaced(server):
    """For example, killed for memory: clients that waited get an error, and the next request starts it again."""
    first = server.models.loaded["r1"].service
    before = first.stats.generated
    plug = raw_request(server.port, LONG | {"stream": False, "n": 64})  # its model is fast: see the fixture `server`
    wait_for(lambda: first.stats.generated > before)
    first.process.kill()
    received = b""
    while not received.endswith(b"}}"):
        received += plug.recv(65536)
    assert received.startswith(b"HTTP/1.1 500") and b"its process has ended" in received
    plug.close()
    assert not first.alive and httpx.get(server.url + "/health").json()["running"] == 0
    assert server.chat(max_tokens=3).status_code == 200
    assert server.models.loaded["r1"].service is not first


def test_a_model_killed_while_it_loads_is_unavailable(run_folder):
    """For example, killed when memory is short. The server stays up and loads it for the next request."""
    kill = threading.Event()

    def fragile(folder, config):
        connection, process = service.launch(folder, config) if kill.is_set() else in_thread(folder, config)
        if kill.is_set():
            process.kill()
            process.wait()
        return connection, process

    with running(run_folder, launch=fragile) as server:
        kill.set()
        answer = server.chat(max_tokens=1, model="base")
        assert answer.status_code == 503 and error_of(answer)["code"] == "model_unavailable"
        kill.clear()
        assert server.chat(max_tokens=1, model="base").status_code == 200


@pytest.fixture(scope="module")
def run_folder(r1, zero, tmp_path_factory):
    """A run of three finished stages with models that generate, and one that is damaged."""
    root = tmp_path_factory.mktemp("runs") / "mine"
    for name, source in (("01-base", zero), ("02-zero", zero), ("03-broken", r1), ("04-r1", r1)):
        folder = root / name / "model"
        folder.mkdir(parents=True)
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (root / name / "done.json").write_text('{"outputs": {}}')
    (root / "03-broken" / "model" / "tokenizer.json").unlink()
    (root / "recipe.toml").write_text('name = "mine"\n')
    return root


def test_the_models_of_a_run(run_folder, steps):
    steps.seconds = 0.02
    with running(run_folder, config=ServeConfig(loaded=2)) as server:
        names = [model["id"] for model in httpx.get(server.url + "/v1/models").json()["data"]]
        assert names == ["base", "zero", "r1"] and "03-broken" in server.models.broken[0]
        assert server.chat(max_tokens=1).json()["model"] == "r1"
        assert server.chat(max_tokens=1, model="base").json()["model"] == "base"
        assert server.chat(max_tokens=1, model=str(run_folder / "04-r1" / "model")).json()["model"] == "r1"
        assert set(server.models.loaded) == {"r1", "base"}
        server.chat(max_tokens=1, model="r1")
        assert server.chat(max_tokens=1, model="zero").json()["model"] == "zero"
        assert set(server.models.loaded) == {"r1", "zero"}, "the one unused for longest made room"
        plugs = [raw_request(server.port, LONG | {"model": name, "n": 8}) for name in ("r1", "zero")]
        wait_for(lambda: server.open_samples == 16)
        answer = server.chat(max_tokens=1, model="base")
        assert answer.status_code == 429 and error_of(answer)["code"] == "models_busy"
        for plug in plugs:
            plug.close()
        assert server.settles() and server.chat(max_tokens=1, model="base").status_code == 200
        (run_folder / "02-zero" / "model" / "model.safetensors").rename(run_folder / "away")
        server.chat(max_tokens=1, model="r1")
        answer = server.chat(max_tokens=1, model="zero")
        (run_folder / "away").rename(run_folder / "02-zero" / "model" / "model.safetensors")
        assert answer.status_code == 503 and error_of(answer)["code"] == "model_unavailable"


def test_models_requested_at_once_keep_to_the_limit(run_folder):
    """One that is being loaded counts. A load that fails leaves its place to others."""
    fail, alive, most = threading.Event(), [], []

    def slow(folder, config):
        if fail.is_set():
            raise OSError("as if")
        connection, thread = in_thread(folder, config)
        alive.append(thread)
        time.sleep(0.05)
        most.append(sum(thread.is_alive() for thread in alive))
        return connection, thread

    async def use(models, name):
        async with models.use(name) as model:
            return model.facts.name

    async def all_at_once():
        models = find_models(run_folder, ServeConfig(loaded=1), launch=slow)
        results = await asyncio.gather(*(use(models, name) for name in models.offers), return_exceptions=True)
        assert results[0] == "base" and [getattr(error, "code", error) for error in results[1:]] == ["models_busy"] * 2
        fail.set()
        with pytest.raises(ApiError, match="cannot be loaded"):
            await use(models, "zero")
        fail.clear()
        assert await use(models, "r1") == "r1" and list(models.loaded) == ["r1"]
        await models.stop()

    asyncio.run(all_at_once())
    assert most == [1, 1]


@pytest.mark.parametrize("drafts", [0, 1])
def test_answers_keep_to_a_small_cache(r1, drafts):
    with running(r1, config=ServeConfig(cache_tokens=64, drafts=drafts)) as server:
        usage = server.chat(ignore_eos=True).json()["usage"]
        details = httpx.get(server.url + "/v1/models").json()["data"][0]["bessemer"]
        assert usage["total_tokens"] == details["context"] == 64 - drafts
        answer = server.chat("the fox " * 30)
        assert error_of(answer)["code"] == "context_length_exceeded" and f"context of {64 - drafts}" in answer.text
        text = server.post("/v1/completions", prompt=[5] * 65, max_tokens=0, echo=True, logprobs=1)
        for refused in (answer, text):
            assert "more --cache-tokens: the model itself has 160" in refused.text
        assert server.post("/v1/completions", prompt=[5] * (63 - drafts), max_tokens=9).status_code == 200


def test_signals_end_a_server(r1):
    """After the first signal, running answers finish and new requests are refused; after the second, they are cut off.
    The process ends silently: no traceback, and no library that reports leaks."""
    code = f"""
import time, serving
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.server import serve
step = Scheduler.step
Scheduler.step = lambda self: (time.sleep(0.02), step(self))[1]
serve({str(r1)!r}, port=0, launch=serving.in_thread)
"""
    path = os.pathsep.join((os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, env=environment, **pipes)
    try:
        banner = process.stdout.readline()
        assert banner.startswith("bessemer: http://127.0.0.1:") and "models: r1 (default r1)" in banner
        url = banner.split()[1]
        bodies = (LONG | {"n": 40}, LONG | {"max_tokens": 9})
        one, two = (httpx.stream("POST", url + CHAT, json=body, timeout=60) for body in bodies)
        with one as many, two as few:
            cut, whole = many.iter_lines(), few.iter_lines()
            next(cut), next(whole)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in whole if line]
            assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
            wait_for(lambda: refused(url))
            process.send_signal(signal.SIGINT)
            rest = [line for line in cut if line]
            assert rest[-1] == "data: [DONE]"
            assert "shutting down" in json.loads(rest[-2][6:])["error"]["message"]
        assert process.wait(30) == 0 and (process.stdout.read(), process.stderr.read()) == ("", "")
    finally:
        process.kill()


def refused(url):
    try:
        httpx.get(url + "/health")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # arrived just as the port closed
        return False
    return False


def test_a_waiting_client_gets_keep_alives(r1, steps):
    steps.seconds = 0.01
    with running(r1, config=ServeConfig(rows=1, keep_alive_seconds=0.05)) as server:
        plug = raw_request(server.port, LONG)
        wait_for(lambda: server.open_samples == 1)
        with httpx.stream("POST", server.url + CHAT, json=LONG | {"max_tokens": 1}, timeout=30) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert ": keep-alive" in lines and lines[-1] == "data: [DONE]"
        plug.close()


def test_metrics_add_up(r1):
    with running(r1) as server:
        used = [server.chat(max_tokens=tokens, n=2).json()["usage"] for tokens in (3, 9)]
        server.chat(temperature=-1)
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(server.url + "/metrics").text.splitlines())
        expect = {
            f'bessemer_requests_total{{endpoint="{CHAT}",status="200"}}': 2,
            f'bessemer_requests_total{{endpoint="{CHAT}",status="400"}}': 1,
            'bessemer_completion_tokens_total{model="r1"}': sum(usage["completion_tokens"] for usage in used),
            'bessemer_prompt_tokens_total{model="r1"}': sum(usage["prompt_tokens"] for usage in used),
            'bessemer_time_to_first_token_seconds_count{model="r1"}': 2,
            'bessemer_request_seconds_count{model="r1"}': 2,
            'bessemer_open_samples{model="r1"}': 0,
            'bessemer_scheduler_running{model="r1"}': 0,
        }
        assert {key: float(lines[key]) for key in expect} == expect


def test_a_server_says_where_tokens_depend_on_the_batch(r1, tmp_path):
    convert(r1, tmp_path / "half", dtype="bfloat16")
    models = find_models(tmp_path / "half", ServeConfig(), launch=in_thread)
    assert models.rounding is None, "it is not loaded"
    models.preload()
    assert "bfloat16" in models.rounding and "float32 models keep theirs" in models.rounding
    with running(tmp_path / "half") as server:
        (model,) = httpx.get(server.url + "/v1/models").json()["data"]
        assert model["bessemer"]["dtype"] == "bfloat16"
    promised = find_models(tmp_path / "half", ServeConfig(batch_invariant=True), launch=in_thread)
    promised.preload()
    assert promised.rounding is None


def test_names_are_for_single_models(run_folder, r1):
    with pytest.raises(UserError, match="the names of their stages"), running(run_folder, name="x"):
        pass
    with running(r1, name="mine") as server:
        assert server.chat(max_tokens=1).json()["model"] == "mine"


def test_a_model_outside_of_a_run_goes_by_its_directory(r1, tmp_path):
    for path in ("hero/model", "other"):
        shutil.copytree(model_dir(r1), tmp_path / path)
    names = [find_models(tmp_path / path, ServeConfig()).default.name for path in ("hero/model", "other")]
    assert names == ["hero", "other"]
