"""Packed rows, which hold several samples: where each sample begins and ends, for attention.

A CPU uses the tensor of segment numbers. A GPU uses `Packed`, built once per batch and shared by all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 128
"""The longest length is rounded up to a power of two, at least this one."""


class Packed(NamedTuple):
    """Segments of a batch [B, T] in the form that all layers use on a GPU."""

    segments_BT: Tensor
    end_S: Tensor
    """0, then the end of each segment in the flattened rows, int32 [S + 1]; the last segments are empty."""
    longest: int
    """An upper bound on the tokens of a segment."""

    @classmethod
    def of(cls, segments_BT: Tensor, device: torch.device) -> Packed | Tensor:
        """Packs segment numbers that are on the CPU, where counting them does not wait for a GPU. If a segment resumes
        later in its row, it cannot be packed: the tensor itself is returned."""
        starts_BT = _starts(segments_BT)
        count = int(starts_BT.sum())
        distinct = segments_BT.sort(1).values
        if count != int(_starts(distinct).sum()):
            return moved(segments_BT, device)
        where = starts_BT.flatten().nonzero().squeeze(1)
        lengths = torch.diff(where, append=torch.tensor([segments_BT.numel()]))
        most = int(lengths.max()) if count else 1
        longest = min(1 << (max(most, SHORTEST) - 1).bit_length(), segments_BT.shape[1])
        size = 1 << max(count - 1, 0).bit_length()
        return cls(moved(segments_BT, device), moved(_ends(segments_BT, size), device), longest)

    def to(self, device: torch.device) -> Packed:
        return Packed(moved(self.segments_BT, device), moved(self.end_S, device), self.longest)

    def first(self, T: int) -> Packed:
        """The segments of the first T tokens of each row."""
        segments_BT = self.segments_BT[:, :T]
        return Packed(segments_BT, _ends(segments_BT, len(self.end_S) - 1), self.longest)


Segments = Tensor | Packed | None
"""The `segments` argument of layers: tokens attend only to their own segment; None: to all tokens before them."""


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A copy to a GPU goes through pinned memory, so the host does not wait; torch keeps that
    memory until the copy is done."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def first_tokens(segments: Segments, T: int) -> Segments:
    """The segments of the first T tokens of each row."""
    if isinstance(segments, Packed):
        return segments.first(T)
    return None if segments is None else segments[:, :T]


def _starts(segments_BT: Tensor) -> Tensor:
    """Where a segment begins, bool [B, T]."""
    return F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)[:, : segments_BT.shape[1]]


def _ends(segments_BT: Tensor, size: int) -> Tensor:
    """`Packed.end_S` for at most `size` segments, without waiting for the device."""
    start_N = _starts(segments_BT).flatten()
    number_N = torch.where(start_N, start_N.cumsum(0) - 1, size)
    place_N = torch.where(start_N, torch.arange(len(start_N), device=start_N.device), len(start_N))
    end_S = torch.full((size + 1,), len(start_N), device=start_N.device)
    return end_S.scatter_(0, number_N, place_N).int()  # tokens that start no segment write the end into the last place
