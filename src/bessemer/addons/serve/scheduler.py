"""Continuous batching: requests join and leave while others decode.

One `step` starts prompts while rows and pages suffice, prefills a bounded number of prompt tokens, so that a long
prompt delays the decoding sequences only a little, samples a token for every sequence, and retires finished ones. When
the cache is full the youngest sequence is preempted and waits; on its return those of its tokens whose pages others
took are prefilled like a prompt, and since its random stream is indexed by position, it continues with the same tokens.
The queue decides who starts next: first come, first served, as soon as its pages are free; `fair_queue` looks further.

Prompts with a common prefix share pages: several samples of one prompt at once, and a repeated system prompt or an
earlier turn of a conversation through the prefix cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, takewhile
from typing import Protocol

import torch

from bessemer.addons.serve.prefix_cache import PrefixCache
from bessemer.addons.serve.requests import Finished, ServedRequest, ServedSequence, Token
from bessemer.addons.serve.served_runner import ServedRunner
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import check_prompt
from bessemer.engine.kv_cache import PAGE, PromptPages, indices, pages_for
from bessemer.engine.model_runner import not_finite
from bessemer.engine.sequence import check_positive, stop_strings
from bessemer.engine.speculative import check_drafts
from bessemer.engine.steps import PrefillChunk, backend_of
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel


@dataclass(eq=False)
class PromptJob:
    """A prompt during prefill, and the sequences that will continue it."""

    prompt: PromptPages
    sequences: list[ServedSequence]

    def pages_needed(self, lookahead: int, count: int | None = None) -> int:
        """Pages to allocate until its first `count` sequences decode: the rest of the prompt, then each additional
        sequence's own."""
        total, count = pages_for(len(self.prompt.ids) + lookahead), count or len(self.sequences)
        return total - len(self.prompt.pages) + (count - 1) * (total - self.prompt.full_pages)


class Network(Protocol):
    """What requests run on: an `Engine`."""

    model: LanguageModel
    tokenizer: Tokenizer


