"""Moving batches to a GPU: those of the next step are read while it computes this one, and each is copied while it
computes the one before.

A thread reads rows, verifies checksums and counts what the host must know of a batch (`Batch.counted_here`); the
training thread finds them in memory and only pins and sends them. The reader does not pin: allocating pinned memory may
wait for the whole device, which in the middle of a pipeline's messages waits for the neighbour.

What the next step reads is a guess, computed from consumed tokens and rows, so checkpoints need not store it. If a step
begins elsewhere, as after a rollback, the guess is discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import torch

from bessemer.addons.accelerate.background import Background

if TYPE_CHECKING:
    from bessemer.data.batch import Batch


class Transfer:
    """Moves batches to a device; to a GPU from pinned memory, on a separate stream. The host prepares a micro-batch and
    its copy runs while the device still computes the one before, and neither waits for the other."""

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
            tensor.record_stream(computing)  # its memory is not reused for the next batch before this one is computed
        return there


class Position(NamedTuple):
    """Where a step begins."""

    tokens: int
    rows: int


class ReadAhead:
    """Reads at most one step ahead. `read(place)`: the micro-batches of the step that begins there."""

    def __init__(self, read: Callable[[Position], Iterable[Batch]]) -> None:
        self._read = read
        self._reader = Background("reading")
        self._position: Position | None = None
        self._batches: list[Batch] = []
        self._over = False

    def begin(self, position: Position) -> None:
        """Starts reading the step at `place`."""
        self.stop()
        self._position, self._over, self._batches = position, False, []
        batches = self._batches

        def work() -> None:
            for batch in self._read(position):
                batches.append(batch.counted_here())
                if self._over:
                    return

        self._reader.begin(work)

    def take(self, position: Position) -> list[Batch]:
        """The micro-batches of the step at `place`; raises the error if reading them failed."""
        if self._position != position:
            self.begin(position)
        self._reader.finish()
        self._position = None
        return self._batches

    def stop(self) -> None:
        """Stops the thread after its current micro-batch, and discards what it read, errors included."""
        self._over, self._position = True, None
        with suppress(Exception):
            self._reader.finish()
