"""Zero-bubble schedules, which split every backward so that weight gradients fill what would be idle (Qi et al. 2024;
V3 Table 2 compares with ZB1P).

    ZB1P   a stage a rank. As 1F1B, but a rank hands its input gradient on at once and does the weight gradient r turns
           later: no more micro-batches are held than 1F1B's first rank holds.
    ZBV    stages r and 2P - 1 - r on rank r. The last stage is on rank 0 again, so a micro-batch comes back where it
           began, and with F = I = W no rank is idle between its first and its last piece of work.
"""

from __future__ import annotations

from bessemer.errors import UserError
from bessemer.dist.table import Action, Step, Table


def zb1p(ranks: int, micro: int) -> Table:
    """P ranks, any number of micro-batches."""
    if ranks < 1 or micro < 1:
        raise UserError(f"zb1p needs at least one rank and one micro-batch, is {ranks} and {micro}")
    steps = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro)
        order = [Action("F", rank, m) for m in range(ahead)]
        weights = 0
        for m in range(micro):
            if ahead + m < micro:
                order.append(Action("F", rank, ahead + m))
            order.append(Action("I", rank, m))
            if m >= rank:
                order.append(Action("W", rank, weights))
                weights += 1
        steps.append(tuple(order + [Action("W", rank, m) for m in range(weights, micro)]))
    return Table("zb1p", ranks, (tuple(range(ranks)),), micro, tuple(steps))


def zbv(ranks: int, micro: int) -> Table:
    """R ranks, M at least 2R - 1 micro-batches (fewer leave the V half empty)."""
    if ranks < 1:
        raise UserError(f"zbv needs at least one pipeline rank, is {ranks}")
    if micro < 2 * ranks - 1:
        raise UserError(f"zbv on {ranks} ranks needs {2 * ranks - 1} micro-batches at least, is {micro}")
    steps = tuple(_v(rank, ranks, micro) for rank in range(ranks))
    place = tuple([*range(ranks), *reversed(range(ranks))])
    return Table("zbv", 2 * ranks, (place,), micro, steps)


def _v(rank: int, ranks: int, micro: int) -> tuple[Step, ...]:
    stage = (rank, 2 * ranks - 1 - rank)  # on the way down, on the way up
    count = {kind: [0, 0] for kind in "FIW"}
    order: list[Step] = []

    def do(kind: str, way: int) -> None:
        if count[kind][way] < micro:
            order.append(Action(kind, stage[way], count[kind][way]))
            count[kind][way] += 1

    for _ in range(2 * (ranks - rank) - 1):  # until the first comes back up
        do("F", 0)
    for _ in range(rank):
        do("F", 1)
        do("F", 0)
    for _ in range(ranks - rank):  # the last stage's backwards begin
        do("F", 1)
        do("I", 1)
        do("W", 1)
    while count["F"][1] < micro:  # all three kinds in turn, down and up
        do("F", 0)
        do("I", 0)
        do("W", 0)
        do("F", 1)
        do("I", 1)
        do("W", 1)
    for _ in range(rank):  # no forwards left: input gradients first, their weights later
        do("I", 0)
        do("I", 1)
    for _ in range(ranks - rank):
        do("I", 0)
        do("W", 0)
    for way in (1, 0):
        for _ in range(micro):
            do("W", way)
    return tuple(order)
