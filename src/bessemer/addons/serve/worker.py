"""The worker process of a model: it owns the scheduler and does what the server asks.

It is a process, not a thread, because Python threads wait for the interpreter lock between any two operations of the
network, and because a model that dies (out of memory, a crash in a library) must not take the server with it.

Messages are pickled tuples; both ends of the pipe are this same program, and nothing from outside can write to it. The
first message to the worker is (folder, config); the first one back is READY or REFUSED.
    to the worker      ADD call, [(number, ServedRequest)...]     CANCEL [number...]     END reason
                       SCORE call, prompts, top
    from the worker    READY facts    REFUSED call, reason    DONE call, result    EVENTS records, figures
A record is the scheduler's Token or Finished as a plain tuple, with the sample's number in place of the ticket.

A thread receives messages as they arrive, so that the server never waits for a step. Closing the pipe ends the worker.

If a step raises, the samples that have already sent tokens end, and a new scheduler takes over the others. A sample
that sees this happen twice ends too, so that a request the model cannot handle does not circulate for ever.

`score` gives log-probabilities of given texts in one forward pass, for `echo` with `logprobs` (and lm-eval through it).
Shapes: B rows, T tokens (padded on the right, which causality hides), N real tokens, C of one chunk, D hidden,
V vocabulary.
"""

from __future__ import annotations

import gc
import logging
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from os import dup
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch

from bessemer.addons.accelerate.background import host_room
from bessemer.addons.serve import ServeConfig
from bessemer.addons.serve.fair_queue import FairQueue
from bessemer.addons.serve.requests import Finished, ServedRequest
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.engine.engine import Engine
from bessemer.engine.kv_cache import PAGE, pages_for
from bessemer.engine.steps import backend_of
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import evaluating
from bessemer.train.setup import device

ADD, CANCEL, END, SCORE = "add", "cancel", "end", "score"
READY, REFUSED, DONE, EVENTS = "ready", "refused", "done", "events"
MAX_FAILURES = 2
"""Failed steps after which a sample is given up."""
FIGURES_SECONDS = 0.1
"""Seconds between the figures that are sent along with the tokens."""
BUFFER = 1 << 22
"""Bytes of unread tokens in the pipe above which the model waits for the server."""
BATCH_TOKENS = 4096
"""Padded tokens per scoring pass: a fraction of a second for a small model on one core, so that streams hardly
notice."""
LOGITS = 1 << 20
"""Most logits held at a time, so that a large vocabulary does not multiply the memory."""
CACHE_SHARE = 0.5
"""Share of the free memory that a model's cache may take if no size is given: several models may be served."""
log = logging.getLogger("bessemer.addons.serve")


class WorkerFacts(NamedTuple):
    """What a worker reports about its model."""

    context: int
    """Tokens of prompt and answer together."""
    vocabulary: int
    """Ids that may occur in a prompt."""
    dtype: str
    """Number format of the arithmetic, such as float32."""


class Scored(NamedTuple):
    """One text of T tokens."""

    logprobs: list[float]
    """Of tokens 1 to T-1, each given those before it."""
    tops: list[tuple[tuple[int, float], ...]]
    """(id, log-probability) of the likeliest tokens after each of the T tokens, best first, at least one."""


@dataclass(eq=False)
class ScheduledSample:
    """A sample in the scheduler."""

    number: int
    request: ServedRequest
    started: bool = False
    """Some of its tokens have been sent."""
    failures: int = 0
    """Failed steps that it has been part of."""


