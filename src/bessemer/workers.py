"""Processes that compute pieces of a job side by side: in the core, this process alone. An add-on brings one for every
core of a CPU (the hook `workers`). What they compute does not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from bessemer.system import granted_cores

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """This process alone."""

    n = 1
    """Processes, this one included."""

    def share(self, tensors: Iterable[Tensor]) -> None:
        """From now on all processes see when these tensors, or views of them, change."""

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields work(item) for every item, in order."""
        return map(work, items)

    def adding(self, trainer: Any, add: Callable[[Item], Result]) -> Callable[[Iterable[Item]], Iterator[Result]]:
        """`map` for work that adds the gradients of a micro-batch, and the loads of the gates, to those of `trainer`.
        Called once for a trainer."""
        return partial(self.map, add)

    def stop(self) -> None:
        """Ends the other processes; the next `map` starts new ones."""


def side_by_side(n: int) -> Workers:
    """This process and n - 1 helpers; this one alone if no add-on brings them."""
    from bessemer import plugins  # not above: commands count cores before anything heavy is loaded

    helpers = plugins.hook("workers") if n > 1 else None
    return Workers() if helpers is None else helpers(n)


def cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS if it is set, else what the system grants."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else granted_cores()


def shares(costs: Sequence[float], n: int) -> list[list[int]]:
    """Splits the items into at most n lists of about equal cost and returns their indices: the most expensive item
    first, each to the cheapest list so far. For `map`, whose processes wait for one another after every item."""
    lists: list[list[int]] = [[] for _ in range(n)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        min(lists, key=lambda members: sum(costs[member] for member in members)).append(item)
    return [members for members in lists if members]
