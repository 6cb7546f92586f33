"""Training steps that repeat bit for bit on a GPU: `[layout] deterministic = true`.

Without it, some of torch's kernels add in the order in which threads arrive, so a resumed run on a GPU is close to an
uninterrupted one but not identical. Our kernels always add in a fixed order, and steps on a CPU always repeat.

It covers training steps only. Sampling and evaluation use operations that torch calls non-deterministic in general,
though not in the shapes used here.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

import torch

from bessemer.errors import UserError

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Values with which cuBLAS repeats its results; `bessemer` sets the first before CUDA starts."""
STEPS = 20
"""Steps after which the speed is reported; the first quarter does not count."""

Arguments = ParamSpec("Arguments")
Step = Callable[Arguments, dict[str, float]]
_say: Callable[[str], None] | None = None
"""None: off."""
_rates: list[float] = []


@contextmanager
def kept(on: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Makes training steps inside it use deterministic algorithms, if there is a GPU. UserError if cuBLAS is set up
    otherwise."""
    global _say
    if not on:
        yield
        return
    if not torch.cuda.is_available():
        say("deterministic = true: there is no GPU, and steps on a CPU repeat anyway")
        yield
        return
    if os.environ.get(VARIABLE) not in WORKSPACES:
        raise UserError(
            f"deterministic = true needs {VARIABLE}={WORKSPACES[0]} in the environment; set it and start again"
        )
    say("deterministic training: steps repeat bit for bit, and are slower; attention cannot use cuDNN")
    before, _say = _say, say
    _rates.clear()
    try:
        yield
    finally:
        _say = before


def held(step: Step[Arguments]) -> Step[Arguments]:
    """Decorator of a training step that returns its metrics: makes it deterministic inside `kept`."""

    @functools.wraps(step)
    def repeating(*arguments: Arguments.args, **named: Arguments.kwargs) -> dict[str, float]:
        if _say is None:
            return step(*arguments, **named)
        with _algorithms():
            values = step(*arguments, **named)
        _tell(values.get("train/tokens_per_second"))
        return values

    return repeating


@contextmanager
def _algorithms() -> Iterator[None]:
    memory: Any = torch.utils.deterministic
    fills, strict = memory.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    memory.fill_uninitialized_memory = False  # costs a kernel per tensor, and no tensor is read before it is written
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        memory.fill_uninitialized_memory = fills


def _tell(rate: float | None) -> None:
    if rate is None or _say is None or len(_rates) >= STEPS:
        return
    _rates.append(rate)
    if len(_rates) == STEPS:
        median = statistics.median(_rates[STEPS // 4 :])
        _say(
            f"deterministic training: {median:,.0f} tokens/s; compare with train/tokens_per_second of a run without it"
        )
