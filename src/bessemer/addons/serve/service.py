"""The server's side of a model: its worker process, the samples in progress, and their tokens as streams.

Everything here runs on the event loop. One message carries the tokens of a whole decoding step, however many streams
they belong to. A stream that has just been read is not woken again at once: with S open samples it waits S * PAUSE
seconds, so that tokens of several steps form one chunk and writing chunks takes a small, bounded share of the time.
"""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from time import monotonic
from typing import Any

from starlette.requests import ClientDisconnect

from bessemer.addons.serve import ServeConfig, worker
from bessemer.addons.serve.protocol import ApiError
from bessemer.addons.serve.requests import Finished, ServedRequest, Token
from bessemer.addons.serve.worker import Scored, WorkerFacts
from bessemer.errors import UserError

PAUSE = 0.001
"""Seconds between two chunks of one stream, per open sample."""
LONGEST_PAUSE = 0.25
SMOOTHING = 0.1
"""Weight of the newest duration in the moving average."""
Launch = Callable[[Path, ServeConfig], tuple[Connection, "subprocess.Popen[bytes] | None"]]
"""Starts a worker: our end of its pipe, and its process."""
Gone = Callable[[], Awaitable[bool]]
"""Whether the client has disconnected."""


@dataclass
class ServiceStats:
    """What /metrics reports about a model."""

    open: int = 0
    """Samples that run or wait."""
    generated: int = 0
    """Tokens received since the start."""
    scheduler: dict[str, float] = field(default_factory=dict)
    """The scheduler's own figures."""


class Stream:
    """The tokens of one HTTP request: iterates over lists of records until all samples have finished or it is closed.

    The `ticket` of a record is the index of its sample. The iterator yields None when `patience` seconds pass without
    a token.
    """

    def __init__(self, numbers: range, patience: float, release: Callable[[Stream], None]):
        self.numbers = numbers
        """Numbers of its samples in messages to and from the worker."""
        self.patience = patience
        self.unfinished = len(numbers)
        self.closed = False
        self.pause = 0.0
        """Seconds after a read before new tokens wake the reader again."""
        self.started = monotonic()
        self.first_token: float | None = None
        """When the first token arrived, on the clock of `monotonic`."""
        self._release = release
        self._pending: list[Token | Finished] = []
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._due = 0.0

    def push(self, record: Token | Finished, now: float, open_samples: int) -> None:
        """Adds a record that the worker has sent."""
        self.pause = min(PAUSE * open_samples, LONGEST_PAUSE)
        self._pending.append(record)
        if type(record) is Finished:
            self.unfinished -= 1
            self._wake.set()
        else:
            self.first_token = self.first_token or monotonic()
            if now >= self._due:
                self._wake.set()

    def close(self) -> None:
        """Ends the stream and cancels its running samples. May be called at any time, and more than once."""
        if not self.closed:
            self.closed = True
            self._release(self)
            self._wake.set()

    async def __aiter__(self) -> AsyncIterator[list[Token | Finished] | None]:
        while not self.closed:
            if self._pending:
                records, self._pending = self._pending, []
                self._wake.clear()
                yield records
                if self.unfinished == 0 and not self._pending:
                    return
                self._due = self._loop.time() + self.pause
            try:
                async with asyncio.timeout(self.patience):
                    await self._wake.wait()
            except TimeoutError:
                if not self._pending:
                    yield None


def launch(folder: Path, config: ServeConfig) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Starts a worker in a fresh process: a fork of this one would copy its threads' locks but not its threads."""
    parent_end, child_end = Pipe()
    command = [sys.executable, "-c", f"from {worker.__name__} import main; main()", str(child_end.fileno())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[child_end.fileno()])
    child_end.close()
    parent_end.send((folder, config))
    return parent_end, process


