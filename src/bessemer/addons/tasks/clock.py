"""What limits on time count: work, in seconds of a fixed machine, whatever this machine is and does beside.

A limit is stated in seconds of the reference machine. `speed` is how many seconds this one takes for one of those,
found by a fixed piece of work; processes of a run inherit it. Limits then count processor time, which other processes
use none of.
"""

import os
import time
from functools import cache
from math import log

VARIABLE = "BESSEMER_SECONDS"
"""Environment variable in which child processes find `speed`."""
REFERENCE = 0.0041
"""Processor seconds of `_work` on the reference machine, one core of an x86 server of 2023 with CPython 3.11."""
STEP = 1.25
"""The result is a power of this: a measurement that is a little off gives the same limits."""
BOUNDS = (0.25, 16.0)
RUNS = 15


@cache
def speed() -> float:
    """Seconds of this machine for each second of the reference machine."""
    value = os.environ.get(VARIABLE, "")
    try:
        return min(max(float(value), BOUNDS[0]), BOUNDS[1])
    except ValueError:
        pass
    measured = min(_seconds() for _ in range(RUNS)) / REFERENCE
    rounded = min(max(STEP ** round(log(measured, STEP)), BOUNDS[0]), BOUNDS[1])
    os.environ[VARIABLE] = repr(rounded)
    return rounded


def _seconds() -> float:
    began = time.thread_time()
    _work()
    return time.thread_time() - began


def _work() -> int:
    """What an interpreter does most: calls, integers, lists, dictionaries and text."""
    table: dict[str, list[int]] = {}
    value = 1
    for n in range(24_000):
        value = (value * 1103515245 + n) & 0x7FFFFFFF
        table.setdefault(f"{value % 97}", []).append(value)
    return sum(max(numbers) - len(numbers) for numbers in sorted(table.values()))
