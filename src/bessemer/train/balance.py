"""Auxiliary-loss-free load balancing: every gate's bias moves after every step (V3 2.1.2, LFB).

    b_i <- b_i + gamma * sign(mean load - load_i)

with the loads of the whole step, MTP layers included; every token counts once, and fillers (`Batch.filler`) never, nor
padding unless the stage counts it (`TrainingPlan.counts_padding`). A gate has `load_E` (float32, counted by its
training-mode forward) and `bias_E` (float32, or None if the model balances by loss alone). MaxVio = (max load - mean
load) / mean load is the published measure of imbalance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bessemer.model.gate import Gate


@contextmanager
def uncounted(gates: dict[str, Gate]) -> Iterator[None]:
    """Tokens computed inside do not count in the loads: for a backward pass, whose recomputed forwards would count
    theirs again, and for a pipeline's fillers."""
    before = [(gate.load_E.clone(), gate.counted_BT) for gate in gates.values()]
    restrict(gates, None)  # in a pipeline, the last forward pass may have been of a batch of another shape
    yield
    for gate, (load_E, counted_BT) in zip(gates.values(), before, strict=True):
        gate.load_E.copy_(load_E)
        gate.counted_BT = counted_BT


def restrict(gates: dict[str, Gate], counted_BT: Tensor | None) -> None:
    """From now on the loads count only these tokens of a batch; None: all. An MTP module's positions are those of the
    tokens ahead."""
    for name, gate in gates.items():
        ahead = int(name.removeprefix("mtp")) + 1 if name.startswith("mtp") else 0
        gate.counted_BT = None if counted_BT is None else counted_BT[:, ahead:]


def clear(gates: dict[str, Gate]) -> None:
    """Clears the loads of a step that was not applied."""
    for gate in gates.values():
        gate.load_E.zero_()


@torch.no_grad()
def update(gates: dict[str, Gate], gamma: float) -> dict[str, Tensor]:
    """One bias step for every gate; returns MaxVio per gate name and clears the loads. Never waits for the GPU.

    A gate that saw no token (an MTP module in a stage without MTP) keeps its bias; its MaxVio is NaN.
    """
    violation: dict[str, Tensor] = {}
    for name, gate in gates.items():
        mean = gate.load_E.mean()
        if gate.bias_E is not None:
            gate.bias_E += gamma * torch.sign(mean - gate.load_E)  # b_i, V3 2.1.2
        violation[name] = (gate.load_E.max() - mean) / mean
    clear(gates)
    return violation


def metrics(violation: dict[str, Tensor]) -> dict[str, float]:
    """The metrics of a step from the result of `update`: MaxVio per gate that saw tokens, and the largest of them."""
    if not violation:
        return {}
    values = dict(zip(violation, torch.stack(list(violation.values())).tolist(), strict=True))
    used = {f"moe/max_vio/{name}": value for name, value in values.items() if not math.isnan(value)}
    return used | {"train/max_vio": max(used.values())} if used else {}
