"""The server's side of a served model: what is under way, and the way there and back.

Everything here happens on the event loop. One message brings what a step of the model made, however many streams it is
for; `inflight` decides when each of them is woken.
"""

from __future__ import annotations

import asyncio
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from time import monotonic
from typing import Any

from bessemer.engine.sequence import Finished, Request, Token
from bessemer.errors import UserError
from bessemer.serve import worker
from bessemer.serve.errors import ApiError
from bessemer.serve.inflight import Sample, Stream
from bessemer.serve.score import Scored
from bessemer.serve.settings import Settings

SMOOTHING = 0.1
"""Weight of the newest duration in the moving average."""
Launch = Callable[[Path, Settings], tuple[Connection, "subprocess.Popen[bytes] | None"]]
"""Starts a worker: our end of its pipe, and its process."""


@dataclass
class Figures:
    """What /metrics says about a model."""

    open: int = 0
    """Samples that run or wait."""
    generated: int = 0
    """Tokens taken in since the start."""
    scheduler: dict[str, float] = field(default_factory=dict)
    """The scheduler's own."""


def launch(folder: Path, settings: Settings) -> tuple[Connection, subprocess.Popen[bytes]]:
    """A worker in a fresh process: a fork of this one would copy its threads' locks but not its threads."""
    ours, theirs = Pipe()
    command = [sys.executable, "-c", f"from {worker.__name__} import main; main()", str(theirs.fileno())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()
    ours.send((folder, settings))
    return ours, process


class Service:
    """A model that serves. UserError where it cannot be loaded."""

    def __init__(self, folder: Path, settings: Settings, launch: Launch = launch):
        """Waits until the model is loaded."""
        self.settings = settings
        self.connection, self.process = launch(folder, settings)
        try:
            kind, *rest = self.connection.recv()
        except EOFError:
            raise UserError(f"{folder}: the model's process ended while it loaded (no memory left?)") from None
        if kind == worker.REFUSED:
            raise UserError(rest[1])
        self.facts: worker.Facts = rest[0]
        self.figures = Figures()
        self.alive = True
        self.used = monotonic()
        """When it was last asked."""
        self._seconds = 1.0
        """What a sample takes, a moving average."""
        self._numbers = count(1)
        self._samples: dict[int, Sample] = {}
        """What is under way, by number."""
        self._calls: dict[int, asyncio.Future[Any]] = {}
        """What the worker has not answered yet."""

    def start(self) -> None:
        """From now on the event loop listens to the worker."""
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self.connection.fileno(), self._read)

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """The stream of these requests, all of them accepted; UserError or ApiError if one cannot be."""
        self._admit(len(requests))
        stream = Stream(requests, self.settings.keep_alive_seconds, self._release)
        numbered = [(next(self._numbers), sample) for sample in stream.samples]
        for number, sample in numbered:
            sample.number = number
            self._samples[number] = sample
        self.figures.open += len(numbered)
        try:
            await self._ask(worker.ADD, [(number, sample.request) for number, sample in numbered])
        except BaseException:
            stream.close()
            raise
        return stream

    async def score(self, prompts: Sequence[tuple[int, ...]], top: int) -> list[Scored]:
        """Log-probabilities of texts, `score.score` on the worker's side."""
        self._admit(1)
        self.figures.open += 1
        try:
            return await self._ask(worker.SCORE, list(prompts), top)
        finally:
            self.figures.open -= 1

    def abort(self, reason: str) -> None:
        """Every stream ends with an error now."""
        self._send(worker.END, reason)

    async def stop(self) -> None:
        """Ends the worker; what runs is lost."""
        self._close("the model is put away")
        if self.process is not None:  # it has nothing to save, and a step may take long
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def _admit(self, count: int) -> None:
        self.used = monotonic()
        room = self.settings.rows + self.settings.waiting
        if count > room:
            why = f"the request asks for {count} samples, this server takes {room} at a time; ask for fewer"
            raise ApiError(400, why, code="too_many_samples")
        if self.figures.open + count > room:
            seconds = max(1, min(60, math.ceil(self._seconds / 2)))
            why = f"{self.figures.open} samples are under way and no more may wait; try again in {seconds} s"
            raise ApiError(429, why, code="queue_full", headers={"Retry-After": str(seconds)})

    async def _ask(self, kind: str, *rest: Any) -> Any:
        call = next(self._numbers)
        self._calls[call] = answer = self.loop.create_future()
        try:
            self._send(kind, call, *rest)
            return await answer
        finally:
            self._calls.pop(call, None)

    def _send(self, *message: Any) -> None:
        try:
            self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError:
            self._close("its process has ended")
        if not self.alive:
            for future in self._calls.values():
                _fail(future, "the model has just ended; ask again")

    def _release(self, stream: Stream) -> None:
        """Frees what a closed stream still holds."""
        running = [sample.number for sample in stream.samples if self._samples.pop(sample.number, None)]
        self.figures.open -= len(running)
        if running and self.alive:
            self._send(worker.CANCEL, running)

    def _read(self) -> None:
        try:
            kind, *rest = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._close("its process has ended")
            return
        if kind == worker.TOLD:
            self._told(*rest)
        elif (future := self._calls.get(rest[0])) and not future.done():
            future.set_exception(UserError(rest[1])) if kind == worker.REFUSED else future.set_result(rest[1])

    def _told(self, events: list[tuple[int, tuple[Any, ...]]], figures: dict[str, float] | None) -> None:
        now = self.loop.time()
        self.figures.scheduler = figures or self.figures.scheduler
        for number, event in events:
            sample = self._samples.get(number)
            if sample is None:
                continue
            if len(event) == FINISHED:
                del self._samples[number]
                self.figures.open -= 1
                self._seconds += SMOOTHING * (monotonic() - sample.began - self._seconds)
                sample.stream.take(sample.index, Finished(*event), now, self.figures.open)
            else:
                self.figures.generated += 1
                sample.stream.take(sample.index, Token(*event), now, self.figures.open)

    def _close(self, why: str) -> None:
        """The worker is gone or goes; whoever waits for it is told."""
        if not self.alive:
            return
        self.alive = False
        self.loop.remove_reader(self.connection.fileno())
        self.connection.close()
        self.figures.scheduler = {}
        for future in self._calls.values():
            _fail(future, f"{why}; ask again")
        lost = Finished(-1, "error", f"{why} and the answer is lost; ask again")
        self._told([(number, tuple(lost)) for number in self._samples], None)


FINISHED = len(Finished._fields)
assert len(Token._fields) != FINISHED


def _fail(future: asyncio.Future[Any], why: str) -> None:
    if not future.done():
        future.set_exception(ApiError(503, why, code="model_unavailable"))
