"""What passes between the host and a device while sequences decode, without the host waiting for the device.

On CUDA a plain copy of pageable memory waits until everything before it has run. Copies here go through pinned memory:
`to_device` never waits, and `Fetch` waits only where the host reads the numbers, for the copy alone. torch reuses a
pinned block only after its copy has run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device."""
    if device.type == "cuda" and host.numel():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def indices(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers of the host as int64 on the device."""
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)


class Fetch:
    """A copy of a contiguous tensor on its way to the host, as it is when the device gets there."""

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
        """Waits for the copy: the only wait of a decoding step."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def read(self) -> list[list[float]]:
        """The same as rows of numbers."""
        rows: list[list[float]] = self.tensor().tolist()
        return rows
