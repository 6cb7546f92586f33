"""Continuous batching: requests join and leave while others decode.

One `step` starts prompts while rows and pages suffice, prefills a bounded number of prompt tokens, so that a long
prompt delays the decoding sequences only a little, samples a token for every sequence, and retires finished ones. When
the cache is full the youngest sequence is preempted and waits; on its return those of its tokens whose pages others
took are prefilled like a prompt, and since its random stream is indexed by position, it continues with the same tokens.
A prompt starts only if everything that runs is expected to end before the cache is full (`headroom`).

Prompts with a common prefix share pages: several samples of one prompt at once, and a repeated system prompt or an
earlier turn of a conversation through the prefix cache.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice, takewhile
from typing import Protocol

import torch

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import check_prompt
from bessemer.engine.headroom import AnswerLengths, Need, peak_pages
from bessemer.engine.kv_cache import PAGE, PromptPages, indices, pages_for
from bessemer.engine.model_runner import ModelRunner, not_finite
from bessemer.engine.routing_record import RoutingRecord
from bessemer.engine.sequence import Finished, Request, Sequence, Token, check_positive, stop_strings
from bessemer.engine.speculative import check_drafts
from bessemer.engine.steps import PrefillChunk, backend_of
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel


@dataclass(eq=False)
class _Prefill:
    """A prompt during prefill, and the sequences that will continue it."""

    prompt: PromptPages
    sequences: list[Sequence]

    def pages_needed(self, lookahead: int, count: int | None = None) -> int:
        """Pages to allocate until its first `count` sequences decode: the rest of the prompt, then each additional
        sequence's own."""
        total, count = pages_for(len(self.prompt.ids) + lookahead), count or len(self.sequences)
        return total - len(self.prompt.pages) + (count - 1) * (total - self.prompt.full_pages)

    def pages_of_its_own(self, count: int) -> int:
        """Pages that it has and that its first `count` sequences do not share, less those to share that it lacks."""
        shared = self.prompt.full_pages if count > 1 else 0
        return len(self.prompt.pages) - shared

    def needs(self, count: int, lookahead: int, more: Callable[[Sequence], int]) -> list[Need]:
        """What its first `count` sequences take besides the pages that they share."""
        shared = self.prompt.full_pages * PAGE if count > 1 else 0
        return [_need(one, lookahead, shared, more) for one in self.sequences[:count]]


