"""Messages need no names: both ends know their order from the table, and no rank waits forever."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.distributed.executor import AHEAD, message, orders, sharing_ranks
from bessemer.addons.distributed.schedules import SCHEDULES, schedule
from bessemer.addons.distributed.table import Action, Pair
from bessemer.errors import UserError

SIZES = [("gpipe", 4, 3), ("1f1b", 4, 6), ("1f1b", 2, 4), ("interleaved", 4, 8), ("interleaved", 2, 4), ("zb1p", 4, 7),
         ("zbv", 4, 8), ("zbv", 2, 5), ("dualpipe", 2, 6), ("dualpipe", 8, 20), ("dualpipe-v", 4, 9),
         ("dualpipe-v", 2, 5)]  # fmt: skip


def everything(table):
    """All possible messages, derived from the stages alone."""
    for lane, placement in enumerate(table.place):
        for micro in range(table.per_lane):
            for stage in range(1, table.stages):
                yield placement[stage - 1], placement[stage], Action("F", stage, micro, lane)
                yield placement[stage], placement[stage - 1], Action("B", stage - 1, micro, lane)


@pytest.mark.parametrize(("name", "ranks", "micro"), SIZES)
def test_every_message_is_sent_once_in_its_direction(name, ranks, micro):
    table = schedule(name, ranks, micro)
    expected = sorted(message for message in everything(table) if message[0] != message[1])
    assert sorted((*direction, sent) for direction, all_sent in orders(table).items() for sent in all_sent) == expected
    assert set(SCHEDULES) == {name for name, *_ in SIZES}


class Ends:
    """Ranks that send and receive as NCCL does: a group performs each end's requests in their order, and a send
    completes only when the other end receives."""

    def __init__(self, table, group):
        self.table, self.group, self.orders = table, group, orders(table)
        self.asked = {}
        """{(group, rank): requests that are not complete}."""
        self.done = set()
        self.posted = dict.fromkeys(self.orders, 0)

    def ask(self, source, target, kind, sent):
        rank = source if kind == "send" else target
        self.asked.setdefault((self.group(source, target), rank), deque()).append((kind, sent))
        self.match(self.group(source, target), source, target)

    def match(self, group, a, b):
        left, right = (self.asked.setdefault((group, rank), deque()) for rank in (a, b))
        while left and right and left[0][1] == right[0][1] and left[0][0] != right[0][0]:
            self.done.add(left.popleft()[1])
            right.popleft()

    def busy(self, rank):
        """Whether any request of this rank is incomplete."""
        return any(requests for (_, who), requests in self.asked.items() if who == rank)

    def has(self, direction, message):
        place = self.orders[direction].index(message)
        while self.posted[direction] < min(place + 1 + AHEAD, len(self.orders[direction])):
            self.ask(*direction, "receive", self.orders[direction][self.posted[direction]])
            self.posted[direction] += 1
        return message in self.done


def needed(action, table):
    """(sender, message) for everything that an action waits for."""
    kind, stage, micro, lane = action
    if kind == "F" and stage:
        yield table.place[lane][stage - 1], Action("F", stage, micro, lane)
    if kind in "BI" and stage < table.stages - 1:
        yield table.place[lane][stage + 1], Action("B", stage, micro, lane)


def one_way(source, target):
    return source, target


def stuck(table, group, cold=False):
    """Runs every rank and returns those that cannot finish. `cold`: the first time a rank computes something, it waits
    for all work given to its device, as tuning and loading a kernel do."""
    ends, at, arrived, moved = Ends(table, group), [0] * table.ranks, set(), True
    known = [set() for _ in range(table.ranks)]
    while moved:
        moved = False
        for rank, steps in enumerate(table.steps):
            while at[rank] < len(steps):
                step = steps[at[rank]]
                parts = step if isinstance(step, Pair) else (step,)
                waited = [pair for part in parts for pair in needed(part, table)]
                if not all(sent in arrived if who == rank else ends.has((who, rank), sent) for who, sent in waited):
                    break
                kind = "F&B" if isinstance(step, Pair) else step.kind
                if cold and kind not in known[rank] and ends.busy(rank):
                    break
                known[rank].add(kind)
                for part in parts:
                    sent = message(part, table.stages)
                    if sent is not None and table.place[sent.lane][sent.stage] == rank:
                        arrived.add(sent)
                    elif sent is not None:
                        ends.ask(rank, table.place[sent.lane][sent.stage], "send", sent)
                at[rank], moved = at[rank] + 1, True
    if not any(at[rank] < len(steps) for rank, steps in enumerate(table.steps)):
        assert not any(ends.asked.values()), "something was sent and never taken"
    return [rank for rank, steps in enumerate(table.steps) if at[rank] < len(steps)]


@pytest.mark.parametrize(("name", "ranks", "micro"), SIZES)
def test_no_deadlock_with_blocking_sends(name, ranks, micro):
    assert stuck(schedule(name, ranks, micro), one_way) == []


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(SCHEDULES)), ranks=st.integers(1, 7), micro=st.integers(1, 24))
def test_no_deadlock_at_random_sizes(name, ranks, micro):
    try:
        table = schedule(name, ranks, micro)
    except UserError:
        return
    assert stuck(table, one_way) == []


def test_one_group_for_both_directions_deadlocks():
    """Why each direction has its own group: two neighbours that send at the same time would wait for each other."""
    assert stuck(schedule("dualpipe", 4, 8), lambda source, target: frozenset((source, target)))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_device_sync_within_a_step_deadlocks(ahead, monkeypatch):
    """Why `Executor.warm` comes before the messages; taking no message early is not enough."""
    monkeypatch.setattr("test_channels.AHEAD", ahead)
    assert stuck(schedule("dualpipe", 4, 8), one_way, cold=True)


def test_activations_held_by_each_stage():
    assert sharing_ranks(schedule("1f1b", 4, 4)) == [(0, 3)]
    assert sharing_ranks(schedule("dualpipe", 4, 8)) == [(0, 3), (1, 2)]
    assert sharing_ranks(schedule("dualpipe-v", 4, 8)) == []
