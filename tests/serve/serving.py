"""A real server on a free port of the loopback address, in a thread of the test process, and models for it."""

import json
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from multiprocessing import Pipe

import httpx
from openai_types import check_event, check_reply

from bessemer.addons.serve import ServeConfig, worker
from bessemer.addons.serve.connections import ConnectionLimits
from bessemer.addons.serve.models import find_models
from bessemer.addons.serve.server import Server
from bessemer.data.tokenizer import Tokenizer
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

TEXTS = ["the quick brown fox jumps over the lazy dog", "<think>two and two</think> <answer>4</answer>", "盛钢水"] * 8
CONTEXT = 160


def write_model(folder, style, context=CONTEXT, seed=3, tool_tokens=False):
    tokenizer = Tokenizer.train(TEXTS, 300, chat_style=style, tool_tokens=tool_tokens)
    cfg = preset("tiny", vocab_size=tokenizer.vocab_size + 5, dim=64, n_layers=3, max_seq_len=context, init_std=0.12)
    model = Transformer(cfg).initialise(seed)
    tokenizer.save(folder / "tokenizer")
    model.save(folder / style, tokenizer_dir=folder / "tokenizer")
    return folder / style


class Thread(threading.Thread):
    """A thread with the interface that the service expects of a process."""

    def __init__(self, work, pipe):
        super().__init__(target=work, daemon=True)
        self.pipe = pipe

    def kill(self):
        """Shuts its pipe down. The service has closed its end by now, but a process that another test forked meanwhile
        may still hold a copy, and the worker would wait for that one."""
        with suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)

    wait = threading.Thread.join


def in_thread(folder, config):
    """A worker in another thread of this process: it behaves the same and starts at once."""
    parent_end, child_end = Pipe()

    def work():
        with child_end:
            worker.work(child_end, folder, config)

    thread = Thread(work, child_end)
    thread.start()
    return parent_end, thread


class Running:
    """A server under test; `url` ends without a slash."""

    def __init__(self, folder, config=None, limits=None, drain_seconds=5.0, name=None, launch=in_thread):
        self.models = find_models(folder, config or ServeConfig(), name, launch)
        self.models.preload()
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(self.models, limits or ConnectionLimits(), drain_seconds)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def start(self):
        self.thread.start()
        for _ in range(500):
            if self.server.started:
                return self
            time.sleep(0.02)
        raise AssertionError("the server did not start")

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def post(self, path, **body):
        answer = httpx.post(self.url + path, json=body, timeout=60)
        if answer.status_code == 200 and not body.get("stream"):
            check_reply(path, answer.json(), body.get("echo", False))
        return answer

    def chat(self, text="the fox", **options):
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **options)

    def events(self, path, **body):
        """The JSON of every event of a stream, which must end with [DONE]."""
        with httpx.stream("POST", self.url + path, json=body | {"stream": True}, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            raw = b"".join(answer.iter_raw())
        events = [line for line in raw.split(b"\n\n") if line and not line.startswith(b":")]
        assert events[-1] == b"data: [DONE]" and all(line.startswith(b"data: ") for line in events)
        return [check_event(path, json.loads(line[6:]), body.get("echo", False)) for line in events[:-1]]

    @property
    def open_samples(self):
        return sum(model.service.stats.open for model in self.models.loaded.values())

    def settles(self, seconds=10.0):
        """Whether every slot is free again within `seconds`, according to the server and the schedulers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = [model.service.stats for model in self.models.loaded.values()]
            if not any(f.open or f.scheduler.get("running") or f.scheduler.get("waiting") for f in stats):
                return True
            time.sleep(0.02)
        return False


@contextmanager
def running(folder, **options):
    server = Running(folder, **options).start()
    try:
        yield server
    finally:
        server.stop()


def error_of(answer):
    """The error in an answer; checks its form."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"] and body["error"]["type"]
    return body["error"]
