"""The model's side of a served model: a process that owns the scheduler and does what the server asks.

A process and not a thread, because Python threads wait for each other's interpreter lock between any two operations of
the network, and because a model that dies (killed for memory, a crash inside a library) must not take the server along.

Messages are pickled tuples; both ends of the pipe are this very program, and nothing from outside can write to it.
The first one to the worker is (folder, settings), the first one back READY or REFUSED.
    to the worker      ADD number-of-call, [(sample, Request)...]     CANCEL [sample...]     END reason
                       SCORE number-of-call, prompts, top
    from the worker    READY facts    REFUSED call, reason    DONE call, result    TOLD [(sample, event)...], figures

A thread takes messages in as they come, so that the server never waits for a step. The pipe's end is the worker's end.

A step that raises costs those their answer who have been told some of it already; a fresh scheduler takes on the
others. Who was there when it happens a second time is ended too, so that a request the model cannot stand does not go
round for ever.
"""

from __future__ import annotations

import gc
import logging
import pickle
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from os import dup
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch

from bessemer.engine.engine import Engine
from bessemer.engine.scheduler import Scheduler
from bessemer.engine.sequence import Finished, Request
from bessemer.errors import UserError
from bessemer.hf.causal_lm import load_any
from bessemer.hf.foreign_tokenizer import load_tokenizer
from bessemer.serve.score import score
from bessemer.serve.settings import Settings
from bessemer.train.setup import device

ADD, CANCEL, END, SCORE = "add", "cancel", "end", "score"
READY, REFUSED, DONE, TOLD = "ready", "refused", "done", "told"
TRIES = 2
"""Schedulers that a request may see break."""
FIGURES_SECONDS = 0.1
"""How often the figures go along with the tokens."""
BUFFER = 1 << 22
"""Bytes of tokens that may wait for the server to read them before the model waits for it."""
log = logging.getLogger("bessemer.serve")


class Facts(NamedTuple):
    """What a loaded model says of itself."""

    context: int
    """Tokens of prompt and answer together."""
    vocabulary: int
    """Ids that may stand in a prompt."""


class Held:
    """A sample that the scheduler has."""

    def __init__(self, number: int, request: Request):
        self.number, self.request = number, request
        self.told, self.tries = False, 0


