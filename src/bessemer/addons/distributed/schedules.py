"""The pipeline schedules by name, and how many micro-batches each takes. DualPipe is in `dualpipe`.

    gpipe, 1f1b    stage r on rank r; whole backwards. V3 Table 2 compares DualPipe with 1F1B
    interleaved    1F1B with V slices of the model per rank: stages r, r + P, r + 2P, ... on rank r

Zero-bubble schedules split every backward, so that weight gradients fill time that would be idle (Qi et al. 2024):

    zb1p    a stage per rank. As 1F1B, but a rank passes its input gradient on at once and computes the weight gradient
            r turns later: it holds no more micro-batches than the first rank of 1F1B. V3 Table 2 includes it
    zbv     stages r and 2P - 1 - r on rank r. The last stage is on rank 0 again, so a micro-batch returns to where it
            started, and with F = I = W no rank is idle between its first and its last step
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from bessemer.addons.distributed.dualpipe import dualpipe, dualpipe_v
from bessemer.addons.distributed.table import Action, Kind, Step, Table
from bessemer.errors import UserError


def gpipe(ranks: int, micro: int) -> Table:
    """All forwards, then all backwards."""
    _positive("gpipe", ranks, micro)
    kinds: tuple[Kind, ...] = ("F", "B")
    steps = [[Action(kind, rank, m) for kind in kinds for m in range(micro)] for rank in range(ranks)]
    return _looped("gpipe", ranks, 1, micro, steps)


def one_f_one_b(ranks: int, micro: int) -> Table:
    """P - 1 - r forwards, then forward and backward alternating, then the remaining backwards."""
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
    """1F1B over V slices per rank: rounds of P micro-batches pass through a rank's slices one after another, which
    divides the time until the last rank has work by V. M must be a multiple of P."""
    _positive("interleaved", ranks, micro)
    if slices < 2:
        raise UserError(f"interleaved needs at least 2 slices of the model per rank, not {slices}; with one it is 1f1b")
    if micro % ranks:
        raise UserError(
            f"interleaved on {ranks} ranks needs micro-batches in multiples of {ranks}, not {micro}; "
            f"use {-(-micro // ranks) * ranks}"
        )
    steps = []
    total = micro * slices
    for rank in range(ranks):
        forwards = [_turn("F", n, rank, ranks, slices) for n in range(total)]
        backwards = [_turn("B", n, rank, ranks, slices) for n in range(total)]
        # Each later rank is 2 turns behind, each further slice a whole round.
        ahead = min((slices - 1) * ranks + 2 * (ranks - 1 - rank), total)
        order = forwards[:ahead]
        for n in range(total - ahead):
            order += [forwards[ahead + n], backwards[n]]
        steps.append(order + backwards[total - ahead :])
    return _looped("interleaved", ranks, slices, micro, steps)


def _turn(kind: Kind, n: int, rank: int, ranks: int, slices: int) -> Action:
    """A rank's n-th forward or backward: rounds of P micro-batches through all slices, for backwards from the last."""
    turn, within = divmod(n, ranks * slices)
    number, m = divmod(within, ranks)
    number = number if kind == "F" else slices - 1 - number
    return Action(kind, number * ranks + rank, turn * ranks + m)


def _looped(name: str, ranks: int, slices: int, micro: int, steps: Sequence[Sequence[Step]]) -> Table:
    placement = tuple(stage % ranks for stage in range(ranks * slices))
    return Table(name, ranks * slices, (placement,), micro, tuple(map(tuple, steps)))


def _positive(name: str, ranks: int, micro: int) -> None:
    if ranks < 1 or micro < 1:
        raise UserError(f"{name} needs at least one rank and one micro-batch, not {ranks} and {micro}")


def zb1p(ranks: int, micro: int) -> Table:
    """ZB1P for P = `ranks` and any number of micro-batches."""
    _positive("zb1p", ranks, micro)
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
    """ZBV for R = `ranks` and M = `micro`, at least 2R - 1 (fewer leave the V half empty); else UserError."""
    if ranks < 1:
        raise UserError(f"zbv needs at least one pipeline rank, not {ranks}")
    if micro < 2 * ranks - 1:
        raise UserError(f"zbv on {ranks} ranks needs at least {2 * ranks - 1} micro-batches, not {micro}")
    steps = tuple(_v(rank, ranks, micro) for rank in range(ranks))
    placement = tuple([*range(ranks), *reversed(range(ranks))])
    return Table("zbv", 2 * ranks, (placement,), micro, steps)


