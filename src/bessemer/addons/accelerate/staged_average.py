"""The moving average of weights that are on a GPU (the hook `moving-average`): the masters are copied to the CPU during
the next step and added there by a thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from bessemer.train.flat_parameters import MovingAverage


def average_of(master: Tensor, decay: float) -> MovingAverage:
    return StagedAverage(master, decay) if master.is_cuda else MovingAverage(master, decay)


class StagedAverage(MovingAverage):
    def __init__(self, master: Tensor, decay: float):
        super().__init__(master, decay)
        self._staging = torch.empty_like(self._value, pin_memory=True)
        self._thread = ThreadPoolExecutor(1)
        self._adding: Future | None = None

    @property
    def value(self) -> Tensor:
        """Float32, on the CPU; waits for the last step."""
        if self._adding is not None:
            self._adding.result()
            self._adding = None
        return self._value

    def update(self, master: Tensor) -> None:
        _ = self.value
        self._staging.copy_(master, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._adding = self._thread.submit(self._add_staged, arrived)

    def _add_staged(self, arrived: torch.cuda.Event) -> None:
        arrived.synchronize()
        self._add(self._staging)
