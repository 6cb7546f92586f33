"""What to do when a step is not finite: skip, name the culprit, roll back, and stop when that does not help.

(V3 4.2 had no irrecoverable spike and no rollback; smaller runs and real hardware do.) A bad step never touches the
weights. After `failures` bad steps in a row the trainer goes back to its last checkpoint but not to the same data: the
cursor stays past the rows that failed. After `rollbacks` of these without progress, a UserError says what to try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bessemer.errors import UserError
from bessemer.train import rng

SKIP, ROLL_BACK = "skip", "roll back"


@dataclass
class Guard:
    """Counts bad steps and decides."""

    failures: int = 3
    """Bad steps in a row before a rollback."""
    rollbacks: int = 2
    """Rollbacks before the run stops, unless a checkpoint written after good steps lies between them."""
    streak: int = 0
    """Bad steps in a row so far."""
    rolled_back: int = 0
    """Rollbacks since the last progress."""

    def good(self) -> None:
        self.streak = 0

    def saved(self) -> None:
        """A checkpoint of a later step is written: unless in the middle of bad steps, the trouble is behind."""
        if self.streak == 0:
            self.rolled_back = 0

    def bad(self, what: str) -> str:
        """SKIP or ROLL_BACK; UserError when rolling back has been tried often enough. `what` describes the culprit."""
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


def bad_gradients(names: list[str]) -> str:
    """What is said of gradients that are not finite, in the model's order, where the loss is."""
    # Backward runs from the last parameter to the first: the last bad one is where it began.
    where = names[-1] if names else "none (their norm overflows)"
    return f"loss is finite but {len(names)} gradients are not, beginning at {where}"


def nonfinite_activation(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Runs `run` (a forward pass) again, watching every module; returns the first whose output is not finite.

    The cause is that module or an operation on its inputs. Random states are put back; gate loads are the caller's.
    """
    first: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def watch(module: nn.Module, inputs: tuple, output: Any) -> None:
        if not first and not _finite(output):
            weights = "" if _finite(list(module.parameters(recurse=False))) else " (its own weights are not finite)"
            first.append(names[module] + weights)

    handles = [module.register_forward_hook(watch) for module in names]
    tensors, values = rng.capture()
    try:
        run()
    finally:
        rng.restore(tensors, values)
        for handle in handles:
            handle.remove()
    return first[0] if first else None


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return all(_finite(item) for item in value)
    return True
