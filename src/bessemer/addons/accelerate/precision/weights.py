"""Weights in FP8, quantised once per optimizer step instead of in the forward and backward of every micro-batch.

An `Optimizer` keeps the operands of its weights in a `KeptWeights` and drops them whenever it writes to the weights. A
weight that no optimizer owns, or that has changed otherwise (another version, storage or recipe), is quantised again.
Results are bit for bit the same either way, so every rank may decide for itself how much to keep:

    0 copies    nothing: every use quantises
    1           the operand of forward; backward reads it transposed. On a CPU that is a view
    2           also the transposed one, copied: tensor cores read FP8 along the summed dimension only

A CPU keeps one. A GPU keeps none in its first step, which shows how much memory remains, and then as many as fit.

All products of a layer run on one stream (`dist.chunk`), so an operand found here is ready.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bessemer.addons.accelerate.precision.operand import Operand, transpose
from bessemer.model.ops import WeightCache

KEPT = "fp8_kept"
"""Name of the attribute of a weight that holds its `KeptWeights`."""
COPIES = 2
LEFT_FREE = 0.06
"""Fraction of a GPU's memory left free for the runtime and fragmentation, as in the planner (`plan.hardware`)."""


class WeightQuantiser(Protocol):
    """The part of `FP8Recipe` that this module uses."""

    def quantised_weight(self, weight: Tensor) -> Operand: ...


def operand(weight: Tensor, recipe: WeightQuantiser) -> Operand:
    """The weight [..., N, K] as the operand of forward."""
    cache = getattr(weight, KEPT, None)
    return recipe.quantised_weight(weight) if cache is None else cache.entry(weight, recipe).operand


def turned(weight: Tensor, recipe: WeightQuantiser) -> Operand:
    """The transposed weight [..., K, N] as the operand of backward."""
    cache = getattr(weight, KEPT, None)
    if cache is None:
        return transpose(recipe.quantised_weight(weight))
    entry = cache.entry(weight, recipe)
    if cache.copies < COPIES:
        return transpose(entry.operand)
    if not entry.turned:
        value, scale = transpose(entry.operand)
        entry.turned.append(Operand(value.contiguous(), scale))
    return entry.turned[0]


class _Entry(NamedTuple):
    state: tuple[Any, ...]
    """The weight's identity when it was quantised."""
    operand: Operand
    turned: list[Operand]
    """The transposed operand, once it has been needed."""


class KeptWeights(WeightCache):
    """The operands of some weights until `drop`."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self._entries: dict[int, _Entry] = {}
        self._sizes: dict[int, int] = {}
        """Bytes of one copy of each weight that was requested."""
        self._peak = 0
        self._device = torch.device("cpu")
        for weight in weights:
            self._device = weight.device
            setattr(weight, KEPT, self)
        self.copies = 1 if self._device.type == "cpu" else 0

    def entry(self, weight: Tensor, recipe: WeightQuantiser) -> _Entry:
        state = (int(self.epoch), weight._version, weight.data_ptr(), recipe)
        cached = self._entries.get(id(weight))
        if cached is None or cached.state != state:
            cached = _Entry(state, recipe.quantised_weight(weight), [])
            self._sizes[id(weight)] = _bytes(cached.operand)
            if self.copies:
                self._entries[id(weight)] = cached
        return cached

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return sum(_bytes(part) for entry in self._entries.values() for part in (entry.operand, *entry.turned))

    def drop(self) -> None:
        """Discards all operands, because the weights change."""
        super().drop()
        freed = self.nbytes
        self._entries.clear()
        if self._sizes and self._device.type == "cuda":
            self._choose(freed)

    def _choose(self, held: int) -> None:
        """Sets how many copies fit beside the peak memory use; fewer if the peak has grown since."""
        peak = torch.cuda.max_memory_allocated(self._device)
        if peak <= self._peak:
            return
        free, total = torch.cuda.mem_get_info(self._device)
        room = free + torch.cuda.memory_reserved(self._device) - LEFT_FREE * total
        fit = fitting(room - (peak - held), sum(self._sizes.values()))
        self.copies = min(self.copies, fit) if self._peak else fit
        self._peak = peak


def fitting(room: float, copy: int) -> int:
    """How many copies of `copy` bytes, at most COPIES, fit into `room` bytes."""
    return max(0, min(COPIES, int(room // copy))) if copy else 0


def _bytes(part: Operand) -> int:
    return part.value_MK.nbytes + part.scale_MJ.nbytes