def _need(sequence: Sequence, lookahead: int, shared: int, more: Callable[[Sequence], int]) -> Need:
    """What a sequence takes after `shared` tokens."""
    prompt, request = len(sequence.request.prompt) + lookahead - shared, sequence.request
    return Need(prompt + len(sequence.tokens), more(sequence), pages_for(prompt + request.max_new_tokens - 1))


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
        record: RoutingRecord | None = None,
        prefix_cache: bool = True,
        kept: bool = False,
    ) -> None:
        """At most `rows` requests decode together; the cache holds `cache_tokens` tokens (None: `rows` sequences of
        full length); a step prefills at most `prefill_tokens` prompt tokens, so that long prompts do not stall the
        others. The MTP module drafts `drafts` tokens per step (see `speculative`).

        record: receives the experts of every token fed; needs `prefix_cache` off, so that every prompt is computed in
        full. kept: sequences record the tokens that truncation kept; all must have the same parameters."""
        check_positive(rows=rows, prefill_tokens=prefill_tokens)
        if cache_tokens is not None:
            check_positive(cache_tokens=cache_tokens)
        self.engine, self.model = engine, engine.model
        assert record is None or not prefix_cache
        assert not (kept and drafts)
        self.max_rows, self.prefill_tokens = rows, prefill_tokens
        steps, self._bounded = backend_of(self.model), cache_tokens is not None
        check_drafts(self.model, drafts)
        self.cache_tokens = cache_tokens or rows * PAGE * pages_for(self.model.cfg.max_seq_len + drafts)
        self.preempted = self.prompt_tokens = self.cached_tokens = 0
        self.queue = WaitingQueue()
        self._lengths = AnswerLengths()
        self._prompt: tuple[tuple[int, ...] | None, list[bytes]] = None, []
        """The last prompt and the keys of its pages, which its samples share until they start."""
        self._tickets = count(1)
        self._prefills: list[_Prefill] = []
        self.model.eval()
        self.cache = steps.new_cache(cache_tokens, prefix_cache, drafts)
        self.runner = ModelRunner(steps, engine.tokenizer, self.cache, drafts, record, kept)

    def add(self, request: Request) -> int:
        """Queues a request and returns its ticket. UserError if it can never run (empty, too long, invalid ids)."""
        return self.start(request).number

    def start(self, request: Request) -> Sequence:
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
        sequence = Sequence(request, next(self._tickets), stop, self.runner.control_of(request))
        sequence.page_keys = self._prompt[1]
        self.queue.add(sequence)
        return sequence

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Frees the request's row, pages and place in the queue at once; no event follows. Unknown tickets are
        ignored."""
        if self.queue.remove(ticket):
            return
        for job in self._prefills:
            for sequence in job.sequences:
                if sequence.number == ticket:
                    job.sequences.remove(sequence)
                    self.queue.finished(sequence)
                    if not job.sequences:
                        self.cache.drop(job.prompt)
                        self._prefills.remove(job)
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
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not (self.queue or self._prefills or self.runner.sequences)

    def stats(self) -> dict[str, float]:
        """The current state, for a metrics page."""
        drafts = self.runner.drafts
        figures: dict[str, float] = {
            "running": len(self.runner.sequences),
            "prefilling": sum(len(job.sequences) for job in self._prefills),
            "waiting": len(self.queue),
            "cache_tokens": self.cache_tokens,
            "cache_tokens_used": self.cache.used_tokens,
            "cache_bytes": self.cache.allocated_bytes,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_found": self.cached_tokens,
            "preempted": self.preempted,
        }
        return figures | ({"drafted": drafts.drafted, "accepted": drafts.accepted} if drafts.depth else {})

    def step(self) -> list[Token | Finished]:
        """`decode`, as events."""
        return [event for sequence in self.decode() for event in events_of(sequence)]

    @torch.inference_mode()
    def decode(self) -> list[Sequence]:
        """Admits requests that fit, and decodes one token (more with drafts) for every live sequence; returns them, and
        with them those that have finished."""
        self._start_prompts()
        self._prefill()
        self._preempt()
        decoded = self.runner.sequences
        if decoded:
            self.runner.sample()
            self._retire()
        if self.runner.sequences:
            self.runner.advance()
            self._retire()
        return decoded

    def _retire(self) -> None:
        for sequence in self.runner.retire():
            self.queue.finished(sequence)
            if sequence.finish != "error":
                self._lengths.ended(len(sequence.tokens))

    def _start_prompts(self) -> None:
        """Starts prompts while rows and pages suffice; when nothing is running the next one always fits."""
        while True:
            busy = len(self.runner.sequences) + sum(len(job.sequences) for job in self._prefills)
            sequences = self.queue.peek(self.max_rows - busy) if busy < self.max_rows else []
            if not sequences:
                return
            first = sequences[0]
            job = _Prefill(self.cache.open(first.ids, first.page_keys, len(first.request.prompt)), sequences)
            del job.sequences[max(self._most_that_fit(job), 0 if busy else 1) :]
            if not job.sequences:
                self.cache.drop(job.prompt)
                return
            if sequences[0].cached_tokens is None:  # otherwise it was preempted, and its prompt is counted
                for sequence in job.sequences:
                    sequence.cached_tokens = job.prompt.cached
                self.cached_tokens += job.prompt.cached
                self.prompt_tokens += len(job.prompt.ids)
            self.queue.take(job.sequences)
            self._prefills.append(job)

    def _most_that_fit(self, job: _Prefill) -> int:
        """How many sequences of `job` may start so that they, and all that run, find pages until they end."""
        if not self._bounded:
            return len(job.sequences)
        free, lookahead, more = self.cache.free_pages(), self.runner.lookahead, self._lengths.more
        if free is None:  # every row has as many slots as the longest
            running = [*self.runner.sequences, *(one for other in self._prefills for one in other.sequences)]
            longest = [len(one.request.prompt) + len(one.tokens) + more(one) for one in (*running, *job.sequences)]
            return max(0, min(len(job.sequences), self.cache_tokens // max(longest) - len(running)))
        left, owned = free - self._reserved_pages(), free
        needs = []
        for sequence, pages in zip(self.runner.sequences, self.cache.row_pages, strict=True):
            needs.append(_need(sequence, lookahead, sequence.shared, more))
            owned += len(pages) - sequence.shared // PAGE
        for other in self._prefills:
            needs += other.needs(len(other.sequences), lookahead, more)
            owned += other.pages_of_its_own(len(other.sequences))

        def fit(count: int) -> bool:
            if job.pages_needed(lookahead, count) > left:
                return False
            return peak_pages(needs + job.needs(count, lookahead, more)) <= owned + job.pages_of_its_own(count)

        low, high = 0, len(job.sequences)
        while low < high:
            count = high if not low else (low + high + 1) // 2
            low, high = (count, high) if fit(count) else (low, count - 1)
        return low

    def _prefill(self) -> None:
        """Prefills a bounded number of tokens; completed prompts become live sequences."""
        chunks: list[PrefillChunk] = []
        budget = self.prefill_tokens
        for job in self._prefills:
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
        started = self._prefills[: len(chunks)]
        routing = any(sequence.request.routing for job in started for sequence in job.sequences)
        logits_PV = self.runner.prefill(chunks, routing)
        done = [p for p, chunk in enumerate(chunks) if chunk.end == len(chunk.prompt.ids)]
        if done:
            jobs = [started[p] for p in done]
            self._prefills = [job for job in self._prefills if job not in jobs]
            if len(done) < len(chunks):
                logits_PV = logits_PV[indices(done, logits_PV.device)]
            self.runner.admit([(job.prompt, job.sequences) for job in jobs], logits_PV)

    def _preempt(self) -> None:
        """Preempts the youngest sequences until the others have room for their next tokens."""
        while (sequences := self.runner.sequences) and (free := self.cache.free_pages()) is not None:
            if len(sequences) * pages_for(self.runner.lookahead) + self._reserved_pages() <= free:
                break  # they need no more than this
            length_B = [position + self.runner.lookahead for position in self.runner.positions()]
            if self.cache.pages_needed(length_B) + self._reserved_pages() <= free:
                break
            self.preempted += 1
            if self._prefills:  # younger than any sequence that decodes
                job = self._prefills.pop()
                self.cache.drop(job.prompt)
                for sequence in reversed(job.sequences):
                    self.queue.requeue(sequence)
            else:
                youngest = max(range(len(sequences)), key=lambda b: sequences[b].number)
                self.queue.requeue(self.runner.preempt(youngest))

    def _reserved_pages(self) -> int:
        """Pages that the prompts in prefill will still allocate."""
        return sum(job.pages_needed(self.runner.lookahead) for job in self._prefills)


def events_of(sequence: Sequence) -> Iterator[Token | Finished]:
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
    """Sequences that wait for a row, served round-robin by client, and a client's by user, so that one with a thousand
    requests, or under a thousand names, does not starve another.

    The client with the fewest running sequences goes first; among equals, the least recently served. The same holds for
    the users of a client, and within a user, first come first served. Preempted sequences return before new ones start.
    """

    def __init__(self) -> None:
        self.running: Counter[tuple[str, ...]] = Counter()
        """Sequences in prefill or decoding, by (client,) and by (client, user)."""
        self._preempted: deque[Sequence] = deque()
        self._waiting: dict[tuple[str, str], deque[Sequence]] = {}
        """By (client, user)."""
        self._last_turn: dict[tuple[str, ...], int] = {}
        """When each client, and each of its users, with waiting or running sequences was last served."""
        self._turns = 0

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._waiting.values()))

    def add(self, sequence: Sequence) -> None:
        self._waiting.setdefault(_line(sequence), deque()).append(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Puts a preempted sequence before all others."""
        self._runs(sequence, -1)
        self._preempted.appendleft(sequence)

    def peek(self, most: int) -> list[Sequence]:
        """The next sequence, and up to `most` in total with the same prompt that follow it; they stay in the queue."""
        if self._preempted:
            return [self._preempted[0]]
        if not self._waiting:
            return []

        def turn(line: tuple[str, str]) -> tuple[int, ...]:
            served = [(self.running[who], self._last_turn.get(who, 0)) for who in (line[:1], line)]
            return (*served[0], *served[1], self._waiting[line][0].number)

        line = min(self._waiting, key=turn)
        clients, users = (
            len({client for client, _ in self._waiting}),
            sum(line[0] == other for other, _ in self._waiting),
        )
        sequences, most = self._waiting[line], max(1, most // clients // users)
        prompt = sequences[0].request.prompt
        same = lambda ids: ids is prompt or ids == prompt  # noqa: E731 (comparing a long prompt with itself takes time)
        return list(takewhile(lambda sequence: same(sequence.request.prompt), islice(sequences, most)))

    def take(self, sequences: list[Sequence]) -> None:
        """Removes sequences returned by `peek` and counts them as running."""
        for sequence in sequences:
            line = _line(sequence)
            preempted = self._preempted and self._preempted[0] is sequence
            queue = self._preempted if preempted else self._waiting[line]
            assert queue.popleft() is sequence
            self._runs(sequence, 1)
            if not self._waiting.get(line, True):
                del self._waiting[line]
        self._turns += 1
        line = _line(sequences[0])
        self._last_turn[line[:1]] = self._last_turn[line] = self._turns

    def finished(self, sequence: Sequence) -> None:
        """A running sequence has ended."""
        self._runs(sequence, -1)
        self._forget(sequence)

    def remove(self, number: int) -> bool:
        """Drops a waiting sequence; False if none has this number."""
        for queue in (self._preempted, *self._waiting.values()):
            for sequence in queue:
                if sequence.number == number:
                    queue.remove(sequence)
                    self._waiting = {line: rest for line, rest in self._waiting.items() if rest}
                    self._forget(sequence)
                    return True
        return False

    def _runs(self, sequence: Sequence, count: int) -> None:
        line = _line(sequence)
        self.running[line[:1]] += count
        self.running[line] += count

    def _forget(self, sequence: Sequence) -> None:
        """Drops what is known of a client and a user if none of their sequences is left."""
        line = _line(sequence)
        left: set[tuple[str, ...]] = {*self._waiting, *map(_line, self._preempted)}
        left |= {other[:1] for other in left}
        for who in (line, line[:1]):
            if not self.running[who] and who not in left:
                self.running.pop(who, None)
                self._last_turn.pop(who, None)


def _line(sequence: Sequence) -> tuple[str, str]:
    return sequence.request.client, sequence.request.user
