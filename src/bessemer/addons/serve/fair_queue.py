"""The queue of a server: clients take turns, and a prompt starts only if everything that runs is expected to end before
the cache is full (`headroom`)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from itertools import islice

from bessemer.addons.serve.headroom import AnswerLengths, Need, peak_pages
from bessemer.addons.serve.requests import ServedSequence
from bessemer.addons.serve.scheduler import PromptJob, Scheduler, WaitingQueue, same_prompt
from bessemer.engine.kv_cache import PAGE, pages_for


class FairQueue(WaitingQueue):
    """Sequences that wait for a row, served round-robin by client, and a client's by user, so that one with a thousand
    requests, or under a thousand names, does not starve another.

    The client with the fewest running sequences goes first; among equals, the least recently served. The same holds for
    the users of a client, and within a user, first come first served. Preempted sequences return before new ones start.
    """

    def __init__(self) -> None:
        self.running: Counter[tuple[str, ...]] = Counter()
        """Sequences in prefill or decoding, by (client,) and by (client, user)."""
        self._preempted: deque[ServedSequence] = deque()
        self._lines: dict[tuple[str, str], deque[ServedSequence]] = {}
        """Those that wait by (client, user)."""
        self._lengths = AnswerLengths()
        self._last_turn: dict[tuple[str, ...], int] = {}
        """When each client, and each of its users, with waiting or running sequences was last served."""
        self._turns = 0

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._lines.values()))

    def add(self, sequence: ServedSequence) -> None:
        self._lines.setdefault(_line(sequence), deque()).append(sequence)

    def requeue(self, sequence: ServedSequence) -> None:
        """Puts a preempted sequence before all others."""
        self._runs(sequence, -1)
        self._preempted.appendleft(sequence)

    def peek(self, most: int) -> list[ServedSequence]:
        """The next sequence, and up to `most` in total with the same prompt that follow it; they stay in the queue."""
        if self._preempted:
            return [self._preempted[0]]
        if not self._lines:
            return []

        def turn(line: tuple[str, str]) -> tuple[int, ...]:
            served = [(self.running[key], self._last_turn.get(key, 0)) for key in (line[:1], line)]
            return (*served[0], *served[1], self._lines[line][0].number)

        line = min(self._lines, key=turn)
        clients, users = (
            len({client for client, _ in self._lines}),
            sum(line[0] == other for other, _ in self._lines),
        )
        sequences, most = self._lines[line], max(1, most // clients // users)
        return same_prompt(islice(sequences, most))

    def take(self, sequences: list[ServedSequence]) -> None:
        """Removes sequences returned by `peek` and counts them as running."""
        for sequence in sequences:
            line = _line(sequence)
            preempted = self._preempted and self._preempted[0] is sequence
            queue = self._preempted if preempted else self._lines[line]
            assert queue.popleft() is sequence
            self._runs(sequence, 1)
            if not self._lines.get(line, True):
                del self._lines[line]
        self._turns += 1
        line = _line(sequences[0])
        self._last_turn[line[:1]] = self._last_turn[line] = self._turns

    def finished(self, sequence: ServedSequence) -> None:
        if sequence.finish not in (None, "error"):
            self._lengths.ended(len(sequence.tokens))
        self._runs(sequence, -1)
        self._forget(sequence)

    def remove(self, number: int) -> bool:
        """Drops a waiting sequence; False if none has this number."""
        for queue in (self._preempted, *self._lines.values()):
            for sequence in queue:
                if sequence.number == number:
                    queue.remove(sequence)
                    self._lines = {line: jobs for line, jobs in self._lines.items() if jobs}
                    self._forget(sequence)
                    return True
        return False

    def most_that_fit(self, scheduler: Scheduler, job: PromptJob) -> int:
        """As many as find pages until they end, as all that run do."""
        free, lookahead, more = scheduler.cache.free_pages(), scheduler.runner.lookahead, self._lengths.more
        if free is None:  # every row has as many slots as the longest
            running = scheduler.started()
            longest = [
                len(queued.request.prompt) + len(queued.tokens) + more(queued) for queued in (*running, *job.sequences)
            ]
            return max(0, min(len(job.sequences), scheduler.cache_tokens // max(longest) - len(running)))
        remaining, owned = free - scheduler.reserved_pages(), free
        needs = []
        for sequence, pages in zip(scheduler.runner.sequences, scheduler.cache.row_pages, strict=True):
            needs.append(_need(sequence, lookahead, sequence.shared, more))
            owned += len(pages) - sequence.shared // PAGE
        for other in scheduler.prefills:
            needs += _needs(other, len(other.sequences), lookahead, more)
            owned += _own_pages(other, len(other.sequences))

        def fit(count: int) -> bool:
            if job.pages_needed(lookahead, count) > remaining:
                return False
            return peak_pages(needs + _needs(job, count, lookahead, more)) <= owned + _own_pages(job, count)

        low, high = 0, len(job.sequences)
        while low < high:
            count = high if not low else (low + high + 1) // 2
            low, high = (count, high) if fit(count) else (low, count - 1)
        return low

    def _runs(self, sequence: ServedSequence, count: int) -> None:
        line = _line(sequence)
        self.running[line[:1]] += count
        self.running[line] += count

    def _forget(self, sequence: ServedSequence) -> None:
        """Drops what is known of a client and a user if none of their sequences is left."""
        line = _line(sequence)
        waiting: set[tuple[str, ...]] = {*self._lines, *map(_line, self._preempted)}
        waiting |= {other[:1] for other in waiting}
        for client in (line, line[:1]):
            if not self.running[client] and client not in waiting:
                self.running.pop(client, None)
                self._last_turn.pop(client, None)


def _line(sequence: ServedSequence) -> tuple[str, str]:
    return sequence.request.client, sequence.request.user


def _own_pages(job: PromptJob, count: int) -> int:
    """Pages that a prompt has and that its first `count` sequences do not share, less those to share that it lacks."""
    shared = job.prompt.full_pages if count > 1 else 0
    return len(job.prompt.pages) - shared


def _needs(job: PromptJob, count: int, lookahead: int, more: Callable[[ServedSequence], int]) -> list[Need]:
    """What its first `count` sequences take besides the pages that they share."""
    shared = job.prompt.full_pages * PAGE if count > 1 else 0
    return [_need(sequence, lookahead, shared, more) for sequence in job.sequences[:count]]


def _need(sequence: ServedSequence, lookahead: int, shared: int, more: Callable[[ServedSequence], int]) -> Need:
    """What a sequence takes after `shared` tokens."""
    prompt, request = len(sequence.request.prompt) + lookahead - shared, sequence.request
    return Need(prompt + len(sequence.tokens), more(sequence), pages_for(prompt + request.max_new_tokens - 1))
