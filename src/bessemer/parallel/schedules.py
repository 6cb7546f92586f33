"""The schedules by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from bessemer.errors import UserError
from bessemer.parallel.classic import gpipe, interleaved, one_f_one_b
from bessemer.parallel.dualpipe import dualpipe, dualpipe_v
from bessemer.parallel.table import Table
from bessemer.parallel.zero_bubble import zb1p, zbv

SCHEDULES: dict[str, Callable[[int, int], Table]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zb1p": zb1p, "zbv": zbv,
    "dualpipe": dualpipe, "dualpipe-v": dualpipe_v,
}  # fmt: skip


def schedule(name: str, ranks: int, micro: int) -> Table:
    """The table of a schedule for P ranks and M micro-batches; UserError for one that does not exist."""
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"there are: {', '.join(SCHEDULES)}"
        raise UserError(f'no schedule "{name}"; {hint}')
    return SCHEDULES[name](ranks, micro)


def auto(ranks: int, micro: int) -> str:
    """What a recipe's schedule = "auto" means: DualPipe wherever it can be, else 1F1B."""
    return "dualpipe" if ranks > 1 and ranks % 2 == 0 and micro % 2 == 0 and micro >= 2 * ranks else "1f1b"
