"""Schedules with whole backwards: GPipe, 1F1B (against which V3 Table 2 holds DualPipe), and 1F1B with several slices
of the model a rank.

Rank r holds stage r, or with V slices stages r, r + P, r + 2P, ... Every rank runs its forwards and backwards in the
order of its neighbours, shifted by its distance from the end.
"""

from __future__ import annotations

from bessemer.errors import UserError
from bessemer.dist.table import Action, Step, Table


def gpipe(ranks: int, micro: int) -> Table:
    """All forwards, then all backwards."""
    _positive("gpipe", ranks, micro)
    steps = [[Action(kind, rank, m) for kind in "FB" for m in range(micro)] for rank in range(ranks)]
    return _looped("gpipe", ranks, 1, micro, steps)


def one_f_one_b(ranks: int, micro: int) -> Table:
    """P - 1 - r forwards, then forward and backward in turn, then the backwards that are left."""
    _positive("1f1b", ranks, micro)
    steps = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro)
        order = [Action("F", rank, m) for m in range(ahead)]
        for m in range(micro - ahead):
            order += [Action("F", rank, ahead + m), Action("B", rank, m)]
        steps.append(order + [Action("B", rank, m) for m in range(micro - ahead, micro)])
    return _looped("1f1b", ranks, 1, micro, steps)


def interleaved(ranks: int, micro: int, slices: int = 2) -> Table:
    """1F1B over V slices a rank: rounds of P micro-batches go through a rank's slices one after another, which divides
    the time until the last rank has work by V. M must be a multiple of P."""
    _positive("interleaved", ranks, micro)
    if slices < 2:
        raise UserError(f"interleaved needs at least 2 slices of the model a rank, is {slices}; with one it is 1f1b")
    if micro % ranks:
        raise UserError(
            f"interleaved on {ranks} ranks needs micro-batches in multiples of {ranks}, is {micro}; "
            f"use {-(-micro // ranks) * ranks}"
        )
    steps = []
    total = micro * slices
    for rank in range(ranks):
        forwards = [_turn("F", n, rank, ranks, slices) for n in range(total)]
        backwards = [_turn("B", n, rank, ranks, slices) for n in range(total)]
        # A micro-batch is 2 turns behind for every rank further on, and a whole round for every further slice.
        ahead = min((slices - 1) * ranks + 2 * (ranks - 1 - rank), total)
        order = forwards[:ahead]
        for n in range(total - ahead):
            order += [forwards[ahead + n], backwards[n]]
        steps.append(order + backwards[total - ahead :])
    return _looped("interleaved", ranks, slices, micro, steps)


def _turn(kind: str, n: int, rank: int, ranks: int, slices: int) -> Action:
    """A rank's n-th forward or backward: rounds of P micro-batches through all slices, for backwards from the last."""
    turn, within = divmod(n, ranks * slices)
    number, m = divmod(within, ranks)
    number = number if kind == "F" else slices - 1 - number
    return Action(kind, number * ranks + rank, turn * ranks + m)


def _looped(name: str, ranks: int, slices: int, micro: int, steps: list[list[Step]]) -> Table:
    place = tuple(stage % ranks for stage in range(ranks * slices))
    return Table(name, ranks * slices, (place,), micro, tuple(map(tuple, steps)))


def _positive(name: str, ranks: int, micro: int) -> None:
    if ranks < 1 or micro < 1:
        raise UserError(f"{name} needs at least one rank and one micro-batch, is {ranks} and {micro}")
