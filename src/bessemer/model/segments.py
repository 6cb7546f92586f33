"""Rows that hold several samples: what tells attention where each begins and ends.

On a CPU that is the tensor of segment numbers. A GPU gets `Packed`, made once for a batch and shared by all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 128
"""Lengths of segments are told in powers of two from here on."""


class Packed(NamedTuple):
    """Segments of a batch [B, T] for every layer on a GPU."""

    segments_BT: Tensor
    end_S: Tensor
    """0 and where each segment ends in the flattened rows, int32 [S + 1]; the last ones are empty."""
    longest: int
    """Tokens; at least those of the longest segment."""

    @classmethod
    def of(cls, segments_BT: Tensor, device: torch.device) -> Packed | Tensor:
        """From segments on the CPU, where counting them waits for nobody. Segments that resume later in a row cannot
        be packed and stay a tensor."""
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
        """Of the first T tokens of the rows."""
        segments_BT = self.segments_BT[:, :T]
        return Packed(segments_BT, _ends(segments_BT, len(self.end_S) - 1), self.longest)


Segments = Tensor | Packed | None
"""What layers take: tokens attend to their own segment only. None: to all before them."""


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; to a GPU from pinned memory, so that the host does not wait. torch keeps that memory
    until the copy is made."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def causal_mask(T: int, segments_BT: Tensor | None, device: torch.device) -> Tensor:
    """True where a query may attend: [T, T], or [B, 1, T, T] when tokens attend only to their own segment."""
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if segments_BT is None:
        return causal
    return (causal & (segments_BT[:, :, None] == segments_BT[:, None, :])).unsqueeze(1)


def first_tokens(segments: Segments, T: int) -> Segments:
    """Segments of the first T tokens of the rows."""
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
    return end_S.scatter_(0, number_N, place_N).int()  # what starts nowhere writes the end, at the end
