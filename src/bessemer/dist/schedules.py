"""The schedules by name, and how many micro-batches each of them takes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from bessemer.errors import UserError
from bessemer.dist.classic import gpipe, interleaved, one_f_one_b
from bessemer.dist.dualpipe import dualpipe, dualpipe_v
from bessemer.dist.table import Table
from bessemer.dist.zero_bubble import zb1p, zbv


class Rule(NamedTuple):
    """One schedule, with P the number of its ranks."""

    table: Callable[[int, int], Table]
    """P, M -> what is done."""
    least: Callable[[int], int] = lambda P: 1
    """The fewest micro-batches of a step."""
    multiple: Callable[[int], int] = lambda P: 1
    """What their number must be a multiple of."""


SCHEDULES: dict[str, Rule] = {
    "gpipe": Rule(gpipe),
    "1f1b": Rule(one_f_one_b),
    "interleaved": Rule(interleaved, least=lambda P: P, multiple=lambda P: P),
    "zb1p": Rule(zb1p),
    "zbv": Rule(zbv, least=lambda P: 2 * P - 1),
    "dualpipe": Rule(dualpipe, least=lambda P: 2 * P, multiple=lambda P: 2),
    "dualpipe-v": Rule(dualpipe_v, least=lambda P: 2 * P),
}


def schedule(name: str, ranks: int, micro: int) -> Table:
    """The table of a schedule for P ranks and M micro-batches; UserError for one that does not exist. "auto" is the
    paper's where the number of ranks is even, else 1F1B. A step with too few micro-batches for DualPipe goes through
    its slices by 1F1B, one way (a run may begin with small batches, as V3's did)."""
    if name != "auto":
        return _rule(name).table(ranks, micro)
    if ranks % 2:
        return one_f_one_b(ranks, micro)
    if micro % 2 == 0 and micro >= SCHEDULES["dualpipe"].least(ranks):
        return dualpipe(ranks, micro)
    table = one_f_one_b(ranks, micro)
    return replace(table, place=(*table.place, tuple(reversed(table.place[0]))), idle=1)


def stages_of(name: str, ranks: int) -> int:
    """Slices that the model is cut into."""
    return schedule(name, ranks, least(name, ranks)).stages


def least(name: str, ranks: int) -> int:
    """The fewest micro-batches of a step."""
    return 1 if name == "auto" else _rule(name).least(ranks)


def micro_batches(name: str, ranks: int, wanted: int) -> int:
    """The smallest number of micro-batches from `wanted` on that a schedule takes."""
    if name == "auto":
        enough = ranks % 2 == 0 and wanted >= SCHEDULES["dualpipe"].least(ranks)
        return micro_batches("dualpipe" if enough else "1f1b", ranks, wanted)
    multiple = _rule(name).multiple(ranks)
    return -(-max(wanted, least(name, ranks)) // multiple) * multiple


def _rule(name: str) -> Rule:
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"there are: {', '.join(SCHEDULES)}"
        raise UserError(f'no schedule "{name}"; {hint}')
    return SCHEDULES[name]
