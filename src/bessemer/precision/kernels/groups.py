"""Which group a tile of rows belongs to, when groups of different sizes lie one after another.

Every group is cut into tiles of its own: one of c rows has ceil(c / BLOCK). The counts travel to the device without
stopping it; every program finds its group with a running sum over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def on_device(count: Sequence[int], device: torch.device) -> Tensor:
    """The counts as int32 [G]. From pinned memory, or the copy would wait for all that the device has yet to do."""
    counts = torch.tensor(count, dtype=torch.int32)
    return counts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else counts


@triton.jit
def locate(tile, count, GROUPS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's group, the group's first row and the one after its last, and the tile's number in the group.
    ROOM: the power of two from GROUPS on."""
    g = tl.arange(0, ROOM)
    rows_G = tl.load(count + g, mask=g < GROUPS, other=0)
    tiles_G = (rows_G + BLOCK - 1) // BLOCK
    group = tl.sum((tl.cumsum(tiles_G, 0) <= tile).to(tl.int32), 0)  # groups that end before it, empty ones too
    before = g < group
    first = tl.sum(tl.where(before, rows_G, 0).to(tl.int64), 0)
    rows = tl.sum(tl.where(g == group, rows_G, 0), 0)
    return group, first, first + rows, tile - tl.sum(tl.where(before, tiles_G, 0), 0)