def main() -> None:
    """The entry point of the process; its argument is the file descriptor of the pipe."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)  # Ctrl-C reaches this process too, but the server decides what it means
    connection = Connection(int(sys.argv[1]))
    work(connection, *connection.recv())


def work(connection: Connection, folder: Path, config: ServeConfig) -> None:
    """Loads the model and serves until the pipe is closed."""
    torch.set_num_threads(config.model_threads)
    # If this exceeds the system's limit, Linux grants the limit and macOS refuses.
    with socket.socket(fileno=dup(connection.fileno())) as pipe, suppress(OSError):
        pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    try:
        model = load(folder, device=device(), mtp=config.drafts > 0)
        engine = Engine(model, load_tokenizer(folder), batch_invariant=config.batch_invariant)
        worker = ModelWorker(connection, engine, config)
    except UserError as error:
        connection.send((REFUSED, 0, str(error)))
        return
    gc.freeze()  # the model stays: searching it for garbage is a waste
    dtype = str(engine.model.embed.weight.dtype).removeprefix("torch.")
    connection.send((READY, WorkerFacts(worker.context, engine.model.cfg.vocab_size, dtype)))
    with suppress(OSError):  # the server has gone
        worker.run()
    gc.unfreeze()  # as in `serve`


class ModelWorker:
    """Steps one scheduler. Raises UserError if the scheduler cannot do what `config` asks of it."""

    def __init__(self, connection: Connection, engine: Engine, config: ServeConfig):
        self.connection, self.engine, self.config = connection, engine, config
        self.failures = 0
        """Steps that raised."""
        self._scheduler = self._new_scheduler()
        self.context = self._scheduler.longest
        self._samples: dict[int, ScheduledSample] = {}
        """By ticket."""
        self._tickets: dict[int, int] = {}
        """By number."""
        self._inbox: deque[tuple[Any, ...]] = deque()
        self._scores: deque[tuple[Any, ...]] = deque()
        """Texts to be scored: one batch between two steps, because it may take as long as a step."""
        self._changed = threading.Condition()
        self._closed = False
        self._figures_due = 0.0

    def run(self) -> None:
        """Serves until the pipe is closed."""
        threading.Thread(target=self._receive, daemon=True).start()
        actions: dict[str, Callable[..., None]] = {
            ADD: self._add,
            CANCEL: self._cancel,
            END: self._end,
            SCORE: lambda *call: self._scores.append(call),
        }
        while True:
            with self._changed:
                while not (self._inbox or self._scores or self._closed) and self._scheduler.is_idle:
                    self._changed.wait()
                messages = list(self._inbox)
                self._inbox.clear()
            if self._closed:
                return
            for kind, *arguments in messages:
                actions[kind](*arguments)
            if self._scores:
                self._score(*self._scores.popleft())
            if not self._scheduler.is_idle:
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
                self._closed = True
                self._changed.notify()

    def _send(self, *message: object) -> None:
        self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def _new_scheduler(self) -> Scheduler:
        c, model = self.config, self.engine.model
        tokens = c.cache_tokens or cache_room(model, c.rows, free_bytes(model), c.drafts)
        return Scheduler(
            self.engine, rows=c.rows, cache_tokens=tokens, prefill_tokens=c.prefill_tokens, drafts=c.drafts,
            queue=FairQueue(), batch_invariant=c.batch_invariant,
        )  # fmt: skip

    def _add(self, call: int, samples: list[tuple[int, ServedRequest]]) -> None:
        """Schedules all of the samples or none."""
        try:
            for number, request in samples:
                self._schedule(ScheduledSample(number, request))
        except UserError as error:
            self._cancel([number for number, _ in samples])
            self._send(REFUSED, call, str(error))
        else:
            self._send(DONE, call, None)

    def _schedule(self, sample: ScheduledSample) -> None:
        ticket = self._scheduler.add(sample.request)
        self._samples[ticket], self._tickets[sample.number] = sample, ticket

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            ticket = self._tickets.pop(number, None)
            if ticket is not None:
                del self._samples[ticket]
                self._scheduler.cancel(ticket)
        if self._scheduler.is_idle:
            self._send_events([])

    def _end(self, reason: str) -> None:
        numbers = list(self._tickets)
        self._cancel(numbers)
        self._send_events([tuple(Finished(number, "error", reason)) for number in numbers])

    def _score(self, call: int, prompts: list[tuple[int, ...]], top: int) -> None:
        try:
            self._send(DONE, call, score(self.engine, prompts, top))
        except Exception as error:
            log.error("a text could not be scored", exc_info=error)
            self._send(REFUSED, call, f"the model failed ({type(error).__name__}); ask again")

    def _step(self) -> None:
        events, failure = None, ""
        try:
            events = self._scheduler.step()
        except Exception as error:
            # as text: a handler may keep the record, and with an error the frames that hold the step's tensors
            log.error("a step failed; its scheduler is replaced\n%s", "".join(traceback.format_exception(error)))
            failure = type(error).__name__
        if events is None:  # not above, where the error itself is still alive
            self._recover(failure)
            return
        records = []
        for event in events:
            sample = self._samples.get(event.ticket)
            if sample is not None:
                sample.started = True
                if type(event) is Finished:
                    del self._samples[event.ticket], self._tickets[sample.number]
                records.append((sample.number, *event[1:]))
        self._send_events(records)

    def _send_events(self, records: list[tuple[Any, ...]]) -> None:
        """Sends records (plain tuples pickle in a third of the time) and, every FIGURES_SECONDS, the scheduler's
        figures; it always sends the figures when all work is done, so that they end at zero."""
        now, figures = monotonic(), None
        if now >= self._figures_due or self._scheduler.is_idle:
            self._figures_due = now + FIGURES_SECONDS
            figures = self._scheduler.stats() | {"failures": self.failures}
        if records or figures is not None:
            self._send(EVENTS, records, figures)

    def _recover(self, failure: str) -> None:
        """Replaces the scheduler after a step that raised `failure`. The old one's memory is free before the new one
        asks for as much. If there is no room for it, the process ends, and the server starts another when needed."""
        self.failures += 1
        samples, self._samples, self._tickets = list(self._samples.values()), {}, {}
        del self._scheduler
        gc.unfreeze()  # the first scheduler, whose parts refer to each other, was made before everything was frozen
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        lost, message = [], f"the model failed ({failure}) and the answer is lost; ask again"
        try:
            self._scheduler = self._new_scheduler()
        except UserError as error:
            log.error("the model's process ends: %s", error)
            self._send(EVENTS, [tuple(Finished(sample.number, "error", message)) for sample in samples], None)
            self._closed = True
            return
        gc.freeze()
        for sample in samples:
            sample.failures += 1
            if sample.started or sample.failures == MAX_FAILURES:
                lost.append(tuple(Finished(sample.number, "error", message)))
                continue
            try:
                self._schedule(sample)
            except UserError as error:  # the new scheduler got less memory
                lost.append(tuple(Finished(sample.number, "error", str(error))))
        self._send_events(lost)


def free_bytes(model: LanguageModel) -> int:
    """Bytes that the model's device has left."""
    device = model.embed.weight.device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_room()


