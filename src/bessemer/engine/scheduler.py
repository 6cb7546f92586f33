"""Continuous batching: requests come and go while the others decode.

One `step` is: start prompts while rows and pages last; take in a bounded piece of prompts, so that nobody who decodes
waits long for a long prompt; draw a token for every row; let what is finished go. When the cache is full the youngest
row leaves and waits; when it comes back its tokens so far are taken in like a prompt, and since a row's stream is
counted by position, it goes on with the same tokens.

Prompts that begin alike share pages: several samples of one prompt at once, a repeated system prompt or an earlier
turn of a conversation through what the cache remembers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from bessemer.engine.batch import Batch, not_finite
from bessemer.engine.decode import Part, new_cache, prefill
from bessemer.engine.engine import Engine
from bessemer.engine.kv_cache import Held
from bessemer.engine.pages import pages_for
from bessemer.engine.queue import Queue
from bessemer.engine.request import Finished, Request, Token
from bessemer.engine.routing_trace import Trace
from bessemer.engine.sequence import Row, think_ids
from bessemer.engine.speculative import check_drafts
from bessemer.engine.stop import StopStrings, check_strings
from bessemer.errors import UserError


@dataclass(eq=False)
class _Filling:
    """A prompt that is being taken in, and the rows that will continue it."""

    held: Held
    rows: list[Row]

    def missing(self, ahead: int) -> int:
        """Pages it will still take until its rows decode: the rest of the prompt, then one for every further row."""
        return pages_for(len(self.held.ids) + ahead) - len(self.held.pages) + len(self.rows) - 1


class Scheduler:
    """Runs requests on one engine. Not thread-safe: one thread adds, cancels and steps."""

    def __init__(
        self,
        engine: Engine,
        *,
        rows: int = 64,
        cache_tokens: int | None = None,
        prefill_tokens: int = 2048,
        drafts: int = 0,
    ) -> None:
        """At most `rows` requests decode together; the cache holds `cache_tokens` tokens (None: rows of full length);
        a step takes in at most `prefill_tokens` tokens of prompts, so that long prompts do not stall the others.
        `drafts` tokens are guessed by the MTP module each step (see `speculate`)."""
        for name, value in (("rows", rows), ("cache_tokens", cache_tokens), ("prefill_tokens", prefill_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"{name} must be a whole number of at least 1, is {value!r}")
        self.engine, self.model = engine, engine.model
        self.most_rows, self.prefill_tokens = rows, prefill_tokens
        self.drafts = check_drafts(self.model, drafts)
        self.cache_tokens = cache_tokens or rows * (self.model.cfg.max_seq_len + self.drafts)
        self.preempted = self.prompt_tokens = self.found_tokens = 0
        self.queue = Queue()
        self._numbers = count(1)
        self._think = think_ids(engine.tokenizer)
        self._filling: list[_Filling] = []
        self.model.eval()
        routed = any(not layer.dense for layer in self.model.layers)
        trace = Trace(self.model.cfg) if routed else None
        self.cache = new_cache(self.model, self.cache_tokens, remember=True, drafts=self.drafts > 0)
        self.batch = Batch(self.model, engine.tokenizer, self.cache, trace, self.drafts, engine.compiled)

    def add(self, request: Request) -> int:
        """Queues a request and returns its ticket. UserError if it can never run (empty, too long, bad ids)."""
        self.engine.check_prompt(request.prompt)
        room = self.model.cfg.max_seq_len - len(request.prompt)
        request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, is {request.max_new_tokens}")
        if request.routing and self.batch.trace is None:
            raise UserError("routing: no layer of this model has routed experts; leave it off")
        strings = check_strings(request.stop_strings)
        needed, limit = len(request.prompt) + request.max_new_tokens + self.drafts, pages_for(self.cache_tokens)
        if pages_for(needed) > limit:
            raise UserError(
                f"the request needs room for {needed} tokens and the cache holds {self.cache_tokens}; shorten the "
                "prompt or max_new_tokens, or give the cache more tokens"
            )
        stop = StopStrings(self.engine.tokenizer, strings) if strings else None
        row = Row(request, next(self._numbers), stop, self._think)
        self.queue.add(row)
        return row.number

    def cancel(self, ticket: int) -> None:
        """Its row, pages and place in the queue are free at once; no event follows. Unknown tickets are ignored."""
        if self.queue.remove(ticket):
            return
        for job in self._filling:
            for row in job.rows:
                if row.number == ticket:
                    job.rows.remove(row)
                    self.queue.done(row)
                    if not job.rows:
                        self.cache.drop(job.held)
                        self._filling.remove(job)
                    return
        live = [row.number != ticket for row in self.batch.rows]
        if not all(live):
            self.queue.done(self.batch.rows[live.index(False)])
            self.batch.take(live)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not (self.queue or self._filling or self.batch.rows)

    def figures(self) -> dict[str, float]:
        """How things stand, for a page of metrics."""
        return {
            "running": len(self.batch.rows),
            "prefilling": sum(len(job.rows) for job in self._filling),
            "waiting": len(self.queue),
            "cache_tokens": self.cache_tokens,
            "cache_tokens_used": self.cache.used_tokens,
            "cache_bytes": self.cache.allocated_bytes,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_found": self.found_tokens,
            "preempted": self.preempted,
            **self._guesses(),
        }

    def _guesses(self) -> dict[str, float]:
        drafter = self.batch.drafter
        return {} if drafter is None else {"drafted": drafter.drafted, "accepted": drafter.accepted}

    def step(self) -> list[Token | Finished]:
        """Admits what fits, decodes one token for every running row, and says what happened."""
        with torch.inference_mode():
            self._start()
            self._fill()
            self._make_room()
            if not self.batch.rows:
                return []
            events: list[Token | Finished] = []
            token_B = self.batch.draw()
            token_B = self.batch.retire(self._told(events, token_B))
            if self.batch.rows:
                self.batch.advance(token_B)
                if self.drafts:
                    self.batch.retire(self._told(events))
            return events

    def _start(self) -> None:
        """Opens the prompts that rows and pages suffice for; with nothing under way the next one always fits."""
        while True:
            busy = len(self.batch.rows) + sum(len(job.rows) for job in self._filling)
            rows = self.queue.next(self.most_rows - busy) if busy < self.most_rows else []
            if not rows:
                return
            job = _Filling(self.cache.open(rows[0].ids), rows)
            room = self.cache.room()
            promised = sum(other.missing(self.batch.ahead) for other in self._filling)
            while room is not None and promised + job.missing(self.batch.ahead) > room and len(job.rows) > 1:
                job.rows.pop()
            if busy and room is not None and promised + job.missing(self.batch.ahead) > room:
                self.cache.drop(job.held)
                return
            for row in job.rows:
                row.found = job.held.found
            self.found_tokens += job.held.found
            self.prompt_tokens += len(job.held.ids)
            self.queue.take(job.rows)
            self._filling.append(job)

    def _fill(self) -> None:
        """A piece of the prompts through the network; those that are complete become rows."""
        budget, parts = self.prefill_tokens, []
        for job in self._filling:
            rest = len(job.held.ids) - job.held.length
            if parts and rest > budget and (budget <= 0 or not self.cache.chunks):
                break
            end = job.held.length + (min(rest, budget) if self.cache.chunks else rest)
            self.cache.extend(job.held, end)
            parts.append(Part(job.held, end))
            budget -= rest
            if budget <= 0:
                break
        if not parts:
            return
        logits_PV = prefill(self.model, self.cache, parts, self.batch.trace)
        done = [p for p, part in enumerate(parts) if part.end == len(part.held.ids)]
        if done:
            jobs = [self._filling[p] for p in done]
            self._filling = [job for job in self._filling if job not in jobs]
            self.batch.admit([(job.held, job.rows) for job in jobs], logits_PV[done])

    def _told(self, events: list[Token | Finished], token_B: Tensor | None = None) -> Tensor | None:
        """Adds what the rows wrote since the last time; hands token_B through."""
        for row in self.batch.rows:
            for n in range(row.said, len(row.tokens)):
                top, routes = row.top[n] if row.top else (), row.routes[n] if row.routes else None
                events.append(Token(row.number, row.tokens[n], row.logp[n], row.raw_logp[n], top, routes))
            row.said = len(row.tokens)
            if row.finish is not None:
                message = str(not_finite(1, 1, row.said + 1)) if row.finish == "error" else ""
                events.append(Finished(row.number, row.finish, message, row.found))
                self.queue.done(row)
        return token_B

    def _make_room(self) -> None:
        """Sends the youngest away until every row can take in its next tokens."""
        while self.batch.rows and (room := self.cache.room()) is not None:
            promised = sum(job.missing(self.batch.ahead) for job in self._filling)
            if self.cache.need([p + self.batch.ahead for p in self.batch.position_B.tolist()]) + promised <= room:
                break
            self.preempted += 1
            if self._filling:  # younger than any row that decodes
                job = self._filling.pop()
                self.cache.drop(job.held)
                for row in reversed(job.rows):
                    self.queue.give_back(row)
            else:
                youngest = max(range(len(self.batch.rows)), key=lambda b: self.batch.rows[b].number)
                self.queue.give_back(self.batch.leave(youngest))