class Service:
    """A model in memory, ready to generate. Raises UserError if it cannot be loaded."""

    def __init__(self, folder: Path, config: ServeConfig, launch: Launch = launch):
        """Waits until the model is loaded."""
        self.config = config
        try:
            self.connection, self.process = launch(folder, config)
            kind, *arguments = self.connection.recv()
        except (EOFError, OSError):  # OSError: it had not even read what to load
            raise UserError(f"{folder}: the model's process ended while loading it (no memory left?)") from None
        if kind == worker.REFUSED:
            raise UserError(arguments[1])
        self.facts: WorkerFacts = arguments[0]
        self.stats = ServiceStats()
        self.alive = True
        self.last_used = monotonic()
        self._seconds = 1.0
        """Duration of a sample, a moving average."""
        self._numbered = 0
        """The highest sample or call number so far."""
        self._streams: dict[int, Stream] = {}
        """The streams of samples in progress, by the sample's number."""
        self._calls: dict[int, asyncio.Future[Any]] = {}
        """Calls that the worker has not answered yet."""

    def start(self) -> None:
        """Makes the running event loop listen to the worker."""
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self.connection.fileno(), self._read)
        # uvloop makes it non-blocking, but a Connection reads what is longer than 16 KiB in two parts and waits between
        os.set_blocking(self.connection.fileno(), True)

    async def submit(self, requests: Sequence[ServedRequest]) -> Stream:
        """Submits all of these requests and returns their stream. Raises UserError or ApiError if one is refused."""
        self.admit(len(requests))
        numbers = self._new_numbers(len(requests))
        stream = Stream(numbers, self.config.keep_alive_seconds, self._release)
        self._streams |= dict.fromkeys(numbers, stream)
        self.stats.open += len(numbers)
        try:
            await self._call(worker.ADD, list(zip(numbers, requests, strict=True)))
        except BaseException:
            stream.close()
            raise
        return stream

    async def score(self, prompts: Sequence[tuple[int, ...]], top: int, gone: Gone) -> dict[int, Scored]:
        """Log-probabilities of texts, by index, computed by `worker.score` batch by batch; all of them take one place.
        Raises ClientDisconnect between two batches if the client has `gone`."""
        self.admit(1)
        self.stats.open += 1
        scores: dict[int, Scored] = {}
        try:
            alone = [[i] for i in range(len(prompts))] if self.config.batch_invariant else None
            for batch in alone or worker.scoring_batches(prompts):
                if await gone():
                    raise ClientDisconnect
                part = [prompts[i] for i in batch]
                scores |= zip(batch, await self._call(worker.SCORE, part, top), strict=True)
        finally:
            self.stats.open -= 1
        return scores

    def abort(self, reason: str) -> None:
        """Ends every stream with an error now."""
        self._send(worker.END, reason)

    async def stop(self) -> None:
        """Ends the worker; running samples are lost."""
        self._close("the model was unloaded")
        if self.process is not None:  # it has nothing to save, and a step may take long
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def admit(self, count: int) -> None:
        """Raises ApiError if there is no room for this many samples now."""
        self.last_used = monotonic()
        room = self.config.rows + self.config.waiting
        if count > room:
            why = f"the request asks for {count} samples, this server takes {room} at a time; ask for fewer"
            raise ApiError(400, why, code="too_many_samples")
        if self.stats.open + count > room:
            seconds = max(1, min(60, math.ceil(self._seconds / 2)))
            why = f"{self.stats.open} samples are in progress and no more may wait; try again in {seconds} s"
            raise ApiError(429, why, code="queue_full", headers={"Retry-After": str(seconds)})

    def _new_numbers(self, count: int) -> range:
        first, self._numbered = self._numbered + 1, self._numbered + count
        return range(first, self._numbered + 1)

    async def _call(self, kind: str, *arguments: object) -> Any:
        (call,) = self._new_numbers(1)
        self._calls[call] = answer = self.loop.create_future()
        try:
            self._send(kind, call, *arguments)
            return await answer
        finally:
            self._calls.pop(call, None)

    def _send(self, *message: object) -> None:
        try:
            self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError:
            self._close("its process has ended")
        if not self.alive:
            for future in self._calls.values():
                _fail(future, "the model has just ended; ask again")

    def _release(self, stream: Stream) -> None:
        """Frees what a closed stream still holds, and cancels its samples."""
        running = [number for number in stream.numbers if self._streams.pop(number, None)]
        self.stats.open -= len(running)
        if running and self.alive:
            self._send(worker.CANCEL, running)

    def _read(self) -> None:
        try:
            kind, *arguments = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._close("its process has ended")
            return
        if kind == worker.EVENTS:
            self._on_events(*arguments)
        elif (future := self._calls.get(arguments[0])) and not future.done():
            future.set_exception(UserError(arguments[1])) if kind == worker.REFUSED else future.set_result(arguments[1])

    def _on_events(self, records: Iterable[tuple[Any, ...]], scheduler: dict[str, float] | None) -> None:
        now = self.loop.time()
        self.stats.scheduler = scheduler or self.stats.scheduler
        for number, *fields in records:
            stream = self._streams.get(number)
            if stream is None:
                continue
            index = number - stream.numbers.start
            if len(fields) == FINISHED:
                del self._streams[number]
                self.stats.open -= 1
                self._seconds += SMOOTHING * (monotonic() - stream.started - self._seconds)
                stream.push(Finished(index, *fields), now, self.stats.open)
            else:
                self.stats.generated += 1
                stream.push(Token(index, *fields), now, self.stats.open)

    def _close(self, why: str) -> None:
        """The worker is gone: fails all calls and ends all streams."""
        if not self.alive:
            return
        self.alive = False
        self.loop.remove_reader(self.connection.fileno())
        self.connection.close()
        self.stats.scheduler = {}
        for future in self._calls.values():
            _fail(future, f"{why}; ask again")
        message = f"{why} and the answer is lost; ask again"
        self._on_events([Finished(number, "error", message) for number in self._streams], None)


FINISHED = len(Finished._fields) - 1
"""Number of fields after the ticket; a token has a different number."""
assert len(Token._fields) - 1 != FINISHED


def _fail(future: asyncio.Future[Any], why: str) -> None:
    if not future.done():
        future.set_exception(ApiError(503, why, code="model_unavailable"))