def cache_room(model: LanguageModel, rows: int, free: int, drafts: int = 0) -> int:
    """Tokens in the cache of a model: `rows` rows of full length, or what CACHE_SHARE of the `free` bytes holds.
    UserError if there is no room for a page."""
    token = backend_of(model).token_bytes(drafts)
    pages = int(free * CACHE_SHARE) // (PAGE * token)
    if not pages:
        raise UserError(
            f"no room for a cache: a token takes {token / 1024:.0f} KiB, and {free / (1 << 30):.2f} GiB of memory are "
            "free; end other programs, or serve a smaller model"
        )
    return PAGE * min(rows * pages_for(model.cfg.max_seq_len + drafts), pages)


def scoring_batches(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Which prompts to score together: indices, longest first, of at most BATCH_TOKENS padded tokens or one prompt."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    start = 0
    while start < len(order):
        stop = start + max(1, BATCH_TOKENS // len(prompts[order[start]]))
        yield order[start:stop]
        start = stop


def score(engine: Engine, prompts: Sequence[tuple[int, ...]], top: int) -> list[Scored]:
    """Scores all prompts in one forward pass. A token is among the `top` exactly if its own log-probability is, bit for
    bit."""
    model, vocab = engine.model, engine.tokenizer.vocab_size
    device = model.embed.weight.device
    T = max(map(len, prompts))
    tokens_BT = torch.tensor([[*ids, *[0] * (T - len(ids))] for ids in prompts], device=device)
    real_N = torch.tensor([b * T + t for b, ids in enumerate(prompts) for t in range(len(ids))], device=device)
    target_N = torch.tensor([i for ids in prompts for i in (*ids[1:], 0)], device=device)
    logp, ids, values = [], [], []
    with evaluating(model), torch.inference_mode():
        h_ND = model.train_outputs(tokens_BT, mtp=False).hidden_BTD.flatten(0, 1)[real_N]
        size = max(128, LOGITS // model.cfg.vocab_size)
        for h_CD, target_C in zip(h_ND.split(size), target_N.split(size), strict=True):
            logp_CV = (h_CD @ model.head_weight.T).float().log_softmax(-1)
            best = logp_CV[:, :vocab].topk(min(max(top, 1), vocab), -1)
            logp += logp_CV.gather(1, target_C[:, None]).squeeze(1).tolist()
            ids += best.indices.tolist()
            values += best.values.tolist()
    scored, start = [], 0
    for prompt in prompts:
        end = start + len(prompt)
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids[start:end], values[start:end], strict=True)]
        scored.append(Scored(logp[start : end - 1], tops))
        start = end
    return scored
