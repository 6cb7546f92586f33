"""Batches on their way to a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bessemer.data.batch import Batch


class Transfer:
    """Moves batches to a device. To a GPU on a stream of its own, from pinned memory: the host prepares a micro-batch
    and its copy runs while the device still computes the one before, and neither waits for the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: Batch) -> Batch:
        if self.device.type != "cuda":
            return batch.to(self.device)
        self._stream = self._stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            there = batch.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for tensor in there.tensors():
            tensor.record_stream(computing)  # its memory is not given to the next batch before this one is computed
        return there
