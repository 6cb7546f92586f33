"""DualPipe and DualPipeV as tables (V3 3.2.1 and Fig. 5).

DualPipe has two copies of the model on P ranks: rank r holds stage r of lane 0 and stage P - 1 - r of lane 1, and half
of the micro-batches enter at each end. DualPipeV folds one copy: R ranks, rank r holds stages r and 2R - 1 - r, all
micro-batches enter at rank 0 and turn around at the last rank. Both follow the same eight steps: rank r of DualPipeV
does what it would do among P = 2R ranks of DualPipe, with its second stage in place of the second lane.
"""

from __future__ import annotations

from collections import deque

from bessemer.addons.distributed.table import Action, Pair, Step, Table
from bessemer.errors import UserError


def dualpipe(ranks: int, micro: int) -> Table:
    """DualPipe for P = `ranks` and M = `micro`; UserError unless both are even and M is at least 2P."""
    if ranks < 2 or ranks % 2:
        raise UserError(f"dualpipe needs an even number of pipeline ranks, not {ranks}; use {max(2, ranks + 1)}")
    if micro < 2 * ranks or micro % 2:
        least = max(2 * ranks, micro + micro % 2)
        raise UserError(
            f"dualpipe on {ranks} ranks needs an even number of micro-batches, at least {2 * ranks}, not {micro}; "
            f"use {least}"
        )
    steps = []
    for rank in range(ranks):
        h = min(rank, ranks - 1 - rank)
        near = 0 if rank < ranks // 2 else 1  # the lane whose entry is nearer
        directions = [
            (near, rank if near == 0 else ranks - 1 - rank),
            (1 - near, ranks - 1 - rank if near == 0 else rank),
        ]
        steps.append(_eight_steps(ranks // 2, h, micro // 2 - ranks + h + 1, directions))
    placement = (tuple(range(ranks)), tuple(reversed(range(ranks))))
    return Table("dualpipe", ranks, placement, micro, tuple(steps))


def dualpipe_v(ranks: int, micro: int) -> Table:
    """DualPipeV for R = `ranks` and M = `micro`; UserError unless M is at least 2R."""
    if ranks < 1:
        raise UserError(f"dualpipe-v needs at least one pipeline rank, not {ranks}")
    if micro < 2 * ranks:
        raise UserError(f"dualpipe-v on {ranks} ranks needs at least {2 * ranks} micro-batches, not {micro}")
    stages = 2 * ranks
    steps = [
        _eight_steps(ranks, rank, micro - stages + rank + 1, [(0, rank), (0, stages - 1 - rank)])
        for rank in range(ranks)
    ]
    return Table("dualpipe-v", stages, (tuple([*range(ranks), *reversed(range(ranks))]),), micro, tuple(steps))


def _eight_steps(H: int, h: int, pairs: int, directions: list[tuple[int, int]]) -> tuple[Step, ...]:
    """One rank's steps: `mine` is (lane, stage) of phase 0 and of phase 1; step 4 runs `pairs` times."""
    steps: list[Step] = []
    forwards, backwards = [0, 0], [0, 0]
    deferred: deque[Action] = deque()  # weight gradients

    def F(phase: int) -> Action:
        forwards[phase] += 1
        return Action("F", directions[phase][1], forwards[phase] - 1, directions[phase][0])

    def B(phase: int) -> Action:
        backwards[phase] += 1
        return Action("B", directions[phase][1], backwards[phase] - 1, directions[phase][0])

    def I(phase: int) -> Action:  # noqa: E743 (the field's letter)
        work = B(phase)._replace(kind="I")
        deferred.append(work._replace(kind="W"))
        return work

    for _ in range(2 * (H - h - 1)):  # 1: F0
        steps.append(F(0))
    for _ in range(h + 1):  # 2: F0 F1
        steps += [F(0), F(1)]
    for _ in range(H - h - 1):  # 3: I1 W F1
        steps += [I(1), deferred.popleft(), F(1)]
    for number in range(pairs):  # 4: F0&B1 F1&B0
        forward, backward = F(0), B(1)
        # on the middle ranks the first backward needs a micro-batch that has just arrived, so it cannot overlap
        separate = number == 0 and h == H - 1
        steps += [forward, backward] if separate else [Pair(forward, backward)]
        steps.append(Pair(F(1), B(0)))
    for _ in range(H - h - 1):  # 5: B1 F1&B0
        steps.append(B(1))
        steps.append(Pair(F(1), B(0)))
    split = False
    for number in range(h + 1):  # 6: B1 B0, from halfway on I1 I0
        if number == (h + 1) // 2 and h % 2:
            split = True
        steps.append(I(1) if split else B(1))
        if number == (h + 1) // 2 and not h % 2:
            split = True
        steps.append(I(0) if split else B(0))
    for _ in range(H - h - 1):  # 7: W I0
        steps += [deferred.popleft(), I(0)]
    for _ in range(h + 1):  # 8: W
        steps.append(deferred.popleft())
    assert not deferred
    return tuple(steps)
