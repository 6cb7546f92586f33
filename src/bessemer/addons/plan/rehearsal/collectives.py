"""What the ranks of a rehearsal say to each other: every operation of `torch.distributed` is counted as it is called.

An operation belongs to the axes along which its ranks differ: a group of ranks (0, 1) with the places pp 0 and pp 1
counts under "pp". Nothing is recorded where a library calls its process group directly.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from bessemer.addons.distributed.mesh import Layout

OPERATIONS = {
    "all_reduce": "all-reduce", "reduce_scatter_single": "reduce-scatter", "reduce_scatter_tensor": "reduce-scatter",
    "all_gather_single": "all-gather", "all_gather_into_tensor": "all-gather", "all_gather": "all-gather",
    "all_to_all_single": "all-to-all", "isend": "send", "send": "send", "irecv": "receive", "recv": "receive",
}  # fmt: skip
"""Functions of `torch.distributed`, and the operation that each is."""
NAMES = ("pp", "dp", "ep", "cp")
"""Of the sizes in `Layout.place`."""

Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""(operation, function) -> what is called in its place."""


def replace(wrap: Wrap) -> None:
    """Replaces the operations in this process, wherever a module of ours or of torch's parallel libraries names them.
    For a process that ends afterwards."""
    for name, operation in OPERATIONS.items():
        function = getattr(dist, name, None)
        if function is None:
            continue
        new = wrap(operation, function)
        for module_name, module in [*sys.modules.items()]:
            ours = module_name.startswith(("bessemer", "torch.distributed")) and "c10d" not in module_name
            for key, value in [*vars(module).items()] if ours and module is not None else ():
                if value is function:
                    setattr(module, key, new)


class Counter:
    """Counts the operations of one rank, by operation and axes."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.counts: dict[str, dict[str, list[int]]] = {}
        """Axes -> operation -> [calls, bytes that this rank gave]."""

    def wrap(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        given = 0 if operation in ("all-reduce", "send", "receive") else 1  # out comes first in the others

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            group = options.get("group")
            if group is None:
                groups = [value for value in arguments if isinstance(value, dist.ProcessGroup)]
                group = groups[0] if groups else dist.group.WORLD
            tensor = arguments[given] if len(arguments) > given else None
            size = tensor.nbytes if isinstance(tensor, Tensor) else 0
            entry = self.counts.setdefault(self._axes(group), {}).setdefault(operation, [0, 0])
            entry[0] += 1
            entry[1] += size
            return function(*arguments, **options)

        return counted

    def _axes(self, group: dist.ProcessGroup | None) -> str:
        places = [self.layout.place(rank) for rank in dist.get_process_group_ranks(group)]
        axes = [name for name, *values in zip(NAMES, *places, strict=True) if len(set(values)) > 1]
        return " x ".join(axes) or "alone"


def total(counts: list[dict[str, dict[str, list[int]]]]) -> dict[str, dict[str, list[int]]]:
    """The counts of all ranks together."""
    sums: dict[str, dict[str, list[int]]] = {}
    for of_rank in counts:
        for axes, operations in of_rank.items():
            for operation, (calls, size) in operations.items():
                entry = sums.setdefault(axes, {}).setdefault(operation, [0, 0])
                entry[0] += calls
                entry[1] += size
    sums.pop("alone", None)
    return {axes: dict(sorted(operations.items())) for axes, operations in sorted(sums.items())}