class Scheduler:
    """Runs requests on one engine. Not thread-safe: one thread adds, cancels and steps."""

    def __init__(
        self,
        engine: Network,
        *,
        rows: int = 64,
        cache_tokens: int | None = None,
        prefill_tokens: int = 2048,
        drafts: int = 0,
        prefix_cache: bool = True,
        queue: WaitingQueue | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """At most `rows` requests decode together; the cache holds `cache_tokens` tokens (None: `rows` sequences of
        full length); a step prefills at most `prefill_tokens` prompt tokens, so that long prompts do not stall the
        others. The MTP module drafts `drafts` tokens per step (see `speculative`).

        queue: decides who starts next. batch_invariant: as in `Engine`."""
        check_positive(rows=rows, prefill_tokens=prefill_tokens)
        if cache_tokens is not None:
            check_positive(cache_tokens=cache_tokens)
        self.engine, self.model = engine, engine.model
        self.max_rows, self.prefill_tokens = rows, prefill_tokens
        steps, self.bounded = backend_of(self.model, batch_invariant), cache_tokens is not None
        check_drafts(self.model, drafts)
        self.cache_tokens = cache_tokens or rows * PAGE * pages_for(self.model.cfg.max_seq_len + drafts)
        self.preempted = self.prompt_tokens = self.cached_tokens = 0
        self.queue = WaitingQueue() if queue is None else queue  # an empty one is false
        self._prompt: tuple[tuple[int, ...] | None, list[bytes]] = None, []
        """The last prompt and the keys of its pages, which its samples share until they start."""
        self._tickets = count(1)
        self.prefills: list[PromptJob] = []
        self.model.eval()
        make = partial(PrefixCache, limit=cache_tokens, prefix_cache=prefix_cache)
        self.cache: PrefixCache = steps.new_cache(drafts, make)
        self.runner = ServedRunner(steps, engine.tokenizer, self.cache, drafts)

    def add(self, request: ServedRequest) -> int:
        """Queues a request and returns its ticket. UserError if it can never run (empty, too long, invalid ids)."""
        return self.start(request).number

    def start(self, request: ServedRequest) -> ServedSequence:
        """`add`, but returns the sequence, for a caller that reads it when it is finished instead of events."""
        if self._prompt[0] is not request.prompt:  # otherwise one of many samples of a prompt
            check_prompt(self.model, request.prompt)
            self._prompt = request.prompt, []
        room = self.model.cfg.max_seq_len - len(request.prompt)
        request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
        if request.routing and all(layer.dense for layer in self.model.layers):
            raise UserError("routing: no layer of this model has routed experts; leave it off")
        stop = stop_strings(self.engine.tokenizer, tuple(request.stop_strings))
        if (tokens := len(request.prompt) + request.max_new_tokens) > self.longest:
            raise UserError(
                f"prompt and answer need {tokens} tokens, but the cache holds {self.longest}; shorten the prompt "
                "or max_new_tokens, or give the cache more tokens"
            )
        sequence = ServedSequence(request, next(self._tickets), stop, control=self.runner.control_of(request))
        sequence.page_keys = self._prompt[1]
        self.queue.add(sequence)
        return sequence

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Frees the request's row, pages and place in the queue at once; no event follows. Unknown tickets are
        ignored."""
        if self.queue.remove(ticket):
            return
        for job in self.prefills:
            for sequence in job.sequences:
                if sequence.number == ticket:
                    job.sequences.remove(sequence)
                    self.queue.finished(sequence)
                    if not job.sequences:
                        self.cache.drop(job.prompt)
                        self.prefills.remove(job)
                    return
        live = [sequence.number != ticket for sequence in self.runner.sequences]
        if not all(live):
            self.queue.finished(self.runner.sequences[live.index(False)])
            self.runner.keep(live)

    @property
    def longest(self) -> int:
        """Most tokens that a prompt and its answer can have together."""
        return min(PAGE * pages_for(self.cache_tokens) - self.runner.lookahead + 1, self.model.cfg.max_seq_len)

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not (self.queue or self.prefills or self.runner.sequences)

    def started(self) -> list[ServedSequence]:
        """All sequences that run, those of prompts in prefill included."""
        return [*self.runner.sequences, *(sequence for job in self.prefills for sequence in job.sequences)]

    def stats(self) -> dict[str, float]:
        """The current state, for a metrics page."""
        drafts = self.runner.drafts
        figures: dict[str, float] = {
            "running": len(self.runner.sequences),
            "prefilling": sum(len(job.sequences) for job in self.prefills),
            "waiting": len(self.queue),
            "cache_tokens": self.cache_tokens,
            "cache_tokens_used": self.cache.used_tokens,
            "cache_bytes": self.cache.allocated_bytes,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_found": self.cached_tokens,
            "preempted": self.preempted,
        }
        return figures | ({"drafted": drafts.drafted, "accepted": drafts.accepted} if drafts.depth else {})

    @torch.inference_mode()
    def step(self) -> list[Token | Finished]:
        """Admits requests that fit, and decodes one token (more with drafts) for every live sequence; returns their
        tokens and ends."""
        self._start_prompts()
        self._prefill()
        self._preempt()
        decoded = self.runner.sequences
        for sequence in self.runner.step() if decoded else ():
            self.queue.finished(sequence)
        return [event for sequence in decoded for event in events_of(sequence)]

    def _start_prompts(self) -> None:
        """Starts prompts while rows and pages suffice; when nothing is running the next one always fits."""
        while True:
            busy = len(self.runner.sequences) + sum(len(job.sequences) for job in self.prefills)
            sequences = self.queue.peek(self.max_rows - busy) if busy < self.max_rows else []
            if not sequences:
                return
            first = sequences[0]
            job = PromptJob(self.cache.open(first.ids, first.page_keys, len(first.request.prompt)), sequences)
            most = self.queue.most_that_fit(self, job) if self.bounded else len(sequences)
            del job.sequences[max(most, 0 if busy else 1) :]
            if not job.sequences:
                self.cache.drop(job.prompt)
                return
            if sequences[0].cached_tokens is None:  # otherwise it was preempted, and its prompt is counted
                for sequence in job.sequences:
                    sequence.cached_tokens = job.prompt.cached
                self.cached_tokens += job.prompt.cached
                self.prompt_tokens += len(job.prompt.ids)
            self.queue.take(job.sequences)
            self.prefills.append(job)

    def _prefill(self) -> None:
        """Prefills a bounded number of tokens; completed prompts become live sequences."""
        chunks: list[PrefillChunk] = []
        budget = self.prefill_tokens
        for job in self.prefills:
            rest = len(job.prompt.ids) - job.prompt.length
            if chunks and rest > budget and (budget <= 0 or not self.cache.chunked_prefill):
                break
            end = job.prompt.length + (min(rest, budget) if self.cache.chunked_prefill else rest)
            self.cache.extend(job.prompt, end)
            chunks.append(PrefillChunk(job.prompt, end))
            budget -= rest
            if budget <= 0:
                break
        if not chunks:
            return
        started = self.prefills[: len(chunks)]
        routing = any(sequence.request.routing for job in started for sequence in job.sequences)
        logits_PV = self.runner.prefill(chunks, routing)
        done = [p for p, chunk in enumerate(chunks) if chunk.end == len(chunk.prompt.ids)]
        if done:
            jobs = [started[p] for p in done]
            self.prefills = [job for job in self.prefills if job not in jobs]
            if len(done) < len(chunks):
                logits_PV = logits_PV[indices(done, logits_PV.device)]
            self.runner.admit([(job.prompt, job.sequences) for job in jobs], logits_PV)

    def _preempt(self) -> None:
        """Preempts the youngest sequences until the others have room for their next tokens."""
        while (sequences := self.runner.sequences) and (free := self.cache.free_pages()) is not None:
            if len(sequences) * pages_for(self.runner.lookahead) + self.reserved_pages() <= free:
                break  # they need no more than this
            length_B = [position + self.runner.lookahead for position in self.runner.positions()]
            if self.cache.pages_needed(length_B) + self.reserved_pages() <= free:
                break
            self.preempted += 1
            if self.prefills:  # younger than any sequence that decodes
                job = self.prefills.pop()
                self.cache.drop(job.prompt)
                for sequence in reversed(job.sequences):
                    self.queue.requeue(sequence)
            else:
                youngest = max(range(len(sequences)), key=lambda b: sequences[b].number)
                self.queue.requeue(self.runner.preempt(youngest))

    def reserved_pages(self) -> int:
        """Pages that the prompts in prefill will still allocate."""
        return sum(job.pages_needed(self.runner.lookahead) for job in self.prefills)


def events_of(sequence: ServedSequence) -> Iterator[Token | Finished]:
    """What is new of a sequence since the last call."""
    for n in range(sequence.n_emitted, len(sequence.tokens)):
        top, routes = sequence.top[n] if sequence.top else (), sequence.routes[n] if sequence.routes else None
        yield Token(sequence.number, sequence.tokens[n], sequence.logp[n], sequence.raw_logp[n], top, routes)
    sequence.n_emitted = len(sequence.tokens)
    if sequence.finish is not None:
        failed = sequence.finish == "error"
        message = sequence.error or str(not_finite(1, 1, sequence.n_emitted + 1)) if failed else ""
        yield Finished(sequence.number, sequence.finish, message, sequence.cached_tokens or 0)


class WaitingQueue:
    """Sequences that wait for a row, first come first served. Preempted sequences return before new ones start."""

    def __init__(self) -> None:
        self._waiting: deque[ServedSequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: ServedSequence) -> None:
        self._waiting.append(sequence)

    def requeue(self, sequence: ServedSequence) -> None:
        """Puts a preempted sequence before all others."""
        self._waiting.appendleft(sequence)

    def peek(self, most: int) -> list[ServedSequence]:
        """The next sequence, and up to `most` in total with the same prompt that follow it; they stay in the queue."""
        if not self._waiting or self._waiting[0].cached_tokens is not None:  # it was preempted
            return list(islice(self._waiting, 1))
        return same_prompt(islice(self._waiting, most))

    def take(self, sequences: list[ServedSequence]) -> None:
        """Removes sequences returned by `peek`: they run."""
        for sequence in sequences:
            assert self._waiting.popleft() is sequence

    def finished(self, sequence: ServedSequence) -> None:
        """A running sequence has ended, or was cancelled."""

    def remove(self, number: int) -> bool:
        """Drops a waiting sequence; False if none has this number."""
        for sequence in self._waiting:
            if sequence.number == number:
                self._waiting.remove(sequence)
                return True
        return False

    def most_that_fit(self, scheduler: Scheduler, job: PromptJob) -> int:
        """How many sequences of `job` may start in a cache with a limit: as many as pages are free for now."""
        free, lookahead, count = scheduler.cache.free_pages(), scheduler.runner.lookahead, len(job.sequences)
        if free is None:  # every row has as many slots as the longest
            running = scheduler.started()
            longest = max(
                len(sequence.request.prompt) + sequence.request.max_new_tokens
                for sequence in (*running, *job.sequences)
            )
            return max(0, min(count, scheduler.cache_tokens // longest - len(running)))
        remaining = free - scheduler.reserved_pages()
        while count and job.pages_needed(lookahead, count) > remaining:
            count -= 1
        return count


def same_prompt(sequences: Iterable[ServedSequence]) -> list[ServedSequence]:
    """The first sequences that have the prompt of the first."""
    sequences = iter(sequences)
    first = next(sequences)
    prompt = first.request.prompt
    is_same = lambda ids: ids is prompt or ids == prompt  # noqa: E731 (comparing a long prompt with itself takes time)
    return [first, *takewhile(lambda sequence: is_same(sequence.request.prompt), sequences)]
