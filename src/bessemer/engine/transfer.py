"""Transfers between the host and a device while sequences decode, without making the host wait for the device.

On CUDA a plain copy of pageable memory waits until everything before it has run. Copies here go through pinned memory:
`to_device` never waits, and `Fetch` waits only when the host reads the numbers, and only for the copy. torch reuses a
pinned block only after its copy has run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to the device."""
    if device.type == "cuda" and host.numel():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def indices(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers from the host as an int64 tensor on the device."""
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)


class Fetch:
    """A copy of a contiguous tensor to the host, with the values at the time the device reaches it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.to("cpu", copy=True)

    def tensor(self) -> Tensor:
        """Waits for the copy and returns it: the only wait of a decoding step."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def read(self) -> list[list[float]]:
        """The same as rows of numbers."""
        rows: list[list[float]] = self.tensor().tolist()
        return rows
