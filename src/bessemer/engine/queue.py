"""Who is next: waiting requests, in turn by client.

The client with the fewest requests under way goes first, of equals the one whose turn is longest ago, so that one who
sends a thousand does not keep another waiting; within a client, first come first served. What had to leave to make
room comes back before anybody new.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from bessemer.engine.sequence import Row


class Queue:
    """Rows that wait. `under_way` counts each client's rows that are being taken in or decode."""

    def __init__(self) -> None:
        self.under_way: Counter[str] = Counter()
        self._returned: deque[Row] = deque()
        self._waiting: dict[str, deque[Row]] = {}
        self._turn: dict[str, int] = {}
        """When each client that waits or is under way was last served."""
        self._turns = 0

    def __len__(self) -> int:
        return len(self._returned) + sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Row]:
        yield from self._returned
        for rows in self._waiting.values():
            yield from rows

    def add(self, row: Row) -> None:
        self._waiting.setdefault(row.request.client, deque()).append(row)

    def give_back(self, row: Row) -> None:
        """A row that had to leave: it goes on before anybody new begins."""
        self.under_way[row.request.client] -= 1
        self._returned.appendleft(row)

    def next(self, most: int) -> list[Row]:
        """The next row, and up to `most` in all with the same prompt that would come after it; they are not taken."""
        if self._returned:
            return [self._returned[0]]
        heads = [
            (self.under_way[client], self._turn.get(client, 0), rows[0].number, client)
            for client, rows in self._waiting.items()
        ]
        if not heads:
            return []
        rows = self._waiting[min(heads)[-1]]
        most = max(1, most // len(heads))
        same: list[Row] = []
        for row in rows:
            if row.request.prompt != rows[0].request.prompt or len(same) == most:
                break
            same.append(row)
        return same

    def take(self, rows: list[Row]) -> None:
        """These rows, given by `next`, are under way now."""
        for row in rows:
            line = self._returned if self._returned and self._returned[0] is row else self._waiting[row.request.client]
            assert line.popleft() is row
            self.under_way[row.request.client] += 1
            if not self._waiting.get(row.request.client, True):
                del self._waiting[row.request.client]
        self._turns += 1
        self._turn[rows[0].request.client] = self._turns

    def done(self, row: Row) -> None:
        """A row under way has ended."""
        client = row.request.client
        self.under_way[client] -= 1
        if not self.under_way[client]:
            del self.under_way[client]
            if client not in self._waiting:
                self._turn.pop(client, None)

    def remove(self, number: int) -> bool:
        """Drops a waiting row; False if none has this number."""
        for line in (self._returned, *self._waiting.values()):
            for row in line:
                if row.number == number:
                    line.remove(row)
                    self._waiting = {client: rows for client, rows in self._waiting.items() if rows}
                    return True
        return False