def _v(rank: int, ranks: int, micro: int) -> tuple[Step, ...]:
    """The steps of one rank of ZBV."""
    stage = (rank, 2 * ranks - 1 - rank)  # going down, coming back up
    count = {kind: [0, 0] for kind in "FIW"}
    order: list[Step] = []

    def do(kind: Kind, leg: int) -> None:
        if count[kind][leg] < micro:
            order.append(Action(kind, stage[leg], count[kind][leg]))
            count[kind][leg] += 1

    for _ in range(2 * (ranks - rank) - 1):  # until the first micro-batch comes back up
        do("F", 0)
    for _ in range(rank):
        do("F", 1)
        do("F", 0)
    for _ in range(ranks - rank):  # the last stage's backwards begin
        do("F", 1)
        do("I", 1)
        do("W", 1)
    while count["F"][1] < micro:  # steady state: all three kinds, down and up
        do("F", 0)
        do("I", 0)
        do("W", 0)
        do("F", 1)
        do("I", 1)
        do("W", 1)
    for _ in range(rank):  # no forwards left: input gradients first, weight gradients later
        do("I", 0)
        do("I", 1)
    for _ in range(ranks - rank):
        do("I", 0)
        do("W", 0)
    for leg in (1, 0):
        for _ in range(micro):
            do("W", leg)
    return tuple(order)


class ScheduleRule(NamedTuple):
    """One schedule; P is the number of its ranks."""

    table: Callable[[int, int], Table]
    """(P, M) -> its table."""
    least: Callable[[int], int] = lambda P: 1
    """The fewest micro-batches of a step."""
    multiple: Callable[[int], int] = lambda P: 1
    """Their number must be a multiple of this."""


SCHEDULES: dict[str, ScheduleRule] = {
    "gpipe": ScheduleRule(gpipe),
    "1f1b": ScheduleRule(one_f_one_b),
    "interleaved": ScheduleRule(interleaved, least=lambda P: P, multiple=lambda P: P),
    "zb1p": ScheduleRule(zb1p),
    "zbv": ScheduleRule(zbv, least=lambda P: 2 * P - 1),
    "dualpipe": ScheduleRule(dualpipe, least=lambda P: 2 * P, multiple=lambda P: 2),
    "dualpipe-v": ScheduleRule(dualpipe_v, least=lambda P: 2 * P),
}


def schedule(name: str, ranks: int, micro: int) -> Table:
    """The table of a schedule for P ranks and M micro-batches; UserError for an unknown name. "auto" is the paper's
    DualPipe if the number of ranks is even, else 1F1B. A step with too few micro-batches for DualPipe runs 1F1B over
    the slices of its first lane (a run may start with small batches, as V3 did)."""
    if name != "auto":
        return _rule(name).table(ranks, micro)
    if ranks % 2:
        return one_f_one_b(ranks, micro)
    if micro % 2 == 0 and micro >= SCHEDULES["dualpipe"].least(ranks):
        return dualpipe(ranks, micro)
    table = one_f_one_b(ranks, micro)
    return replace(table, place=(*table.place, tuple(reversed(table.place[0]))), idle=1)


def stages_of(name: str, ranks: int) -> int:
    """Slices that the model is split into."""
    return schedule(name, ranks, least(name, ranks)).stages


def least(name: str, ranks: int) -> int:
    """The fewest micro-batches of a step."""
    return 1 if name == "auto" else _rule(name).least(ranks)


def micro_batches(name: str, ranks: int, at_least: int) -> int:
    """The smallest number of micro-batches that a schedule accepts and that is at least `at_least`."""
    name = chosen(name, ranks, at_least)
    multiple = _rule(name).multiple(ranks)
    return -(-max(at_least, least(name, ranks)) // multiple) * multiple


def chosen(name: str, ranks: int, at_least: int) -> str:
    """`name`, or what "auto" is for a step of at least so many micro-batches: DualPipe if possible, otherwise 1F1B."""
    if name != "auto":
        return name
    return "dualpipe" if ranks % 2 == 0 and at_least >= SCHEDULES["dualpipe"].least(ranks) else "1f1b"


def of_step(name: str, ranks: int, at_least: int) -> tuple[str, int]:
    """(schedule, micro-batches) of a step that is cut into at least `at_least` of them, with "auto" resolved."""
    micro = micro_batches(name, ranks, at_least)
    return schedule(name, ranks, micro).name, micro


def _rule(name: str) -> ScheduleRule:
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(SCHEDULES)}"
        raise UserError(f'no schedule "{name}"; {hint}')
    return SCHEDULES[name]