def main() -> None:
    """The program of the process: its argument is the number of the pipe's file."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)  # Ctrl-C reaches us too, but the server decides what it means
    connection = Connection(int(sys.argv[1]))
    work(connection, *connection.recv())


def work(connection: Connection, folder: Path, settings: Settings) -> None:
    """Loads the model and serves until the pipe is closed."""
    torch.set_num_threads(settings.model_threads)
    with socket.socket(fileno=dup(connection.fileno())) as pipe:
        pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    try:
        model = load_any(folder, device=device(), mtp=settings.drafts > 0)
        engine = Engine(model, load_tokenizer(folder), compile=settings.compile)
        worker = Worker(connection, engine, settings)
        if engine.compiled is not None:
            engine.compiled.prepare(settings.drafts)
    except UserError as error:
        connection.send((REFUSED, 0, str(error)))
        return
    gc.freeze()  # the model stays: no use looking through it for garbage
    connection.send((READY, Facts(engine.model.cfg.max_seq_len, engine.model.cfg.vocab_size)))
    with suppress(OSError):  # the server has gone
        worker.run()


class Worker:
    """Steps one scheduler; UserError where the scheduler cannot do what `settings` ask of it."""

    def __init__(self, connection: Connection, engine: Engine, settings: Settings):
        self.connection, self.engine, self.settings = connection, engine, settings
        self.failures = 0
        """Steps that raised."""
        self._scheduler = self._fresh()
        self._held: dict[int, Held] = {}
        """By ticket."""
        self._tickets: dict[int, int] = {}
        """By sample."""
        self._inbox: deque[tuple[Any, ...]] = deque()
        self._scores: deque[tuple[Any, ...]] = deque()
        """Texts to be scored: one batch stands between two steps, as it may take as long as a step."""
        self._changed = threading.Condition()
        self._over = False
        self._figures_due = 0.0

    def run(self) -> None:
        """Until the pipe is closed."""
        threading.Thread(target=self._receive, daemon=True).start()
        doing: dict[str, Callable[..., None]] = {ADD: self._add, CANCEL: self._cancel, END: self._end}
        while True:
            with self._changed:
                while self._scheduler.idle and not (self._inbox or self._scores or self._over):
                    self._changed.wait()
                messages = list(self._inbox)
                self._inbox.clear()
            if self._over:
                return
            for kind, *rest in messages:
                if kind == SCORE:
                    self._scores.append(tuple(rest))
                else:
                    doing[kind](*rest)
            if self._scores:
                self._score(*self._scores.popleft())
            if not self._scheduler.idle:
                self._step()

    def _receive(self) -> None:
        try:
            while True:
                message = pickle.loads(self.connection.recv_bytes())
                with self._changed:
                    self._inbox.append(message)
                    self._changed.notify()
        except (EOFError, OSError):
            with self._changed:
                self._over = True
                self._changed.notify()

    def _send(self, *message: Any) -> None:
        self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def _fresh(self) -> Scheduler:
        s = self.settings
        return Scheduler(
            self.engine, rows=s.rows, cache_tokens=s.cache_tokens, prefill_tokens=s.prefill_tokens, drafts=s.drafts
        )

    def _add(self, call: int, samples: list[tuple[int, Request]]) -> None:
        """All of them, or none."""
        try:
            for number, request in samples:
                self._take(Held(number, request))
        except UserError as error:
            self._cancel([number for number, _ in samples])
            self._send(REFUSED, call, str(error))
        else:
            self._send(DONE, call, None)

    def _take(self, held: Held) -> None:
        ticket = self._scheduler.add(held.request)
        self._held[ticket], self._tickets[held.number] = held, ticket

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            ticket = self._tickets.pop(number, None)
            if ticket is not None:
                del self._held[ticket]
                self._scheduler.cancel(ticket)
        if self._scheduler.idle:
            self._tell([])

    def _end(self, reason: str) -> None:
        numbers = list(self._tickets)
        self._cancel(numbers)
        self._tell([(number, Finished(-1, "error", reason)) for number in numbers])

    def _score(self, call: int, prompts: list[tuple[int, ...]], top: int) -> None:
        try:
            self._send(DONE, call, score(self.engine, prompts, top))
        except Exception as error:
            log.error("a text could not be scored", exc_info=error)
            self._send(REFUSED, call, f"the model failed ({type(error).__name__}); ask again")

    def _step(self) -> None:
        try:
            events = self._scheduler.step()
        except Exception as error:
            self._broken(error)
            return
        told = []
        for event in events:
            held = self._held.get(event.ticket)
            if held is not None:
                held.told = True
                if type(event) is Finished:
                    del self._held[event.ticket], self._tickets[held.number]
                # a plain tuple takes a third of the time to pickle
                told.append((held.number, tuple(event)))
        self._tell(told)

    def _tell(self, told: list[tuple[int, tuple[Any, ...]]]) -> None:
        """Events, and now and then the figures; always when all work is done, so that they end at zero."""
        now, figures = monotonic(), None
        if now >= self._figures_due or self._scheduler.idle:
            self._figures_due = now + FIGURES_SECONDS
            figures = self._scheduler.stats() | {"failures": self.failures}
        if told or figures is not None:
            self._send(TOLD, told, figures)

    def _broken(self, error: Exception) -> None:
        log.error("a step failed; its scheduler is made anew", exc_info=error)
        self.failures += 1
        samples, self._held, self._tickets = list(self._held.values()), {}, {}
        self._scheduler = self._fresh()
        lost = []
        for held in samples:
            held.tries += 1
            if held.told or held.tries == TRIES:
                message = f"the model failed ({type(error).__name__}) and the answer is lost; ask again"
                lost.append((held.number, Finished(-1, "error", message)))
            else:
                self._take(held)
        self._tell(lost)
