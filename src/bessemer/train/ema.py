"""The moving average of the weights, in CPU memory (V3 3.2.3): an early look at what they will be once the learning
rate has decayed.

On a GPU the masters travel to the CPU beside the next step, and are added there by a thread; whoever reads the average
waits for that first.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Average:
    """decay * average + (1 - decay) * master after every step, of one flat vector."""

    def __init__(self, master: Tensor, decay: float):
        self.decay = decay
        self._value = master.detach().to("cpu", torch.float32, copy=True)
        self._landing = None if master.device.type == "cpu" else torch.empty_like(self._value, pin_memory=True)
        self._thread = None if self._landing is None else ThreadPoolExecutor(1)
        self._adding: Future | None = None

    @property
    def value(self) -> Tensor:
        """Float32, on the CPU."""
        if self._adding is not None:
            self._adding.result()
            self._adding = None
        return self._value

    def follow(self, master: Tensor) -> None:
        if self._landing is None or self._thread is None:
            self._add(master)
            return
        _ = self.value
        self._landing.copy_(master, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._adding = self._thread.submit(self._add_landed, arrived)

    def _add_landed(self, arrived: torch.cuda.Event) -> None:
        arrived.synchronize()
        self._add(self._landing)

    def _add(self, master: Tensor) -> None:
        self._value.lerp_(master, 1 - self.decay)
