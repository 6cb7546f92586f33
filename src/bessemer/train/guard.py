"""What a trainer does about a non-finite step: skip it, roll back, and stop if that does not help.

(V3 4.2 had no irrecoverable spike and no rollback; smaller runs and real hardware do.) A bad step never touches the
weights. After `failures` bad steps in a row the trainer goes back to its last checkpoint but not to the same data: the
cursor stays past the rows that failed. After `rollbacks` of these without progress, a UserError says what to try.

`capture_rng` and `restore_rng` save every random state a step can depend on (torch, CUDA, numpy, Python, named
generators), for checkpoints and for running a step again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bessemer.errors import UserError

SKIP, ROLL_BACK = "skip", "roll back"


@dataclass
class StepGuard:
    """Counts bad steps and decides what to do."""

    failures: int = 3
    """Bad steps in a row before a rollback."""
    rollbacks: int = 2
    """Rollbacks before the run stops, unless a checkpoint was written after good steps in between."""
    streak: int = 0
    """Bad steps in a row so far."""
    rolled_back: int = 0
    """Rollbacks since the last progress."""

    def good(self) -> None:
        self.streak = 0

    def saved(self) -> None:
        """A checkpoint of a later step was written. Outside a streak of bad steps that is progress."""
        if self.streak == 0:
            self.rolled_back = 0

    def bad(self, what: str) -> str:
        """SKIP or ROLL_BACK; UserError when enough rollbacks have been tried. `what` describes the culprit."""
        self.streak += 1
        if self.streak < self.failures:
            return SKIP
        if self.rolled_back >= self.rollbacks:
            raise UserError(
                f"training does not recover: {self.failures} non-finite steps in a row again after {self.rolled_back} "
                f"rollbacks; last: {what}. Try a lower lr or a longer warm-up, a smaller clip, float32 compute; if the "
                "culprit is always the same rows, look at the data"
            )
        self.streak = 0
        self.rolled_back += 1
        return ROLL_BACK


def capture_rng(generators: dict[str, np.random.Generator] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and JSON values that `restore_rng` takes."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors.update({f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple), "the legacy form is a tuple"
    name, keys, position, has_gauss, cached = state
    version, words, gauss = random.getstate()
    values = {
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
        "generators": {key: _plain(g.bit_generator.state) for key, g in (generators or {}).items()},
    }
    return tensors, values


def restore_rng(
    tensors: Mapping[str, Tensor], values: dict[str, Any], generators: dict[str, np.random.Generator] | None = None
) -> None:
    """Restores every state. CUDA states of devices that this machine lacks are ignored."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    for key, generator in (generators or {}).items():
        generator.bit_generator.state = values["generators"][key]


def _plain(state: object) -> object:
    """Bit-generator state with arrays as lists."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state
