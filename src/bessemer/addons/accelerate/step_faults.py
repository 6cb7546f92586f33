"""Where a non-finite step started to go wrong (the hook `explain-step`): the first module whose output is not finite,
or the parameter where gradients of a finite loss begin to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bessemer.train.guard import capture_rng, restore_rng

if TYPE_CHECKING:
    from bessemer.train.objective import Sums
    from bessemer.train.trainer import Trainer


def culprit(trainer: Trainer, sums: Sums, terms: dict[str, float]) -> str:
    """Describes it; computes the batch again."""
    totals = torch.stack([loss.total.float() for loss in sums.losses])
    bad = (~totals.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return bad_gradients(trainer.optimizer.nonfinite_gradients())
    batch = sums.batches[bad[0]]
    with torch.no_grad():
        where = nonfinite_activation(
            trainer.model, lambda: trainer.objective(trainer.model, trainer.on_device.transfer(batch), **terms)
        )
    what = f"loss of micro-batch {bad[0]} is {totals[bad[0]].item()}"
    return what + (f", first in the output of {where}" if where else ", though every module's output is finite")


def bad_gradients(names: list[str]) -> str:
    """Describes non-finite gradients of a finite loss; names are in the model's order."""
    # Backward runs from the last parameter to the first, so the last bad one is where it started.
    where = names[-1] if names else "none (their norm overflows)"
    return f"loss is finite but {len(names)} gradients are not, beginning at {where}"


def nonfinite_activation(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Runs `run` (a forward pass) again, checking every module; returns the first whose output is not finite.

    The cause is that module or an operation on its inputs. Restores random states; the caller restores gate loads.
    """
    first: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def check(module: nn.Module, inputs: tuple, output: object) -> None:
        if not first and not _finite(output):
            weights = "" if _finite(list(module.parameters(recurse=False))) else " (its own weights are not finite)"
            first.append(names[module] + weights)

    handles = [module.register_forward_hook(check) for module in names]
    tensors, values = capture_rng()
    try:
        run()
    finally:
        restore_rng(tensors, values)
        for handle in handles:
            handle.remove()
    return first[0] if first else None


def _finite(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return all(_finite(item) for item in value)
    return True
